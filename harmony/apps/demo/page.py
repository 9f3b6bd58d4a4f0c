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
    WORDS,
    Engine,
    Job,
    choose_place,
    encode,
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
LAST_STEP = 3  # seconds that a run has to end with the demo
FILES = ["image", ".heic", ".heif"]
TEXT = """# harmony
Put an object into a photograph so that it belongs there: its light, its colors, its shadow. Every pixel outside the
object and a small rim stays as it is."""
SHOW_RESULT = "() => document.querySelector('#results').scrollIntoView({ behavior: 'smooth', block: 'nearest' })"
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
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
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None

    return answer


# --- answers to what is done on the page


def show_way(way: str, choice: str) -> list[Any]:
    """Which components are seen: of placing or of painting, and of the chosen method."""
    places = way == PLACE
    return [gr.update(visible=seen) for seen in (places, not places, not places and choice == EXAMPLE)]


def list_settings(engine: Engine, choice: str) -> list[bool]:
    """Which settings a method has: strengths of color and structure, a prompt, words for both lights."""
    chosen = engine.choices[choice]
    return [chosen.has_color, chosen.has_structure, choice not in (EXAMPLE, WORDS), choice == WORDS]


def show_settings(engine: Engine, choice: str) -> list[Any]:
    """Which settings are seen."""
    return [gr.update(visible=seen) for seen in list_settings(engine, choice)]


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
        return {"background": photograph, "foreground": cut_out, "box": parse_box(box or "")}
    _, size = view_photograph(photograph)
    mask = write_mask(folder / "painted.png", read_paint(editor), size)
    if reference is not None:
        return {"background": photograph, "reference": reference, "mask": mask}
    return {"composite": photograph, "mask": mask}


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
            yield
        except UserError as error:
            raise UserError(shorten_paths(str(error), *paths)) from None

    @say_plainly
    def make_views(self, photograph: str | None, cut_out: str | None) -> tuple[Any, Any]:
        """The placement and the editor for a photograph and a cut-out."""
        if photograph is None:
            return gr.update(photo="", value=""), None
        with self.use_uploads(photograph, cut_out):
            view, size = view_photograph(photograph)
            width, height = size
            placement = {"photo": encode(view), "width": width, "height": height, "cut_out": "", "value": ""}
            if cut_out is not None:
                box = choose_place(cut_out, size)
                placement |= {"cut_out": encode(view_cut_out(cut_out)), "value": ",".join(map(str, box))}
        return gr.update(**placement), {"background": view, "layers": [], "composite": None}

    @say_plainly
    def run(
        self, way: str, photograph: str | None, cut_out: str | None, box: str, editor: dict | None,
        reference: str | None, choice: str, color: float, structure: float, steps: float, seed: float, shadow: bool,
        prompt: str, words: str, request: gr.Request, progress: gr.Progress = gr.Progress(),
    ) -> tuple:  # fmt: skip
        """Run what is on the page: before and after, the file to download, the baselines, and lines about it."""
        start, session = time.monotonic(), request.session_hash
        reference = reference if choice == EXAMPLE else None
        words = (words or "").strip() if choice == WORDS else ""
        uploads = photograph, cut_out, reference
        with self.runs.begin(session) as stop, self.use_uploads(*uploads), self.make_run_folder() as folder:

            def advance(number: int, total: int | None) -> None:
                if stop.is_set():
                    raise UserError("the run was stopped")
                if number:
                    whole = "" if total is None else f" of {total}"
                    progress((number, total), desc=f"step {number}{whole}", unit="steps")

            pictures = collect_pictures(way, photograph, cut_out, box, editor, reference, folder)
            prompt = (prompt or "").strip()
            job = Job(choice, pictures, color, structure, int(steps), int(seed or 0), shadow, prompt, words)
            result = self.engine.run(job, folder, advance)
            file = self.keep(result.file)
        lines = shorten_paths("\n".join(result.lines), *uploads)
        return (
            (result.before, result.after),
            gr.update(value=str(file), interactive=True),
            draw_figures(result.baselines),
            gr.update(visible=True),
            f"{time.monotonic() - start:.1f} s in all\n{lines}",
        )

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
    with gr.Column() as w.place_column:
        w.cut_out = make_file("The cut-out (PNG or WebP with a transparent background)", "cut-out")
        w.placement = make_placement()
        gr.Markdown("Drag the object; pull a corner for its size.", elem_id="object-hint")
    with gr.Column(visible=False) as w.paint_column:
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
    color, structure, prompt, prompts = list_settings(engine, first)
    w.choice = gr.Radio(titles, value=first, label="3. Method", elem_id="method")
    with gr.Accordion("Settings", open=False):
        w.color = make_strength("Strength of color", cfg.lambda_l, visible=color)
        w.structure = make_strength("Strength of structure", cfg.lambda_h, visible=structure)
        w.prompt = gr.Textbox(label="What the finished picture shows (may stay empty)", max_length=500, visible=prompt)
        hint = "a red car: warm sunset light -> pink neon light"
        w.prompts = gr.Textbox(
            label="Words for both lights (may stay empty)", max_length=500, placeholder=hint, visible=prompts
        )
        w.shadow = gr.Checkbox(True, label="A placed object may cast a soft shadow at its foot")
        w.steps = gr.Slider(1, max(100, cfg.steps), cfg.steps, step=1, label="Steps")
        w.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)


