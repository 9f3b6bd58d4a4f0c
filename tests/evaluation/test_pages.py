"""The page of a run: it holds everything, stays small, takes any name as text, and works in a real browser."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from harmony.evaluation import pages
from harmony.evaluation.pages import PageRow, by_row, data_uri, read_grids, split_text, write_page
from harmony.pixels.images import write_image

EVIL = "</script><img src=x onerror=\"document.title='broken'\"> & REPORT_AS_JSON"
TEXT = f"| method | test/fpsnr |\n|---|---|\n| {EVIL} | 20.1 ±0.2 |\n| ours | 21.5 |\n\nn = 96 pictures\n{EVIL}\n"


def decode(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def flat(value: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def rows() -> list:
    """Three pictures with four columns, each of one gray."""
    columns = {"input": 0, EVIL: 60, "ours": 120, "truth": 180}
    pictures = {title: [flat(value + n) for n in range(3)] for title, value in columns.items()}
    return by_row(["first", EVIL, "third"], ["a car", "", ""], pictures)


@pytest.fixture
def page(rows, tmp_path):
    return write_page(tmp_path, "table1 now", TEXT, f"name: table1\nprompt: {EVIL}\n", rows, 96)


def test_a_small_picture_keeps_its_pixels_and_a_large_one_is_shrunk():
    """Guards what is looked at: 64 px are exact, a photograph has 1024 px and stays the same to a gray value or two."""
    small = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(decode(data_uri(small)), small)
    large = decode(data_uri(flat(90, 1000, 3000)))
    assert large.shape == (341, 1024, 3) and abs(large.astype(int) - 90).max() <= 2
    assert data_uri(flat(90, 200, 200)).startswith("data:image/jpeg;base64,")
    assert decode(data_uri(flat(90, 1, 9000))).shape == (1, 1024, 3)


def test_the_page_stays_below_its_limit(tmp_path, monkeypatch):
    """Guards phones: the largest pictures are left out, at least one stays, and the page says how many of how many."""
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    rows = [PageRow(name, {"a": y}, name) for name, y in {"small": flat(0), "large": noise, "tiny": flat(9)}.items()]
    monkeypatch.setattr(pages, "LIMIT", 2000)
    assert [row["name"] for row in pages.encode_rows(rows)] == ["small", "tiny"]
    assert [row["name"] for row in pages.encode_rows(rows[1:2])] == ["large"]
    text = write_page(tmp_path, "t", "", "", iter(rows), 7).read_text()
    assert '"count": 7' in text and '"large"' not in text


def test_tables_and_notes_are_told_apart():
    """Golden: two tables with an empty cell, between and behind them notes."""
    text = "| m | a | b |\n|---|---|---|\n| x |  | 1 |\n\n| n |\n|---|\n| y |\nn = 2\n\n(end)\n"
    assert split_text(text) == [[["m", "a", "b"], ["x", "", "1"]], [["n"], ["y"]], "n = 2", "(end)"]
    assert split_text("") == []


def test_grids_are_shown_by_step(tmp_path):
    """Guards trainings that measure themselves: some steps of each grid, the first and the last among them."""
    for step in range(20):
        write_image(tmp_path / f"text_samples_{step:06d}.png", flat(step))
    write_image(tmp_path / "vae_000003.png", flat(3))
    (tmp_path / "captions_000003.txt").write_text("a car")
    (name, steps, _), other = read_grids(tmp_path)
    assert name == "text_samples" and len(steps) == 8 and list(steps)[::7] == ["step 000000", "step 000019"]
    assert steps["step 000019"][0, 0, 0] == 19 and (other[0], *other[1]) == ("vae", "step 000003")
    assert read_grids(tmp_path / "nothing") == []


def test_the_page_needs_nothing_and_breaks_at_no_name(page):
    """Guards privacy and foreign names: one file without an address, nothing ends its script."""
    text = page.read_text()
    assert not any(word in text for word in ("http://", "https://", "import ", "<img src=x"))
    assert text.count("</script>") == 2 and text.count("data:image/webp;base64,") == 12
    content = text.partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(content)["rows"][1]["name"] == EVIL


def test_the_page_in_a_browser(browser, page):
    """Guards the page by keys, mouse and touch, on a desk and on a phone; nothing is fetched and nothing fails."""
    browser.open(page, "document.querySelectorAll('.strip').length == 3 && at('right').naturalWidth > 0")

    def shown() -> tuple:
        assert browser.read("at('left').src == sourceOf(left) && at('right').src == sourceOf(right)")
        return tuple(browser.read("[row, at('left').alt, at('right').alt]"))

    assert (
        browser.read("document.title") == "table1 now" and browser.read("at('count').textContent") == "3 of 96 pictures"
    )
    assert shown() == (0, "input", "ours"), "what was made, not the truth, is looked at first"
    table = (
        "[...document.querySelectorAll('#figures tr')].map(line => [...line.children].map(cell => cell.textContent))"
    )
    assert browser.read(table) == [["method", "test/fpsnr"], [EVIL, "20.1 ±0.2"], ["ours", "21.5"]]
    notes = browser.read("[...document.querySelectorAll('#figures p')].map(p => p.textContent)")
    assert notes == ["n = 96 pictures", EVIL]
    assert browser.read("at('config').textContent") == f"name: table1\nprompt: {EVIL}\n"
    wanted = [
        ("ArrowRight", (1, "input", "ours")), ("ArrowDown", (1, "input", "truth")),
        ("ArrowDown", (1, "input", "input")), ("ArrowUp", (1, "input", "truth")), ("2", (1, "input", EVIL)),
        ("ArrowLeft", (0, "input", EVIL)), ("ArrowLeft", (2, "input", EVIL)),
    ]  # fmt: skip
    for key, state in wanted:
        browser.press(key)
        assert shown() == state, key
    assert browser.read("at('name').textContent") == "3 of 3: third"
    browser.press("f")
    assert browser.read("split") == 100
    browser.press("f")
    assert browser.read("split") == 0
    browser.read("at('divider').focus()")
    browser.press("ArrowRight")
    assert browser.read("split") == 2 and shown()[0] == 2, "the divider, where it has the focus"
    browser.read("document.activeElement.blur()")

    box = browser.read("(({ x, y, width, height }) => ({ x, y, width, height }))(at('stage').getBoundingClientRect())")
    assert box["width"] == pytest.approx(1.5 * box["height"], rel=0.02) and box["width"] >= 448
    point = {"x": box["x"] + box["width"] / 4, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
    for kind, more in (
        ("mousePressed", {}),
        ("mouseMoved", {"x": box["x"] + 0.75 * box["width"]}),
        ("mouseReleased", {}),
    ):
        browser.call("Input.dispatchMouseEvent", **point | {"type": kind} | more)
        assert browser.read("split") == pytest.approx(75 if kind != "mousePressed" else 25, abs=1)
    browser.read("document.querySelectorAll('.strip')[1].querySelectorAll('button')[3].click()")
    assert shown() == (1, "input", "truth")

    browser.size(360, 640, mobile=True)
    assert browser.read("document.documentElement.scrollWidth") <= 360, "a phone scrolls downwards alone"
    browser.read("at('stage').scrollIntoView()")
    box = browser.read("(({ x, y, width, height }) => ({ x, y, width, height }))(at('stage').getBoundingClientRect())")
    assert 300 < box["width"] <= 360
    spots = [{"x": box["x"] + share * box["width"], "y": box["y"] + 20} for share in (0.3, 0.5, 0.6)]
    for kind, points in (
        ("touchStart", spots[:1]),
        ("touchMove", spots[1:2]),
        ("touchMove", spots[2:]),
        ("touchEnd", []),
    ):
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert browser.read("split") == pytest.approx(60, abs=2)
    for scheme, bright in (("dark", False), ("light", True)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", features=features)
        ground = browser.read("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
        assert ground == bright

    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in requests} <= {"file", "data"} and browser.read(
        "document.title"
    ) == "table1 now"
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]


def test_a_page_without_pictures(browser, tmp_path):
    """Guards a training of words: figures and configuration alone, and keys that find nothing do nothing."""
    browser.open(write_page(tmp_path, "clip now", TEXT, "name: clip\n", [], 0), "at('count').textContent != ''")
    browser.press("ArrowRight")
    browser.press("2")
    assert browser.read("at('count').textContent") == "no pictures" and browser.read("at('viewer').hidden")
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
