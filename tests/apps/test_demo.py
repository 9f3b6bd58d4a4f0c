"""The demo: a person's way through the page in a real browser, what it gives back, and what it refuses."""

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import httpx
import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image, ImageDraw

pytest.importorskip("gradio")

from harmony import demo
from harmony.apps.demo import page
from harmony.apps.demo.engine import OPTION, RELIGHT, Engine, Job, list_choices, reword
from harmony.cli.compose import CONFIGS, compose
from harmony.cli.help import help_text
from harmony.core.errors import UserError
from harmony.pixels.images import read_image
from tests.browser import Browser

ROOT = Path(__file__).resolve().parents[2]
READY = "!!document.querySelector('#run') && !!document.querySelector('#photograph input[type=file]')"
PLACED = "!!document.querySelector('#placement .cut-out img[src^=data]')"
PICTURED = "document.querySelector('#placement .photo').naturalWidth > 0"
DONE = "document.querySelectorAll('#result img').length >= 2 && !document.querySelector('#download').disabled"
IN_VIEW = "(r => r.top >= 0 && r.bottom <= innerHeight + 1)(document.querySelector('#result').getBoundingClientRect())"
EMPTY = "document.querySelectorAll('#result img').length == 0 && document.querySelector('#download').disabled"
EMPTY += " && document.querySelectorAll('#baselines figure').length == 0"
TOAST = "document.querySelector('.toast-body')?.innerText ?? ''"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Recorder(Engine):
    """Keeps the hole of each run, whose folder is removed."""

    def run(self, job, folder, advance):
        result = super().run(job, folder, advance)
        self.hole = read_image(folder / "hole.png")[..., 0] > 0
        return result