def make_strength(label: str, value: float, **options) -> gr.Slider:
    """The scale of a ControlNet."""
    return gr.Slider(min(0, value), max(2, value), value, step=0.05, label=label, **options)


def add_results(w: SimpleNamespace) -> None:
    """Before and after, the file, the baselines, and what was done."""
    shown = {"interactive": False, "buttons": ["fullscreen"], "max_height": 620, "format": "png"}
    w.slider = gr.ImageSlider(label="Before and after", elem_id="result", **shown)
    w.download = gr.DownloadButton("Download the picture (PNG)", interactive=False, elem_id="download")
    w.baselines = gr.HTML(elem_id="baselines")
    with gr.Accordion("What was done", open=False, visible=False) as w.report:
        w.lines = gr.Textbox(show_label=False, container=False, lines=4, max_lines=12)


def connect(w: SimpleNamespace, handlers: Handlers) -> None:
    """What happens on the page; only runs wait for each other."""
    free = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
    columns = [w.place_column, w.paint_column, w.reference]
    for file in (w.photograph, w.cut_out):
        for event in (file.upload, file.clear):
            event(handlers.make_views, [w.photograph, w.cut_out], [w.placement, w.editor], **free)
    for radio in (w.way, w.choice):
        radio.change(show_way, [w.way, w.choice], columns, **free)
    settings = [w.color, w.structure, w.prompt, w.prompts]
    w.choice.change(partial(show_settings, handlers.engine), w.choice, settings, **free)
    w.examples.click(handlers.load_example, w.examples, [w.way, w.photograph, w.cut_out, w.placement, w.editor], **free)
    given = [w.way, w.photograph, w.cut_out, w.placement, w.editor, w.reference, w.choice, w.color, w.structure]
    given += [w.steps, w.seed, w.shadow, w.prompt, w.prompts]
    results = [w.slider, w.download, w.baselines, w.report, w.lines]
    alone = {"concurrency_limit": 1, "show_progress_on": [w.slider], "api_visibility": "private"}
    w.button.click(handlers.run, given, results, **alone)
    w.button.click(None, js=SHOW_RESULT)


def build_page(handlers: Handlers) -> gr.Blocks:
    """The page with all its events."""
    w = SimpleNamespace()  # the components that events read or change
    with gr.Blocks(title="harmony", analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
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
                w.button = gr.Button("Harmonize", variant="primary", size="lg", elem_id="run")
            with gr.Column(elem_id="results"):
                add_results(w)
        connect(w, handlers)
        page.unload(handlers.stop)
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


def serve(engine: Engine, host: str, port: int, waiting: int) -> None:
    """Serve the page until interrupted."""
    with open_page(engine, host, port, waiting) as address:
        tell(f"{address}\nCtrl-C ends it.")
        threading.Event().wait()
