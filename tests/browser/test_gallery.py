"""The gallery in a real browser, opened as a file: what is seen, what is told to the console, what is fetched."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from ptglab import data
from ptglab.audit import exports
from ptglab.detect.suspects import Suspects

pytestmark = pytest.mark.browser
EVIL, CLASS = "<img src=x onerror=alert(1)>.png", "</script><b>"
# id, given, suggested, score, flagged
IMAGES = [
    ("img 10.png", "cat", "dog", 0.1, True), ("img 9.png", "cat", "dog", 0.3, True), (EVIL, "dog", CLASS, 0.2, True),
    ("Ünïcode.png", "dog", "cat", 0.4, True), ("a.png", "cat", "dog", 0.05, False), ("b.png", "dog", "dog", 0.6, False),
    *((name, CLASS, CLASS, score, False) for name, score in [("c.png", 0.7), ("d.png", 0.8), ("e.png", 0.9)]),
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The gallery of IMAGES, a folder beside theirs."""
    folder = tmp_path_factory.mktemp("gallery") / "photos"
    folder.mkdir()
    for i, (name, *_) in enumerate(IMAGES):
        Image.new("RGB", (20, 30 + i), (20 * i, 100, 200)).save(folder / name)
    with open(folder / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *(image[:2] for image in IMAGES)])
    image_set = data.load(folder)
    rows = {name: rest for name, *rest in IMAGES}
    _, suggested, score, flagged = zip(*(rows[id] for id in image_set.ids), strict=True)
    suggested = np.array([image_set.class_names.index(name) for name in suggested])
    suspects = Suspects(np.array(score, np.float32), np.array(flagged), suggested)
    (folder.parent / "run").mkdir()
    page = folder.parent / "run" / "gallery.html"
    exports.gallery(page, image_set, suspects, "photos", "detector", ["4 look wrong."])
    return page


@pytest.fixture
def browser(chromium, path):
    """The page just opened; afterwards nothing may have been said to the console or fetched from anywhere else."""
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)  # what came before is forgotten
    chromium.get(path.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert path.as_uri() in urls
    assert [url for url in urls if not url.startswith((path.parents[1].as_uri(), "data:"))] == []


def ids(browser) -> list[str]:
    """Return the ids of the cards that are seen, as they lie on the page."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.card')].filter((c) => c.offsetParent !== null)"
        ".map((c) => [c.getBoundingClientRect(), c.querySelector('.id').innerText])"
        ".sort((a, b) => a[0].top - b[0].top || a[0].left - b[0].left).map((c) => c[1])"
    )


def choose(browser, name: str, text: str) -> None:
    """Choose the one option of the select `name` whose text begins with `text`; isolates do not count."""
    from selenium.webdriver.support.ui import Select

    select = Select(browser.find_element("id", name))
    [option] = [o for o in select.options if plain(o).startswith(text)]
    select.select_by_value(option.get_attribute("value"))


def plain(element) -> str:
    return element.get_attribute("textContent").replace("\u2068", "").replace("\u2069", "")


def flip(browser) -> None:
    """Show all, or the flagged ones alone again."""
    browser.find_element("id", "flagged").click()


def count(browser) -> str:
    return browser.find_element("id", "count").text


def test_it_opens_with_the_flagged_ones_most_suspicious_first(browser):
    assert ids(browser) == ["img 10.png", EVIL, "img 9.png", "Ünïcode.png"]
    assert count(browser) == "4 of 9 shown"
    flip(browser)
    assert ids(browser)[:3] == ["a.png", "img 10.png", EVIL]
    assert count(browser) == "9 of 9 shown"


def test_markup_in_names_is_text(browser):
    card = browser.find_elements("css selector", ".card")[2]  # an alert that is open would be an error here
    assert card.find_element("css selector", ".id").text == EVIL
    assert card.find_element("css selector", ".suggested dd").text == "</script><b>"
    assert browser.find_elements("css selector", "b, .id img, img[onerror]") == []
    shown = "return [...document.images].filter((i) => i.offsetParent).map((i) => i.naturalWidth)"
    assert browser.execute_script(shown) == [20] * 4


def test_it_filters_by_pair_with_counts_most_frequent_first(browser):
    def pairs():
        options = browser.find_elements("css selector", "#pair option")
        return [plain(option) for option in options if option.get_attribute("disabled") is None]

    assert pairs() == ["all", "cat → dog (2)", "dog → </script><b> (1)", "dog → cat (1)"]
    choose(browser, "pair", "cat → dog")
    assert ids(browser) == ["img 10.png", "img 9.png"] and count(browser) == "2 of 9 shown"
    flip(browser)
    assert ids(browser) == ["a.png", "img 10.png", "img 9.png"]
    assert pairs()[:3] == ["all", "cat → dog (3)", "</script><b> → </script><b> (3)"]
    choose(browser, "pair", "</script><b> → </script><b>")
    assert ids(browser) == ["c.png", "d.png", "e.png"]
    flip(browser)  # this pair has no flagged one: all are chosen again
    assert count(browser) == "4 of 9 shown"


def test_it_sorts_and_searches_ids(browser):
    for by, first in [("by id", [EVIL, "img 9.png", "img 10.png"]), ("by labels", ["img 10.png", "img 9.png", EVIL]),
                      ("most suspicious", ["img 10.png", EVIL, "img 9.png"])]:  # fmt: skip
        choose(browser, "sort", by)
        assert ids(browser) == [*first, "Ünïcode.png"]  # 9 before 10
    search = browser.find_element("id", "search")
    # the last but one are the same letters, composed in another way
    for text, found in [("IMG", first), ("IMG 1", ["img 10.png"]), ("u\u0308nï", ["Ünïcode.png"]), (".*", [])]:
        search.clear()
        search.send_keys(text)
        assert ids(browser) == found and count(browser) == f"{len(found)} of 9 shown"
    assert browser.find_element("id", "nothing").is_displayed()


def test_links_open_the_original(browser):
    cards = browser.find_elements("css selector", ".card")[1:5]
    links = [(plain(card.find_element("css selector", ".id")), card.find_element("tag name", "a").get_attribute("href"))
             for card in cards]  # fmt: skip
    for name, link in links:
        browser.get(link)
        size = browser.execute_script("return [document.images[0].naturalWidth, document.images[0].naturalHeight]")
        assert size == [20, 30 + [image[0] for image in IMAGES].index(name)]


def test_everything_is_reached_by_keyboard(browser):
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(9):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        reached.append(active.get_attribute("id") or active.tag_name)
    assert reached == ["summary", "pair", "sort", "search", "flagged", "a", "a", "a", "a"]


CONTRAST = """
const parse = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = (c) => c.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (e) => { while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
  return parse(getComputedStyle(e).backgroundColor); };
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const texts = [...document.querySelectorAll("h1, p, li, summary, label, select, input, output, dt, dd, .id")];
const bars = [...document.querySelectorAll("dl div")];
return [Math.min(...texts.map((e) => ratio(parse(getComputedStyle(e).color), ground(e)))),
        Math.min(...bars.map((e) => ratio(parse(getComputedStyle(e).borderInlineStartColor), ground(e))))];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(browser, scheme):
    """4.5 for text, 3 for what is no text: WCAG 2.2, criteria 1.4.3 and 1.4.11."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    text, bar = browser.execute_script(CONTRAST)
    assert text >= 4.5 and bar >= 3
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_sticks_out_sideways(browser):
    for width in (320, 1280, 1920):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
