"""The demo: a person's way through the page in a real browser, what it gives back, and what it refuses."""

import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image, ImageDraw

pytest.importorskip("gradio")

from harmony import demo
from harmony.apps.demo import page
from harmony.apps.demo.engine import RELIGHT, Engine, Order, list_choices
from harmony.cli.compose import CONFIGS, compose
from harmony.cli.help import help_text
from harmony.core.errors import UserError
from harmony.pixels.images import read_image
from tests.browser import Browser

ROOT = Path(__file__).resolve().parents[2]
READY = "!!document.querySelector('#run') && !!document.querySelector('#photograph input[type=file]')"
PLACED = "!!document.querySelector('#placement .cut-out img[src^=data]')"
SEEN = "document.querySelector('#placement .photo').naturalWidth > 0"
DONE = "document.querySelectorAll('#result img').length >= 2 && !document.querySelector('#download').disabled"
TOAST = "document.querySelector('.toast-body')?.innerText ?? ''"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def engine():
    cfg = compose("demo", ["steps=2"])
    return Engine(cfg, list_choices(cfg), instantiate(cfg.model))


@pytest.fixture(scope="module")
def address(engine):
    with page.open_page(engine, "127.0.0.1", free_port(), 20) as address:
        yield address


def draw_photograph(width: int, height: int) -> Image.Image:
    """Noise on a slope with a red disc in its middle: any change of a pixel shows."""
    rng = np.random.default_rng(0)
    slope = np.linspace(60, 160, width)[None, :, None] + rng.integers(0, 40, (height, width, 3))
    image = Image.fromarray(slope.astype(np.uint8))
    x, y, r = width // 2, height // 2, height // 5
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=(220, 40, 40))
    return image


@pytest.fixture
def photograph(tmp_path, swapped_profile):
    """A PNG with a color profile of its own and a camera's name."""
    image, exif = draw_photograph(333, 217), Image.Exif()
    exif[0x0110] = "camera of the test"
    image.save(tmp_path / "photograph.png", icc_profile=swapped_profile, exif=exif)
    return tmp_path / "photograph.png"


@pytest.fixture
def cut_out(tmp_path):
    pixels = np.zeros((80, 60, 4), np.uint8)
    pixels[10:70, 10:50] = 30, 160, 60, 255
    Image.fromarray(pixels).save(tmp_path / "cut-out.png")
    return tmp_path / "cut-out.png"


def newest_hole() -> np.ndarray:
    """The hole of the last run, from the folder of its page."""
    files = Path(tempfile.gettempdir()).glob("harmony-demo-*/sessions/*/*/hole.png")
    return read_image(max(files, key=lambda path: path.stat().st_mtime))[..., 0] > 0


def download(browser: Browser, folder: Path) -> Image.Image:
    browser.download_to(folder)
    browser.click("#download")
    end = time.monotonic() + 60
    while not (files := [*folder.glob("*.png")]):
        assert time.monotonic() < end
        time.sleep(0.05)
    return Image.open(files[0])


def paint(browser: Browser) -> None:
    """Say that the object is in the photograph, and paint a stroke over its middle."""
    browser.read("document.querySelectorAll('#way input')[1].click()")
    browser.until("!!document.querySelector('#editor canvas')")
    time.sleep(1)  # the canvas takes its size after it appears, and nothing says when
    place = browser.locate("#editor canvas")
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    browser.drag(*((x + dx, y) for dx in range(-20, 21, 5)))


