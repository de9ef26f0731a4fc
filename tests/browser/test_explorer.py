"""Notebook 12 in a real JupyterLab: a lasso drawn with the mouse, and the gallery of exactly the points inside it."""

import numpy as np
import pytest
from reviewed import leave

from ptglab.ui.explorer import MARGIN

pytestmark = pytest.mark.browser
XY = np.column_stack(np.unravel_index(np.arange(200), (20, 10))).astype(np.float32)  # a grid, as wide as high on screen
LOW, HIGH = np.array([3.5, 2.5]), np.array([16.5, 8.5])  # of the lasso, between the points


def rows(page) -> list[int]:
    """Return the rows whose pictures the gallery shows."""
    cards = "[...document.querySelectorAll('.ptglab-gallery-box [data-row]')]"
    return page.script(f"return {cards}.map((e) => +e.dataset.row)")


def test_a_lasso_fills_the_gallery_with_exactly_those(lab, tmp_path):
    from selenium.webdriver import ActionChains

    leave(tmp_path / "one")
    page = lab("12_explorer", audit_run=str(tmp_path / "one"))
    arrays = page.folder / "runs" / "12_explorer" / "arrays"
    arrays.mkdir(parents=True)
    np.save(arrays / "embedding.npy", XY)  # as if UMAP had run before
    page.run(".ptglab-scatter canvas")
    expected = np.flatnonzero((XY > LOW).all(1) & (XY < HIGH).all(1)).tolist()
    assert 60 < len(expected) < 200  # more than a page
    canvas = page.find(".ptglab-scatter canvas")[0]
    page.script("arguments[0].scrollIntoView({block: 'end'})", canvas)
    # The longer axis of the canvas shows more than the data: both axes have the scale of the shorter one.
    side = min(page.script("return [arguments[0].clientWidth, arguments[0].clientHeight]", canvas))
    corners = np.array([(LOW[0], HIGH[1]), HIGH, (HIGH[0], LOW[1]), LOW, (LOW[0], HIGH[1] - 0.1)])
    pixels = (2 * corners / XY.max(0) - 1) * [1, -1] * side / 2 / MARGIN  # from the centre
    path = [a + (b - a) * step / 8 for a, b in zip(pixels, pixels[1:], strict=False) for step in range(9)]

    def lassoed() -> bool:
        """Draw the lasso; return whether all of them are selected. It is drawn again if there were no points yet."""
        mouse = ActionChains(page.browser, duration=40)
        for number, point in enumerate(path):
            mouse.move_to_element_with_offset(canvas, *map(int, np.round(point)))
            if number == 0:
                mouse.click_and_hold()
        mouse.release().perform()
        return page.text(".ptglab-heading-box").startswith(f"{len(expected)} selected")

    page.until(lassoed, "a selection of all points inside")
    seen = rows(page)
    while len(seen) < len(expected):
        before = rows(page)
        page.click(".ptglab-after")
        page.until(lambda before=before: rows(page) != before, "the next page of the gallery")
        seen += rows(page)
    assert seen == expected
    page.shoot("lasso")
    for colour, word in [("3", "suspicious"), ("4", "not flagged")]:
        page.click(f".ptglab-by button:nth-child({colour})")
        page.until(lambda word=word: word in page.text(".ptglab-legend-box"), word)
        page.shoot(f"colour{colour}")