@pytest.fixture(scope="module")
def engine():
    cfg = compose("demo", ["steps=2"])
    return Recorder(cfg, list_choices(cfg), instantiate(cfg.model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the demo takes for the system's temporary one."""
    return tmp_path_factory.mktemp("system")


@pytest.fixture(scope="module")
def address(engine, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("GRADIO_TEMP_DIR", "")  # what the demo sets is undone
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


def test_a_painted_object_is_harmonized_and_all_else_stays(
    browser, address, engine, folder, photograph, swapped_profile, tmp_path
):  # fmt: skip
    """Upload, paint, run, download: bit-exact outside the hole, profile and EXIF kept, and no foreign request."""
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", photograph)
    browser.until(PICTURED)
    paint(browser)
    for number in (0, 1):  # the paint stays where it is while its editor is away
        browser.read(f"document.querySelectorAll('#way input')[{number}].click()")
        time.sleep(0.3)
    browser.click("#run")
    browser.until(DONE)
    with download(browser, tmp_path / "downloads") as file:
        picture, before, hole = np.array(file), read_image(photograph), engine.hole
        assert file.format == "PNG" and file.info["icc_profile"] == swapped_profile
        assert file.getexif()[0x0110] == "camera of the test"
    assert picture.shape == before.shape == (*hole.shape, 3)
    assert np.array_equal(picture[~hole], before[~hole])
    assert hole[108, 166] and 0.005 < hole.mean() < 0.3 and (picture[hole] != before[hole]).mean() > 0.5
    foreign = [url for url in browser.requests() if not url.startswith((address, "data:", "blob:"))]
    assert not foreign
    assert [*folder.glob("harmony-demo-*/uploads")] and not [*folder.glob("harmony-demo-*/run-*")]


def test_a_cut_out_is_dragged_and_scaled_to_its_place(browser, address, engine, photograph, cut_out, tmp_path):
    """Guards the box: the object lies where it was dropped, as large as it was pulled; keys move it too."""
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", photograph)
    browser.until(PICTURED)
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
        picture, before, hole = np.array(file), read_image(photograph), engine.hole
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
    second.size(390, 844, mobile=True)
    for tab, file in ((browser, photograph), (second, other)):
        tab.open(address, READY)
        tab.upload("#photograph input[type=file]", file)
        tab.until(PICTURED)
        tab.upload("#cut-out input[type=file]", cut_out)
        tab.until(PLACED)
        tab.click("#run")
        tab.until("!!document.querySelector('#result .progress-text')")
        tab.until(IN_VIEW)
        tab.read("scrollTo(0, 9999)")
        tab.until(IN_VIEW)
    second.until("/queue: \\d/.test(document.querySelector('#result').innerText)")
    assert most == [1]
    go.set()
    for tab, file, name in ((browser, photograph, "a"), (second, other, "b")):
        tab.until(DONE)
        with download(tab, tmp_path / name) as picture, Image.open(file) as before:
            assert picture.size == before.size
    assert most == [1, 1]
    browser.read("document.querySelector('#photograph button[aria-label=Clear]').click()")
    browser.until(EMPTY)  # results of a photograph that was taken away
    second.read("document.querySelectorAll('#examples button')[1].click()")
    second.until(EMPTY)  # and of one that was replaced
    second.close()


def test_a_run_is_stopped(browser, address, engine, photograph, cut_out, monkeypatch):
    """Guards the button: the page waits no more, and the run ends at its next step."""
    ends = []

    def run(job, folder, advance):
        try:
            while True:
                advance(1, 2)
                time.sleep(0.02)
        except UserError as error:
            ends.append(str(error))
            raise

    monkeypatch.setattr(engine, "run", run)
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", photograph)
    browser.until(PICTURED)
    browser.upload("#cut-out input[type=file]", cut_out)
    browser.until(PLACED)
    browser.click("#run")
    browser.until("/step 1/.test(document.querySelector('#result').innerText)")
    browser.click("#stop")
    browser.until("!/step 1/.test(document.querySelector('#result').innerText)")
    end = time.monotonic() + 10
    while not ends:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ends == ["the run was stopped"]


def test_steps_are_counted(engine, photograph, cut_out, tmp_path):
    """Guards the progress bar: each step of the sampler counts once, also where the number is known only at the end."""
    steps, pictures = [], {"background": str(photograph), "foreground": str(cut_out), "box": [50, 50, 130, 170]}
    for choice in engine.choices:
        words = "a box: sunset light -> night light" if choice == "zero_shot" else ""
        engine.run(Job(choice, pictures, steps=3, words=words), tmp_path / choice, lambda *step: steps.append(step))
    start, relit, kept = (0, None), [(1, 1)], [(1, 1)]
    assert steps[:8] == [start, *relit, start, *kept, start, (1, 3), (2, 3), (3, 3)]
    assert len(steps) > 9 and {total for _, total in steps[8:]} == {None}


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
    assert [choice.title for choice in choices.values()][:2] == ["Network color", engine.choices[RELIGHT].title]
    assert choices[RELIGHT].has_structure and not engine.choices[RELIGHT].has_structure
    assert page.list_settings(engine, RELIGHT) == [True, False, True, False]
    assert page.list_settings(engine, "zero_shot") == [False, False, False, True]
    assert [*list_choices(compose("demo", ["controlnet=null"]))][0] == "inpainting"
    with pytest.raises(UserError, match="there is no ControlNet none_such"):
        list_choices(compose("demo", ["controlnet=none_such"]))


def test_a_method_is_built_once(engine, photograph, cut_out, tmp_path):
    pictures = {"background": str(photograph), "foreground": str(cut_out), "box": None}
    engine.run(Job("color", pictures, color=0.5), tmp_path, lambda *step: None)
    builds = engine.build.cache_info().misses
    outcome = engine.run(Job("color", pictures, color=0.5, seed=3), tmp_path, lambda *step: None)
    assert engine.build.cache_info().misses == builds
    assert "strength of color 0.5, 1 step, seed 3" in outcome.lines[0] and [*outcome.baselines] == BASELINES


BASELINES = ["Copy and paste", "Harmony", "Reinhard", "Poisson"]
VALUES = {
    "way": page.PLACE, "photograph": None, "cut_out": None, "box": "", "editor": None, "reference": None,
    "choice": RELIGHT, "color": 1, "structure": 1, "steps": 2, "seed": 0, "shadow": True, "prompt": "", "words": "",
}  # fmt: skip


def fill_form(**changes) -> list:
    """The values of the page's components, in order."""
    return [*(VALUES | changes).values()]


def paint_all(value: int, height: int = 217, width: int = 333) -> dict:
    return {"background": None, "layers": [np.full((height, width, 4), value, np.uint8)], "composite": None}


@pytest.fixture
def handlers(engine, tmp_path):
    return page.Handlers(engine, tmp_path, [])


def refuse(call, *args) -> str:
    """The one sentence that the page shows, with nothing for the terminal."""
    with pytest.raises(page.gr.Error) as refusal:
        call(*args)
    assert not refusal.value.print_exception and "\n" not in refusal.value.message
    assert not re.search(OPTION, refusal.value.message)
    return refusal.value.message


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, "there is no photograph yet: upload one first"),
        ({"photograph": "p"}, "there is no cut-out yet: upload one, or choose to paint over the object"),
        ({"photograph": "p", "way": page.PAINT}, "nothing is painted: paint over the object first"),
        ({"photograph": "p", "way": page.PAINT, "editor": paint_all(0)}, "nothing is painted: paint over"),
        ({"photograph": "p", "way": page.PAINT, "editor": paint_all(255)}, "the object covers the whole picture"),
        ({"photograph": "p", "cut_out": "p", "box": "1,1,9,9"}, "the cut-out has no transparent background: save"),
        ({"photograph": "p", "cut_out": "c", "box": "1,1,nan,9"}, "the cut-out has no place on the photograph"),
        ({"photograph": "p", "cut_out": "c", "box": [1, 1, 9, 9]}, "the cut-out has no place on the photograph"),
        ({"photograph": "p", "cut_out": "c", "box": "9,9,1,1"}, "the object has no size: make it larger"),
        ({"photograph": "p", "cut_out": "c", "box": "9,9,9999,9999"}, "the object is far larger than the photograph"),
        ({"choice": "none_such"}, "there is no such method: load the page again"),
        ({"seed": -5}, "the seed must be a number from 0 to 4294967295"),
        ({"steps": 0}, "the number of steps must be a number from 1 to 100"),
        ({"color": "much"}, "the strength of color must be a number from 0 to 2"),
        ({"structure": float("nan")}, "the strength of structure must be a number from 0 to 2"),
        ({"prompt": "x" * 501}, "what the finished picture shows must have at most 500 characters"),
        ({"words": "x" * 501, "choice": "zero_shot"}, "words for both lights must have at most 500 characters"),
        (
            {"photograph": "p", "cut_out": "c", "box": "9000,9000,9001,9001"},
            "nothing of the object lies on the photograph: drag it there",
        ),
    ],
)
def test_what_cannot_be_run_is_one_sentence(handlers, photograph, cut_out, changes, sentence):
    """Guards people who know no option: one sentence, no path of this machine, nothing left behind."""
    files = {"p": str(photograph), "c": str(cut_out)}
    changes = {name: files.get(v, v) if isinstance(v, str) else v for name, v in changes.items()}
    request = type("Request", (), {"session_hash": "tab"})()
    message = refuse(handlers.run, *fill_form(**changes), request)
    assert sentence in message and str(photograph.parent) not in message
    assert not [*handlers.root.glob("run-*")]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("words.png", b"no picture", "photo words.png cannot be decoded (it is none of"),
        ("cut.png", None, "cut.png cannot be decoded"),
        ("empty.jpg", b"", "empty.jpg cannot be decoded"),
    ],
)
def test_an_upload_that_is_no_picture_is_one_sentence(handlers, photograph, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(photograph.read_bytes()[:9000] if content is None else content)
    message = refuse(handlers.make_views, str(tmp_path / name), None)
    assert sentence.removeprefix("photo ") in message and str(tmp_path) not in message


def test_a_huge_picture_is_refused_before_it_is_decoded(handlers, photograph, tmp_path, recwarn):
    """Guards memory; Pillow's own warning and error become the same sentence."""
    for width in (7100, 9600, 14000):
        Image.new("1", (width, width)).save(tmp_path / "huge.png")
        for files in ((str(tmp_path / "huge.png"), None), (str(photograph), str(tmp_path / "huge.png"))):
            sentence = "huge.png has more than 50 megapixels: make it smaller first"
            assert refuse(handlers.make_views, *files) == sentence
    assert not recwarn.list


@pytest.mark.parametrize(
    "message, sentence",
    [
        ("the object is too small: 3.0 px thick at the backbone's 64 px; enlarge it", "the object is too small: make"),
        ("the prompt is empty, add prompt=...: no captioner", "nothing says what the finished picture shows"),
        ("no light can be named: it is left as it is, or give prompts=", "no light can be named: it is left as it is"),
        ("no round is better: it is left (evaluator=null: the last round)", "no round is better: it is left"),
        ("prompts='x': write OBJECT", "this picture cannot be used here"),
        ("3.20 s: UNet 90 %, the rest 10 %", "3.20 s: UNet 90 %, the rest 10 %"),
        ("prompt 'a = b'", "prompt 'a = b'"),
    ],
)
def test_the_page_has_no_words_of_the_command_line(message, sentence):
    assert reword(message).startswith(sentence) and not re.search(OPTION, reword(message))


@pytest.mark.parametrize("kind", ["16-bit", "heic"])
def test_other_kinds_of_photographs_are_taken(handlers, cut_out, tmp_path, kind):
    """16 bits a channel become 8, with a line; a telephone's HEIC is read where pillow-heif is installed."""
    path, image = tmp_path / f"{kind}.{'heic' if kind == 'heic' else 'png'}", draw_photograph(120, 100)
    if kind == "heic":
        pytest.importorskip("pillow_heif").from_pillow(image).save(path)
    else:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    placement, editor, hint = handlers.make_views(str(path), str(cut_out))
    assert hint["visible"]
    assert placement["photo"].startswith("data:image/png") and editor["background"].shape == (427, 512, 3)
    request = type("Request", (), {"session_hash": "tab"})()
    lines = handlers.run(*fill_form(photograph=str(path), cut_out=str(cut_out), box=placement["value"]), request)[-1]
    assert (f"{path.name}: more than 8 bits a channel" in lines) == (kind == "16-bit")
    assert str(tmp_path) not in lines and not re.search(OPTION, lines)


def join(address: str, data: list, session: str, trigger: str = "Harmonize", **headers) -> httpx.Response:
    """Ask for what a button does, as a program of anybody can."""
    config = httpx.get(f"{address}config").json()
    (button,) = (c["id"] for c in config["components"] if c["props"].get("value") == trigger)
    (number,) = (d["id"] for d in config["dependencies"] if [button, "click"] in d["targets"] and d["inputs"])
    body = {"data": data, "fn_index": number, "session_hash": session}
    return httpx.post(f"{address}gradio_api/queue/join", json=body, headers=headers)


def read_answer(address: str, session: str) -> dict:
    """What the server says at the end of an event."""
    with httpx.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": session}, timeout=60) as stream:
        for line in filter(None, stream.iter_lines()):
            message = json.loads(line.removeprefix("data: "))
            if message["msg"] in ("process_completed", "unexpected_error"):
                return message


@pytest.mark.parametrize("file", [None, "secret"])
def test_what_a_client_calls_itself_is_no_path(address, engine, tmp_path, file, capfd):
    """Guards all files of this machine: neither the name of a session nor a file that was not uploaded is one."""
    victim, secret = tmp_path / "victim", tmp_path / "secret.png"
    victim.mkdir()
    (victim / "letter.txt").write_text("dear")
    draw_photograph(64, 64).save(secret)
    upload = file and {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    values = fill_form(photograph=upload, cut_out=upload, box="1,1,9,9")
    assert join(address, values, str(victim)).status_code == 200
    assert not read_answer(address, str(victim))["success"]
    assert "Traceback" not in "".join(capfd.readouterr())
    assert [file.name for file in victim.iterdir()] == ["letter.txt"]


def test_a_page_of_another_name_is_refused(address):
    """Guards against DNS rebinding: a foreign page whose name leads to this machine reads nothing of ours."""
    assert httpx.get(address, headers={"Host": "evil.example:80"}).status_code == 400
    assert join(address, [], "tab", Host="evil.example").status_code == 400
    port = address.rsplit(":", 1)[1].strip("/")
    assert httpx.get(address, headers={"Host": f"localhost:{port}"}).status_code == 200


def test_words_are_never_a_file(handlers, photograph, cut_out, tmp_path):
    """Guards the files of this machine: words that end as the name of a JSON file does are words."""
    (tmp_path / "words.json").write_text('[{"object": "a box", "foreground": "dawn", "background": "secret light"}]')
    files = {"photograph": str(photograph), "cut_out": str(cut_out), "box": "50,50,130,170", "choice": "zero_shot"}
    values = fill_form(**files, words=str(tmp_path / "words.json"))
    message = refuse(handlers.run, *values, type("Request", (), {"session_hash": "tab"})())
    assert message.startswith("words for both lights are written as in: a red car") and "secret" not in message


def test_only_uploads_are_read(handlers, photograph):
    """Guards the files of this machine a second time, beside Gradio's own check."""
    for value in ("/etc/passwd", f"{handlers.root}/../passwd"):
        assert refuse(handlers.make_views, value, None) == "this file was not uploaded: upload the picture again"
        assert refuse(handlers.make_views, str(photograph), value).startswith("this file was not uploaded")


def test_a_run_ends_when_its_page_is_closed(handlers, photograph, cut_out):
    """Guards the others, who wait: no further step, nothing left behind; the page may come back and run again."""
    request, steps = type("Request", (), {"session_hash": "tab"})(), []

    def close_page(*step, **options):
        steps.append(step)
        handlers.stop(request)

    files = {
        "photograph": str(photograph),
        "cut_out": str(cut_out),
        "box": "50,50,130,170",
        "choice": "paint_by_example",
    }
    assert refuse(handlers.run, *fill_form(**files), request, close_page) == "the run was stopped"
    assert len(steps) == 1 and not handlers.runs.stops and not [*handlers.root.glob("run-*")]
    views, download, *_ = handlers.run(*fill_form(**files), request)
    assert Path(download["value"]).is_file() and not [*handlers.root.glob("run-*")]


def test_a_bad_upload_shows_its_sentence_on_the_page(browser, address, tmp_path, capfd):
    """Guards the terminal too: no traceback there."""
    (tmp_path / "a word <i>.png").write_bytes(b"no picture")
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", tmp_path / "a word <i>.png")
    browser.until(f"({TOAST}).includes('cannot be decoded (it is none of')")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_example_fills_the_page(browser, address, engine, tmp_path, monkeypatch):
    """The second example lies where its object was rendered: one click, then a result beside all three baselines.

    Also from a folder that does not hold the package, where Gradio serves none of its files.
    """
    monkeypatch.chdir(tmp_path)
    browser.open(address, READY)
    browser.read("document.querySelectorAll('#examples button')[1].click()")
    browser.until(PLACED)
    browser.click("#run")
    browser.until(DONE)
    assert 0.02 < engine.hole.mean() < 0.5
    assert browser.read("document.querySelectorAll('#baselines figure').length") == 4


@pytest.mark.slow
def test_twelve_megapixels(browser, address, engine, cut_out, tmp_path):
    """A photograph of 12 megapixels is placed on, run and downloaded, bit-exact outside the hole."""
    draw_photograph(4000, 3000).save(tmp_path / "large.png", compress_level=1)
    browser.open(address, READY)
    browser.upload("#photograph input[type=file]", tmp_path / "large.png")
    browser.until(PICTURED)
    browser.upload("#cut-out input[type=file]", cut_out)
    browser.until(PLACED)
    browser.click("#run")
    browser.until(DONE)
    with download(browser, tmp_path / "downloads") as file:
        picture, before, hole = np.array(file), read_image(tmp_path / "large.png"), engine.hole
    assert picture.shape == (3000, 4000, 3) and np.array_equal(picture[~hole], before[~hole]) and hole.any()


def test_ctrl_c_ends_the_command_and_removes_all(tmp_path):
    """Also during a run, which would write into the folder that is removed."""
    port, environment = free_port(), {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    words = [sys.executable, "-m", "harmony.demo", f"port={port}", "steps=999", "host=localhost"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, **streams) as process:
        address = next(line.strip() for line in process.stdout if line.startswith("http://"))
        (root,) = tmp_path.glob("harmony-demo-*")
        with pytest.raises(UserError, match=f"nothing can listen at host=127.0.0.1 port={port}"):
            page.check_address("127.0.0.1", port)
        picture = tmp_path / "picture.png"
        draw_photograph(64, 64).convert("RGBA").save(picture)
        pixels = np.array(Image.open(picture))
        pixels[:20, :, 3] = 0
        Image.fromarray(pixels).save(picture)
        (upload,) = httpx.post(f"{address}gradio_api/upload", files={"files": picture.open("rb")}).json()
        file = {"path": upload, "meta": {"_type": "gradio.FileData"}}
        values = fill_form(photograph=file, cut_out=file, box="5,5,60,60", choice="paint_by_example", steps=999)
        assert join(address, values, "tab").status_code == 200
        end = time.monotonic() + 30
        while not [*root.glob("run-*/composite.png")]:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == "the demo has ended, its uploads and results are removed\n"
    assert not [*tmp_path.glob("harmony-demo-*")]


@pytest.mark.parametrize("host, warns", [("127.0.0.1", False), ("0.0.0.0", True), ("192.168.0.9", True)])
def test_the_last_lines_say_who_reaches_the_page(monkeypatch, capsys, host, warns):
    def stop_waiting(event):
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "open_page", lambda *args: nullcontext("http://the-page/"))
    monkeypatch.setattr(page.threading.Event, "wait", stop_waiting)
    with pytest.raises(KeyboardInterrupt):
        page.serve(None, host, 7860, 1)
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("http://the-page/", "Ctrl-C ends it.")
    assert any(line.startswith("There is no password") for line in lines) == warns
    assert (len(lines) == 4 and lines[1].endswith(":7860/")) == (host == "0.0.0.0")


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
