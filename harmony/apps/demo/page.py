"""The page of the demo. Gradio is imported here alone.

The photograph is read from the uploaded file; the browser's canvas, which drops profile and EXIF, gives only a mask.
"""

import html
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
import numpy as np
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from harmony.apps.demo.engine import (
    EXAMPLE,
    EXAMPLE_OF_WORDS,
    WORDS,
    Engine,
    Job,
    check_size,
    choose_place,
    encode,
    reword,
    shorten_paths,
    view_cut_out,
    view_photograph,
    write_mask,
)
from harmony.apps.demo.examples import Example, list_examples
from harmony.core.errors import UserError
from harmony.core.foreign import parse_box
from harmony.core.progress import tell

PLACE, PAINT = "A cut-out to place on it", "What I paint over"
FOLDER = Path(__file__).parent
INK, OPACITY = "#f97316", 0.6  # of the brush, which lets the object be seen
DAY = 24 * 60 * 60  # seconds after which an upload is removed while the demo runs
LARGEST_UPLOAD = "100mb"
UPLOADS = "uploads"  # folder of uploads and results
LOOPBACK = ["127.0.0.1", "localhost"]
LONGEST, LARGEST_SEED = 500, 2**32 - 1  # characters of a text, number
EVERYWHERE, FOREIGN_ADDRESS = ("0.0.0.0", "::"), "192.0.2.1"  # an address of no machine (RFC 5737)
LAST_STEP = 3  # seconds that a run has to end with the demo
FILES = ["image", ".heic", ".heif"]
TEXT = """# harmony
Put an object into a photograph so that it belongs there: its light, its colors, its shadow. Every pixel outside the
object and a small rim stays as it is."""
SHOW_RESULT = "() => { document.querySelector('#result').scrollIntoView({ block: 'nearest' }); return []; }"
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; overflow: visible !important; }
/* what is hidden keeps its width: the editor's paint stays on its picture */
body:has(#way label:last-of-type input:checked) #place, body:has(#way label:first-of-type input:checked) #paint {
  visibility: hidden; height: 0; overflow: hidden; margin-top: calc(-1 * var(--layout-gap));
}
footer { display: none !important; }
#object-hint p { font-size: var(--text-sm); }
#object-hint { margin-top: -12px; }
.gradio-container .wrap .or { display: none; }
@media (min-width: 800px) { #results { position: sticky; top: 12px; align-self: flex-start; } }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; }
@media (max-width: 799px) { .figures { grid-template-columns: repeat(2, 1fr); } }
.figures figure { margin: 0; text-align: center; }
.figures img { width: 100%; border-radius: 6px; }
.figures + p { font-size: var(--text-sm); margin-top: 4px; }
.figures figcaption { font-size: var(--text-sm); margin-top: 2px; }
"""


def make_placement() -> gr.HTML:
    """A cut-out on a photograph, dragged and scaled with mouse, finger or keys; its value is the box "x0,y0,x1,y1"."""
    # no subclass: for one, Gradio writes a file beside this one
    template, css, script = ((FOLDER / f"placement.{kind}").read_text() for kind in ("html", "css", "js"))
    state = {"photo": "", "cut_out": "", "width": 1, "height": 1}
    parts = {"html_template": template, "css_template": css, "js_on_load": script}
    return gr.HTML("", elem_id="placement", **parts, **state)


class Runs:
    """The runs that have begun and not ended, each of one page, by the name that its browser calls itself."""

    def __init__(self):
        self.stops: dict[str | None, threading.Event] = {}

    @contextmanager
    def begin(self, session: str | None) -> Iterator[threading.Event]:
        """Within this block the page has a run, which is to end when the event is set."""
        stop = self.stops[session] = threading.Event()
        try:
            yield stop
        finally:
            if self.stops.get(session) is stop:
                del self.stops[session]

    def stop(self, session: str | None) -> None:
        """Let the run of a page end at its next step."""
        if session in self.stops:
            self.stops[session].set()

    def stop_all(self) -> None:
        """Let all runs end."""
        for session in list(self.stops):
            self.stop(session)


def say_plainly(function: Callable) -> Callable:
    """What a user can mend is shown on the page in its one sentence, and is no traceback in the terminal."""

    @wraps(function)
    def answer(*args, **options) -> Any:
        try:
            return function(*args, **options)
        except UserError as error:
            raise gr.Error(html.escape(reword(str(error)), quote=False), print_exception=False) from None

    return answer


def refuse_plainly(page: gr.Blocks) -> None:
    """What Gradio cannot use of what a browser sends is one sentence too, and no traceback."""
    preprocess = page.preprocess_data

    async def preprocess_data(*args, **options) -> list[Any]:
        try:
            return await preprocess(*args, **options)
        except Exception:
            raise gr.Error("the page sent what cannot be used: load it again", print_exception=False) from None

    page.preprocess_data = preprocess_data


# --- answers to what is done on the page


def show_reference(way: str, choice: str) -> Any:
    """Show where a reference is uploaded, if one is read."""
    return gr.update(visible=way == PAINT and choice == EXAMPLE)


def list_settings(engine: Engine, name: str) -> list[bool]:
    """Which settings a method has: strengths of color and structure, a prompt, words for both lights."""
    choice = engine.choices[name]
    return [choice.has_color, choice.has_structure, name not in (EXAMPLE, WORDS), name == WORDS]


def show_settings(engine: Engine, name: str) -> list[Any]:
    """Show the settings of a method."""
    return [gr.update(visible=is_visible) for is_visible in list_settings(engine, name)]


def clear_results() -> tuple:
    """Take away the results of what is no longer on the page."""
    return None, gr.update(value=None, interactive=False), "", gr.update(visible=False), ""


def draw_figures(pictures: Mapping[str, np.ndarray]) -> str:
    """Small pictures with their titles, side by side."""
    figures = (
        f'<figure><img src="{encode(picture)}" alt=""><figcaption>{html.escape(title)}</figcaption></figure>'
        for title, picture in pictures.items()
    )
    note = "" if "Poisson" in pictures else "<p>Poisson blending needs the photograph without the object.</p>"
    return f'<div class="figures">{"".join(figures)}</div>{note}' if pictures else ""


def read_paint(editor: dict | None) -> np.ndarray:
    """Where the view was painted, bool H x W. UserError for an empty editor."""
    layers = [] if editor is None else [layer[..., 3] for layer in editor["layers"] if layer is not None]
    if not layers:
        raise UserError("nothing is painted: paint over the object first")
    return np.max(layers, axis=0) > 0


def collect_pictures(
    way: str, photograph: str | None, cut_out: str | None, box: str, editor: dict | None, reference: str | None,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """The pictures of a job as options of ``read_inputs``."""
    if photograph is None:
        raise UserError("there is no photograph yet: upload one first")
    if way == PLACE:
        if cut_out is None:
            raise UserError("there is no cut-out yet: upload one, or choose to paint over the object")
        place = parse_box(box) if isinstance(box, str) else None
        if place is None:
            raise UserError("the cut-out has no place on the photograph: upload it again")
        return {"background": photograph, "foreground": cut_out, "box": place}
    _, size = view_photograph(photograph)
    mask = write_mask(folder / "paint.png", read_paint(editor), size)
    if reference is not None:
        return {"background": photograph, "reference": reference, "mask": mask}
    return {"composite": photograph, "mask": mask}


def check_number(title: str, value: Any, low: float, high: float) -> None:
    """UserError unless a value of the page is a number from ``low`` to ``high``."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise UserError(f"{title} must be a number from {low:g} to {high:.10g}")


def clean_text(title: str, value: Any) -> str:
    """A text of the page without space around it. UserError for one that is too long."""
    text = str(value or "").strip()
    if len(text) > LONGEST:
        raise UserError(f"{title} must have at most {LONGEST} characters")
    return text


class Handlers:
    """What happens at the events of the page: its engine, the demo's folder, and the examples.

    Nothing that a browser says becomes part of a path: uploads are files below ``root``, and folders have random names.
    """

    def __init__(self, engine: Engine, root: Path, examples: list[Example]):
        self.engine, self.root, self.examples, self.runs = engine, root, examples, Runs()

    @contextmanager
    def use_uploads(self, *paths: str | None) -> Iterator[None]:
        """Within this block uploads may be read. UserError for other files; it names none of this machine's folders."""
        try:
            for path in filter(None, paths):
                if not Path(path).resolve().is_relative_to(self.root.resolve()):
                    raise UserError("this file was not uploaded: upload the picture again")
                check_size(path)
            yield
        except UserError as error:
            raise UserError(shorten_paths(str(error), *paths)) from None

    @say_plainly
    def make_views(self, photograph: str | None, cut_out: str | None) -> tuple[Any, Any, Any]:
        """The placement, the editor and the hint for a photograph and a cut-out."""
        hint = gr.update(visible=photograph is not None and cut_out is not None)
        if photograph is None:
            return gr.update(photo="", value=""), None, hint
        with self.use_uploads(photograph, cut_out):
            view, size = view_photograph(photograph)
            width, height = size
            placement = {"photo": encode(view), "width": width, "height": height, "cut_out": "", "value": ""}
            if cut_out is not None:
                box = choose_place(cut_out, size)
                placement |= {"cut_out": encode(view_cut_out(cut_out)), "value": ",".join(map(str, box))}
        return gr.update(**placement), {"background": view, "layers": [], "composite": None}, hint

    @say_plainly
    def run(
        self, way: str, photograph: str | None, cut_out: str | None, box: str, editor: dict | None,
        reference: str | None, choice: str, color: float, structure: float, steps: float, seed: float, shadow: bool,
        prompt: str, words: str, request: gr.Request, progress: gr.Progress = gr.Progress(),
    ) -> tuple:  # fmt: skip
        """Run what is on the page: before and after, the file to download, the baselines, and lines about it."""
        start, session = time.monotonic(), request.session_hash
        reference = reference if choice == EXAMPLE else None
        job = self.read_settings(choice, color, structure, steps, seed, shadow, prompt, words)
        uploads = photograph, cut_out, reference
        with self.runs.begin(session) as stop, self.use_uploads(*uploads), self.make_run_folder() as folder:

            def advance(number: int, total: int | None) -> None:
                if stop.is_set():
                    raise UserError("the run was stopped")
                if number:
                    whole = "" if total is None else f" of {total}"
                    progress((number, total), desc=f"step {number}{whole}", unit="steps")

            pictures = collect_pictures(way, photograph, cut_out, box, editor, reference, folder)
            result = self.engine.run(replace(job, pictures=pictures), folder, advance)
            file = self.keep(result.file)
        lines = shorten_paths("\n".join(map(reword, result.lines)), *uploads)
        return (
            (result.before, result.after),
            gr.update(value=str(file), interactive=True),
            draw_figures(result.baselines),
            gr.update(visible=True),
            f"{time.monotonic() - start:.1f} s in all\n{lines}",
        )

    def read_settings(
        self, choice: str, color: Any, structure: Any, steps: Any, seed: Any, shadow: Any, prompt: Any, words: Any
    ) -> Job:
        """A job without pictures. UserError for settings that the page does not offer."""
        cfg = self.engine.cfg
        if choice not in self.engine.choices:
            raise UserError("there is no such method: load the page again")
        check_number("the strength of color", color, *limit_strength(cfg.lambda_l))
        check_number("the strength of structure", structure, *limit_strength(cfg.lambda_h))
        check_number("the number of steps", steps, 1, limit_steps(cfg.steps))
        seed = 0 if seed is None else seed
        check_number("the seed", seed, 0, LARGEST_SEED)
        prompt = clean_text("what the finished picture shows", prompt)
        words = clean_text("words for both lights", words) if choice == WORDS else ""
        return Job(choice, {}, color, structure, int(steps), int(seed), bool(shadow), prompt, words)

    @contextmanager
    def make_run_folder(self) -> Iterator[Path]:
        """A folder for a run, removed after this block."""
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.root, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def keep(self, file: Path) -> Path:
        """Move a result to where Gradio serves it and, after a day, removes it."""
        folder = self.root / UPLOADS
        folder.mkdir(exist_ok=True)
        return Path(shutil.move(file, tempfile.mkdtemp(dir=folder)))

    def load_example(self, index: int) -> tuple:
        """Fill the page with an example."""
        example = self.examples[index]
        return PLACE, example.photograph, example.cut_out, *self.make_views(example.photograph, example.cut_out)

    def stop(self, request: gr.Request) -> None:
        """End the run of a page, which wants no more of it or was closed."""
        self.runs.stop(request.session_hash)


# --- the page


def add_object(w: SimpleNamespace) -> None:
    """Where the photograph and its object are given."""
    w.photograph = make_file("1. Your photograph", "photograph")
    w.way = gr.Radio([PLACE, PAINT], value=PLACE, label="2. The object is", elem_id="way")
    with gr.Column(elem_id="place"):
        w.cut_out = make_file("The cut-out (PNG or WebP with a transparent background)", "cut-out")
        w.placement = make_placement()
        w.hint = gr.Markdown("Drag the object; pull a corner for its size.", elem_id="object-hint", visible=False)
    with gr.Column(elem_id="paint"):
        brush = gr.Brush(default_size=24, colors=[(INK, OPACITY)], color_mode="fixed")
        bare = {"sources": (), "transforms": (), "layers": False, "buttons": [], "format": "png", "image_mode": "RGBA"}
        w.editor = gr.ImageEditor(label="Paint over the object", brush=brush, height=460, elem_id="editor", **bare)
    w.reference = make_file("Optional: a picture of what is to appear there instead", "reference", visible=False)


def make_file(label: str, name: str, **options) -> gr.File:
    """A place to drop a picture, whose file is kept as it is."""
    return gr.File(label=label, file_types=FILES, height=120, elem_id=name, **options)


def add_settings(w: SimpleNamespace, engine: Engine) -> None:
    """The method and its settings, which begin as the command says."""
    cfg, first = engine.cfg, next(iter(engine.choices))
    titles = [(choice.title, name) for name, choice in engine.choices.items()]
    color, structure, prompt, words = list_settings(engine, first)
    w.choice = gr.Radio(titles, value=first, label="3. Method", elem_id="method")
    with gr.Accordion("Settings", open=False):
        w.color = make_strength("Strength of color", cfg.lambda_l, visible=color)
        w.structure = make_strength("Strength of structure", cfg.lambda_h, visible=structure)
        w.prompt = gr.Textbox(
            label="What the finished picture shows (may stay empty)", max_length=LONGEST, visible=prompt
        )
        label, form = "Words for both lights (may stay empty)", f"as in: {EXAMPLE_OF_WORDS}"
        w.words = gr.Textbox(label=label, max_length=LONGEST, placeholder=form, visible=words)
        w.shadow = gr.Checkbox(True, label="A placed object may cast a soft shadow at its foot")
        note = f"Fitting the light of an object larger than {engine.backbone.resolution} pixels always takes one step."
        w.steps = gr.Slider(1, limit_steps(cfg.steps), cfg.steps, step=1, label="Steps", info=note)
        w.seed = gr.Number(0, label="Seed", precision=0)


def make_strength(label: str, value: float, **options) -> gr.Slider:
    """The scale of a ControlNet."""
    return gr.Slider(*limit_strength(value), value, step=0.05, label=label, **options)


def limit_strength(value: float) -> tuple[float, float]:
    """The least and the largest strength on the page, whose default is ``value``."""
    return min(0, value), max(2, value)


def limit_steps(value: int) -> int:
    """The most steps on the page, whose default is ``value``."""
    return max(100, value)


def add_results(w: SimpleNamespace) -> None:
    """Before and after, the file, the baselines, and what was done."""
    options = {"interactive": False, "buttons": ["fullscreen"], "max_height": 620, "format": "png"}
    w.slider = gr.ImageSlider(label="Before and after", elem_id="result", **options)
    w.download = gr.DownloadButton("Download the picture (PNG)", interactive=False, elem_id="download")
    w.baselines = gr.HTML(elem_id="baselines")
    with gr.Accordion("What was done", open=False, visible=False) as w.report:
        w.lines = gr.Textbox(show_label=False, container=False, lines=4, max_lines=12)


def connect(w: SimpleNamespace, handlers: Handlers) -> None:
    """What happens on the page; only runs wait for each other."""
    free = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
    preview = free | {"concurrency_limit": 2, "concurrency_id": "preview"}  # each may hold a large photograph
    views, results = [w.placement, w.editor, w.hint], [w.slider, w.download, w.baselines, w.report, w.lines]
    for event in (w.photograph.upload, w.photograph.clear, w.cut_out.upload, w.cut_out.clear):
        event(handlers.make_views, [w.photograph, w.cut_out], views, **preview)
    for radio in (w.way, w.choice):
        radio.change(show_reference, [w.way, w.choice], w.reference, **free)
    settings = [w.color, w.structure, w.prompt, w.words]
    w.choice.change(partial(show_settings, handlers.engine), w.choice, settings, **free)
    w.examples.click(handlers.load_example, w.examples, [w.way, w.photograph, w.cut_out, *views], **preview)
    inputs = [w.way, w.photograph, w.cut_out, w.placement, w.editor, w.reference, w.choice, w.color, w.structure]
    inputs += [w.steps, w.seed, w.shadow, w.prompt, w.words]
    for event in (w.photograph.upload, w.photograph.clear, w.examples.click):
        event(clear_results, None, results, queue=False, **free)
    w.button.click(clear_results, None, results, queue=False, js=SHOW_RESULT, **free)
    alone = {"concurrency_limit": 1, "show_progress_on": [w.slider], "api_visibility": "private"}
    run = w.button.click(handlers.run, inputs, results, **alone)
    w.stop.click(handlers.stop, None, None, cancels=[run], queue=False, **free)


def build_page(handlers: Handlers) -> gr.Blocks:
    """The page with all its events."""
    w = SimpleNamespace()  # the components that events read or change
    with gr.Blocks(fill_width=True, title="harmony", analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown(TEXT)
        label, picture = (
            "Try one of these, or begin with a photograph of your own",
            gr.Image(render=False, format="png"),
        )
        samples = [[example.thumbnail] for example in handlers.examples]
        w.examples = gr.Dataset(components=[picture], samples=samples, type="index", label=label, elem_id="examples")
        with gr.Row():
            with gr.Column():
                add_object(w)
                add_settings(w, handlers.engine)
                with gr.Row():
                    w.button = gr.Button("Harmonize", variant="primary", size="lg", scale=3, elem_id="run")
                    w.stop = gr.Button("Stop", size="lg", elem_id="stop", min_width=100)
            with gr.Column(elem_id="results"):
                add_results(w)
        connect(w, handlers)
        page.unload(handlers.stop)
    refuse_plainly(page)
    return page


def check_address(host: str, port: int) -> None:
    """UserError unless a server can listen at ``port`` of ``host``."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"nothing can listen at host={host} port={port} ({error}): give others") from None


@contextmanager
def open_page(engine: Engine, host: str, port: int, waiting: int) -> Iterator[str]:
    """Serve the page within this block and give its address; uploads and results are removed at its end."""
    root = Path(tempfile.mkdtemp(prefix="harmony-demo-"))
    os.environ["GRADIO_TEMP_DIR"] = str(root / UPLOADS)
    handlers = Handlers(engine, root, list_examples(root / "examples"))
    page = build_page(handlers)
    page.queue(max_size=waiting)
    options = {"server_name": host, "server_port": port, "max_file_size": LARGEST_UPLOAD, "css": CSS}
    private = {"share": False, "enable_monitoring": False, "footer_links": []}
    if host in LOOPBACK:  # a page of another name is no page of ours, even if that name leads to this machine
        private["app_kwargs"] = {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)]}
    try:
        yield page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, **options, **private)[1]
    finally:
        handlers.runs.stop_all()
        page.close(verbose=False)
        if engine.lock.acquire(timeout=LAST_STEP):  # a run that goes on would write into the folder again
            engine.lock.release()
        shutil.rmtree(root, ignore_errors=True)


def find_addresses(host: str, port: int) -> list[str]:
    """Where other machines reach a page that listens everywhere; empty for one that does not."""
    if host not in EVERYWHERE:
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((FOREIGN_ADDRESS, port))  # sends nothing, but tells which address would be used
            return [f"http://{probe.getsockname()[0]}:{port}/"]
        except OSError:  # no network
            return [f"http://{socket.gethostname()}:{port}/"]


def serve(engine: Engine, host: str, port: int, waiting: int) -> None:
    """Serve the page until interrupted."""
    with open_page(engine, host, port, waiting) as address:
        lines = [address, *find_addresses(host, port)]
        if host not in LOOPBACK:
            lines.append("There is no password: whoever reaches this address can use the demo.")
        tell("\n".join([*lines, "Ctrl-C ends it."]))
        threading.Event().wait()
