"""Notebook 12 in a real JupyterLab: a lasso drawn with the mouse, and the gallery of exactly the points inside it."""

import numpy as np
import pytest
from reviewed import leave

from ptglab.ui.explorer import MARGIN

pytestmark = pytest.mark.browser
CLEAR = 4  # pixels between the lasso and any point


def edges(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return two positions about `low` and `high` that are at least CLEAR pixels from every value."""
    candidates = np.arange(values.min() - 10, values.max() + 10, 0.5)
    clear = candidates[(np.abs(candidates[:, None] - values).min(1) > CLEAR)]
    return tuple(float(clear[np.abs(clear - wanted).argmin()]) for wanted in (low, high))


def rows(page) -> list[int]:
    """Return the rows whose pictures the gallery shows."""
    return page.script(
        "return [...document.querySelectorAll('.ptglab-gallery-box [data-row]')].map((e) => +e.dataset.row)"
    )


def test_a_lasso_fills_the_gallery_with_exactly_those(lab, tmp_path):
    from selenium.webdriver import ActionChains

    leave(tmp_path / "one")
    page = lab("12_explorer", audit_run=str(tmp_path / "one"))
    page.run(".ptglab-scatter canvas")
    xy = np.load(page.folder / "runs" / "12_explorer" / "arrays" / "embedding.npy")
    canvas = page.find(".ptglab-scatter canvas")[0]
    page.script("arguments[0].scrollIntoView({block: 'end'})", canvas)
    width, height = page.script("return [arguments[0].clientWidth, arguments[0].clientHeight]", canvas)
    # The longer axis of the canvas shows more than the data: both axes have the scale of the shorter one.
    pixels = (
        (2 * (xy - xy.min(0)) / np.ptp(xy, axis=0) - 1) * [1, -1] * min(width, height) / 2 / MARGIN
    )  # from the centre
    left, right = edges(pixels[:, 0], *np.quantile(pixels[:, 0], [0.2, 0.7]))
    top, bottom = edges(pixels[:, 1], *np.quantile(pixels[:, 1], [0.2, 0.7]))
    inside = (pixels > [left, top]).all(1) & (pixels < [right, bottom]).all(1)
    expected = np.flatnonzero(inside).tolist()
    assert 60 < len(expected) < 195  # more than a page
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top + 2)])
    path = [a + (b - a) * step / 8 for a, b in zip(corners, corners[1:], strict=False) for step in range(9)]

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