def test_a_painted_object_is_harmonized_and_all_else_stays(browser, address, photograph, swapped_profile, tmp_path):
    """Upload, paint, run, download: bit-exact outside the hole, profile and EXIF kept, and no foreign request."""
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", photograph)
    browser.until(SEEN)
    paint(browser)
    browser.click("#run")
    browser.until(DONE)
    with download(browser, tmp_path / "downloads") as file:
        picture, before, hole = np.array(file), read_image(photograph), newest_hole()
        assert file.format == "PNG" and file.info["icc_profile"] == swapped_profile
        assert file.getexif()[0x0110] == "camera of the test"
    assert picture.shape == before.shape == (*hole.shape, 3)
    assert np.array_equal(picture[~hole], before[~hole])
    assert hole[108, 166] and 0.005 < hole.mean() < 0.3 and (picture[hole] != before[hole]).mean() > 0.5
    foreign = [url for url in browser.requests() if not url.startswith((address, "data:", "blob:"))]
    assert not foreign
    sessions = next(Path(tempfile.gettempdir()).glob("harmony-demo-*/sessions"))
    browser.open("about:blank", "true")
    end = time.monotonic() + 30
    while [*sessions.iterdir()]:  # the folder of a page that was closed goes away
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_cut_out_is_dragged_and_scaled_to_its_place(browser, address, photograph, cut_out, tmp_path):
    """Guards the box: the object lies where it was dropped, as large as it was pulled; keys move it too."""
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", photograph)
    browser.until(SEEN)
    browser.upload("#cut-out input[type=file]", cut_out)
    browser.until(PLACED)
    photo, box = browser.locate("#placement .photo"), browser.locate("#placement .cut-out")
    scale = photo["width"] / 333
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    browser.drag((x, y), (x - 10 * scale, y - 5 * scale), (x - 80 * scale, y - 20 * scale))
    corner = browser.locate("#placement i[data-x='1'][data-y='0']")
    x, y = corner["x"] + corner["width"] / 2, corner["y"] + corner["height"] / 2
    browser.drag((x, y), (x - 20 * scale, y + 30 * scale))
    photo, box = browser.locate("#placement .photo"), browser.locate("#placement .cut-out")
    left, right = ((v - photo["x"]) / scale for v in (box["x"], box["x"] + box["width"]))
    bottom = (box["y"] + box["height"] - photo["y"]) / scale
    browser.click("#run")
    browser.until(DONE)
    with download(browser, tmp_path / "downloads") as file:
        picture, before, hole = np.array(file), read_image(photograph), newest_hole()
    assert np.array_equal(picture[~hole], before[~hole])
    green = (picture[..., 1].astype(int) - picture[..., 0] > 40) & hole
    columns, rows = np.flatnonzero(green.any(axis=0)), np.flatnonzero(green.any(axis=1))
    assert abs(columns[0] - left) <= 2 and abs(columns[-1] + 1 - right) <= 2 and abs(rows[-1] + 1 - bottom) <= 2


def test_two_people_at_once_get_each_their_own(browser, address, engine, photograph, cut_out, tmp_path, monkeypatch):
    """Guards the device: the second run waits until the first has ended, and each page shows its own result."""
    (tmp_path / "second").mkdir()
    second, go, running, most = Browser(tmp_path / "second"), threading.Event(), [], []
    original = engine.run

    def run(*args):
        running.append(args)
        most.append(len(running))
        assert go.wait(60)
        outcome = original(*args)
        running.pop()
        return outcome

    monkeypatch.setattr(engine, "run", run)
    other = tmp_path / "other.png"
    draw_photograph(200, 150).save(other)
    for tab, file in ((browser, photograph), (second, other)):
        tab.open(address, READY)
        tab.upload("#photograph input[type=file]", file)
        tab.until(SEEN)
        tab.upload("#cut-out input[type=file]", cut_out)
        tab.until(PLACED)
        tab.click("#run")
        tab.until("!!document.querySelector('#result .progress-text')")
    second.until("/queue: \\d/.test(document.querySelector('#result').innerText)")
    assert most == [1]
    go.set()
    for tab, file, name in ((browser, photograph, "a"), (second, other, "b")):
        tab.until(DONE)
        with download(tab, tmp_path / name) as picture, Image.open(file) as before:
            assert picture.size == before.size
    assert most == [1, 1]
    second.close()


def test_steps_are_counted(engine, photograph, cut_out, tmp_path):
    """Guards the progress bar: each step of the sampler counts once, also where the number is known only at the end."""
    steps, pictures = [], {"background": str(photograph), "foreground": str(cut_out), "box": [50, 50, 130, 170]}
    for choice in engine.choices:
        words = {"prompts": "a box: sunset light -> night light"} if choice == "zero_shot" else {}
        engine.run(Order(choice, pictures | words, steps=3), tmp_path / choice, lambda *step: steps.append(step))
    relit, kept = [(1, 1)], [(1, 1)]
    assert steps[:5] == [*relit, *kept, (1, 3), (2, 3), (3, 3)]
    assert steps[5:] and {total for _, total in steps[5:]} == {None}


