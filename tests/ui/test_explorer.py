"""The explorer in the kernel: a selection fills the gallery with exactly those, stored runs are shown at once."""

import numpy as np
import pytest
from expected import refused
from explored import found_in, shown
from synthetic import planted

from ptglab.errors import InputError
from ptglab.lab import runs
from ptglab.ui import explorer


def test_a_selection_fills_the_gallery_with_exactly_those(opened):
    opened.select([7, 3, 100, 7])
    assert shown(opened.gallery()) == [3, 7, 100] and opened.heading().startswith("3 selected")
    opened.select(None)
    score = opened.suspects.score
    assert shown(opened.gallery()) == list(np.argsort(score, kind="stable")[: explorer.STILL])
    opened.select(range(130))
    pages = []
    for opened.page in range(opened.pages):  # noqa: B020 - the page is a state of the explorer
        pages += shown(opened.gallery())
    assert opened.pages == 3 and pages == list(range(130))


def test_without_the_truth_nothing_tells_of_it(tmp_path, images):
    found, truth = found_in(tmp_path / "one", images)
    blind = explorer.Explorer(found, np.zeros((150, 2)))
    assert blind.colours == ["given", "score", "flag"] and "true" not in blind.caption(0) and "F1" not in blind.status()
    refused("plane of 9 images for 150", call=explorer.Explorer)(found, np.zeros((9, 2)))


def test_names_from_data_are_text(tmp_path, opened):
    opened.names = ["<script>alert(1)</script>", *opened.names[1:]]
    opened.select(np.flatnonzero(opened.truth == 0))
    page = opened.still() + opened.widgets.hover.value + opened.gallery() + opened.large(0)
    opened.colour("given")
    page += opened.widgets.legend.value + "".join(opened.widgets.figure.data[0].text)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_still_picture_has_texts_for_who_cannot_see(opened):
    page = opened.still()
    assert len(shown(page)) == explorer.STILL
    assert page.count("<img") == page.count('alt="') == explorer.STILL + 1 and 'alt=""' not in page
    assert "text/html" in opened._repr_mimebundle_() and "widget" not in str(opened._repr_mimebundle_().keys())


def test_the_plane_is_computed_once_and_kept(tmp_path, monkeypatch):
    run, (*_, features) = runs.start(tmp_path / "run"), planted(60)
    first = explorer.plane(run, features, 0)
    assert first.shape == (60, 2) and np.isfinite(first).all()
    monkeypatch.setattr(explorer.neighbours, "plane", lambda *_: pytest.fail("computed again"))
    assert (explorer.plane(run, features, 0) == first).all()
    refused("plane of 60 images, not 59", call=explorer.plane)(run, features[:59], 0)


def test_the_selection_stays_when_the_noise_changes(swept):
    opened, _ = swept
    opened.select([5, 6])
    opened.choose(noise_kind="asymmetric")
    opened.compute()
    assert shown(opened.widgets.cards.value) == [5, 6] and "asymmetric" in opened.widgets.line.value


def test_a_cell_that_fails_says_so_in_a_line(swept):
    opened, _ = swept
    opened.choose(noise_rate=0.8)
    with pytest.raises(InputError, match=r"cells/.*0\.8.*made to fail; see .*log\.txt"):
        opened.compute()
    opened.widgets.compute()
    opened.widgets.worker.join(60)
    assert "made to fail" in opened.widgets.line.value and opened.widgets.button.layout.display == ""


def test_other_images_are_refused(swept, tmp_path):
    opened, _ = swept
    opened._ids = opened._ids[1:]
    with pytest.raises(InputError, match="is of other images"):
        opened.choose(noise_rate=0.4)
