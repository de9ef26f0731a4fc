"""Notebook 12 in a real JupyterLab: a lasso drawn with the mouse, and the gallery of exactly what it holds."""

import numpy as np
import pytest
from reviewed import leave

pytestmark = pytest.mark.browser
# Centres of all points on the page, in the order of rows; and the ones that are drawn as selected
POINTS = """return [...document.querySelectorAll('.ptglab-scatter .point')].map((p) => {
  const r = p.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]})"""
BOLD = """return [...document.querySelectorAll('.ptglab-scatter .point')].flatMap(
  (p, i) => +getComputedStyle(p).opacity > 0.5 ? [i] : [])"""


def rows(page) -> list[int]:
    """Return the rows whose pictures the gallery shows."""
    return [int(e.get_attribute("data-row")) for e in page.find(".ptglab-gallery [data-row]")]


def test_a_lasso_fills_the_gallery_with_exactly_those(lab, tmp_path):
    from selenium.webdriver import ActionChains

    leave(tmp_path / "one")
    page = lab("12_explorer", audit_run=str(tmp_path / "one"))
    page.run(".ptglab-scatter .nsewdrag")
    [area] = page.find(".ptglab-scatter .nsewdrag")
    page.script("arguments[0].scrollIntoView({block: 'center'})", area)
    page.until(lambda: len(page.script(POINTS)) == 200, "200 points")
    box = page.script("const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]", area)
    x, y, width, height = box
    left, top, right, bottom = x + 0.1 * width, y + 0.2 * height, x + 0.6 * width, y + 0.75 * height
    points = np.array(page.script(POINTS))
    inside = (points[:, 0] > left) & (points[:, 0] < right) & (points[:, 1] > top) & (points[:, 1] < bottom)
    expected = set(np.flatnonzero(inside).tolist())
    assert 5 < len(expected) < 195
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top + 5)]
    path = [np.array(corners[0])]
    for start, end in zip(corners, corners[1:], strict=False):
        path += [np.array(start) + (np.array(end) - start) * step / 6 for step in range(1, 7)]
    centre, mouse = np.array([x + width / 2, y + height / 2]), ActionChains(page.browser, duration=60)
    for number, point in enumerate(path):
        mouse.move_to_element_with_offset(area, *map(int, np.round(point - centre)))
        if number == 0:
            mouse.click_and_hold()
    mouse.release().perform()
    page.until(lambda: 0 < len(page.script(BOLD)) < 200, "selected points")
    selected = page.script(BOLD)
    assert len(set(selected) ^ expected) <= 3  # points on the very line
    page.until(lambda: set(rows(page)) <= set(selected), "a gallery of the selected ones")
    seen = rows(page)
    while len(seen) < len(selected):
        before = rows(page)
        page.click(".ptglab-after")
        page.until(lambda before=before: rows(page) != before, "the next page of the gallery")
        seen += rows(page)
    assert seen == sorted(selected)
    page.shoot("lasso")