def test_what_the_networks_do_not_fit_is_not_offered(random_backbone, capsys):
    """Guards other backbones: the shipped networks are left out with a line each, what works stays."""
    cfg = compose("demo", [f"model.path={random_backbone}", "evaluator=null"])
    engine = Engine(cfg, list_choices(cfg), instantiate(cfg.model))
    assert [*engine.choices] == ["zero_shot"]
    assert capsys.readouterr().out.count(" left out: ") == 3
    only = {name: choice for name, choice in list_choices(cfg).items() if name != "zero_shot"}
    with pytest.raises(UserError, match="no method fits backbone"):
        Engine(cfg, only, engine.backbone)


def test_choices_follow_the_command(engine):
    """A ControlNet of one's own stands first, a strength of structure is there where a net for it is given."""
    choices = list_choices(compose("demo", [f"controlnet={ROOT}/harmony/assets/color", "structure=color"]))
    assert [choice.title for choice in choices.values()][:2] == ["ControlNet color", engine.choices[RELIGHT].title]
    assert choices[RELIGHT].has_structure and not engine.choices[RELIGHT].has_structure
    assert page.list_settings(engine, RELIGHT) == [True, False, True, False]
    assert page.list_settings(engine, "zero_shot") == [False, False, False, True]
    assert [*list_choices(compose("demo", ["controlnet=null"]))][0] == "inpainting"
    with pytest.raises(UserError, match="there is no ControlNet none_such"):
        list_choices(compose("demo", ["controlnet=none_such"]))


def test_a_method_is_built_once(engine, photograph, cut_out, tmp_path):
    pictures = {"background": str(photograph), "foreground": str(cut_out), "box": None}
    engine.run(Order("color", pictures, color=0.5), tmp_path, lambda *step: None)
    builds = engine.build.cache_info().misses
    outcome = engine.run(Order("color", pictures, color=0.5, seed=3), tmp_path, lambda *step: None)
    assert engine.build.cache_info().misses == builds
    assert "color (weight 0.5)" in outcome.lines[0] and [*outcome.baselines] == BASELINES


BASELINES = ["Copy and paste", "Harmony", "Reinhard", "Poisson"]
ORDERED = [page.PLACE, None, None, "", None, None, "color_relight", 1, 1, 2, 0, True, "", ""]


def order(**changes) -> list:
    names = ("way", "photograph", "cut_out", "box", "editor", "reference", "choice")
    return [changes.get(name, value) for name, value in zip(names, ORDERED[:7], strict=True)] + ORDERED[7:]


def painted(value: int, height: int = 217, width: int = 333) -> dict:
    return {"background": None, "layers": [np.full((height, width, 4), value, np.uint8)], "composite": None}


@pytest.fixture
def desk(engine, tmp_path):
    return page.Desk(engine, page.Sessions(tmp_path / "sessions"), [])


def refuse(call, *args) -> str:
    """The one sentence that the page shows, with nothing for the terminal."""
    with pytest.raises(page.gr.Error) as refusal:
        call(*args)
    assert not refusal.value.print_exception and "\n" not in refusal.value.message
    return refusal.value.message


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, "there is no photograph yet: upload one first"),
        ({"photograph": "p"}, "there is no cut-out yet: upload one, or choose to paint over the object"),
        ({"photograph": "p", "way": page.PAINT}, "nothing is painted: paint over the object first"),
        ({"photograph": "p", "way": page.PAINT, "editor": painted(0)}, "nothing is painted: paint over"),
        ({"photograph": "p", "way": page.PAINT, "editor": painted(255)}, "the object covers the whole picture"),
        ({"photograph": "p", "cut_out": "p"}, "photograph.png has no transparent background"),
        ({"photograph": "p", "cut_out": "c", "box": "9000,9000,9001,9001"}, "shows nothing of the object"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(desk, photograph, cut_out, changes, sentence):
    """Guards people who know no option: one sentence, no path of this machine, nothing left behind."""
    files = {"p": str(photograph), "c": str(cut_out)}
    changes = {name: files.get(v, v) if isinstance(v, str) else v for name, v in changes.items()}
    request = type("Request", (), {"session_hash": "tab"})()
    message = refuse(desk.run, *order(**changes), request)
    assert sentence in message and str(photograph.parent) not in message
    assert not [*(desk.sessions.root / "tab").iterdir()]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("words.png", b"no picture", "photo words.png cannot be decoded (it is none of"),
        ("cut.png", None, "cut.png cannot be decoded"),
        ("empty.jpg", b"", "empty.jpg cannot be decoded"),
    ],
)
def test_an_upload_that_is_no_picture_is_one_sentence(photograph, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(photograph.read_bytes()[:9000] if content is None else content)
    message = refuse(page.say_plainly(page.make_views), str(tmp_path / name), None)
    assert sentence.removeprefix("photo ") in message and str(tmp_path) not in message


@pytest.mark.parametrize("kind", ["16-bit", "heic"])
def test_other_kinds_of_photographs_are_taken(desk, cut_out, tmp_path, kind):
    """16 bits a channel become 8, with a line; a telephone's HEIC is read where pillow-heif is installed."""
    path, image = tmp_path / f"{kind}.{'heic' if kind == 'heic' else 'png'}", draw_photograph(120, 100)
    if kind == "heic":
        pytest.importorskip("pillow_heif").from_pillow(image).save(path)
    else:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    placement, editor = page.make_views(str(path), str(cut_out))
    assert placement["photo"].startswith("data:image/png") and editor["background"].shape == (427, 512, 3)
    request = type("Request", (), {"session_hash": "tab"})()
    lines = desk.run(*order(photograph=str(path), cut_out=str(cut_out), box=placement["value"]), request)[-1]
    assert (f"{path.name}: more than 8 bits a channel" in lines) == (kind == "16-bit")
    assert str(tmp_path) not in lines


def test_a_bad_upload_shows_its_sentence_on_the_page(browser, address, tmp_path, capfd):
    """Guards the terminal too: no traceback there."""
    (tmp_path / "a word <i>.png").write_bytes(b"no picture")
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", tmp_path / "a word <i>.png")
    browser.until(f"({TOAST}).includes('cannot be decoded (it is none of')")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_example_fills_the_page(browser, address, tmp_path, monkeypatch):
    """The second example lies where its object was rendered: one click, then a result beside all three baselines.

    Also from a folder that does not hold the package, where Gradio serves none of its files.
    """
    monkeypatch.chdir(tmp_path)
    browser.open(address, READY)
    browser.read("document.querySelectorAll('#examples button')[1].click()")
    browser.until(PLACED)
    browser.click("#run")
    browser.until(DONE)
    assert 0.02 < newest_hole().mean() < 0.5
    assert browser.read("document.querySelectorAll('#baselines figure').length") == 4


@pytest.mark.slow
def test_twelve_megapixels(browser, address, cut_out, tmp_path):
    """A photograph of 12 megapixels is placed on, run and downloaded, bit-exact outside the hole."""
    draw_photograph(4000, 3000).save(tmp_path / "large.png", compress_level=1)
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", tmp_path / "large.png")
    browser.until(SEEN)
    browser.upload("#cut-out input[type=file]", cut_out)
    browser.until(PLACED)
    browser.click("#run")
    browser.until(DONE)
    with download(browser, tmp_path / "downloads") as file:
        picture, before, hole = np.array(file), read_image(tmp_path / "large.png"), newest_hole()
    assert picture.shape == (3000, 4000, 3) and np.array_equal(picture[~hole], before[~hole]) and hole.any()


def test_ctrl_c_ends_the_command_and_removes_all(tmp_path):
    port, environment = free_port(), {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    words = [sys.executable, "-m", "harmony.demo", f"port={port}"]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == f"http://127.0.0.1:{port}/\n":
                break
        assert [*tmp_path.glob("harmony-demo-*")]
        with pytest.raises(UserError, match=f"nothing can listen at host=127.0.0.1 port={port}"):
            page.check_address("127.0.0.1", port)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert not [*tmp_path.glob("harmony-demo-*")]


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; sys.argv = ['demo']; from harmony.demo import main; main()"
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    (gradio,) = re.findall("gradio>.*", (ROOT / "setup.cfg").read_text())
    line = f"harmony: error: the demo needs gradio: make demo in a clone, or pip install '{gradio}'\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


def test_help_keeps_its_lines():
    """Guards the examples of a command, one a line, which were run together."""
    lines = help_text(demo.main, "demo", CONFIGS).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and "=" in line.split()[0]][:3] == [
        "host=0.0.0.0",
        "controlnet=RUN",
        "model=sd2",
    ]
    assert max(map(len, lines)) <= 100
