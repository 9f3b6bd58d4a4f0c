"""What the demo does with a photograph, without its page: methods that are built once, previews, and one run."""

import base64
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, takewhile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from harmony.cli.methods import build, complete
from harmony.core.errors import UserError
from harmony.core.progress import tell
from harmony.data.descriptions import Description, parse_descriptions
from harmony.methods.inputs import Inputs, choose_box, compare_baselines, get_size, read_alpha_mask, read_inputs
from harmony.methods.insert import AUTO, keeps_detail
from harmony.methods.method import Method
from harmony.methods.runs import Inserter, Request
from harmony.models.backbone import Backbone
from harmony.models.shipped import check_places
from harmony.pixels.color_profiles import read_in_space, to_srgb
from harmony.pixels.images import list_formats, read_image, resize, write_image
from harmony.pixels.masks import OBJECT, bounding_box

VIEW_SIDES = (512, 1280)  # pixels of the longer side of what the page shows, at least and at most
CUT_OUT_SIDE = 512  # pixels of the longer side of a cut-out that is placed
RELIGHT, KEEP = "color_relight", "color"  # the shipped ControlNets
PLAIN, EXAMPLE, WORDS = "inpainting", "paint_by_example", "zero_shot"  # methods
EXAMPLE_OF_WORDS = "a red car: warm sunset light -> pink neon light"
TITLES = {
    RELIGHT: "Fit it to the light",
    KEEP: "Keep its own colors",
    EXAMPLE: "Paint it anew by example",
    PLAIN: "Inpaint by words",
    WORDS: "Relight it by words",
}
LARGEST = 50  # megapixels of a picture
# The beginning of a message for the command line: what the page says. Of others clauses with NAME= are left out.
WORDINGS = {
    r".* has no transparent background": "the cut-out has no transparent background: save it as PNG or WebP with one",
    r".* is transparent everywhere": "the cut-out is transparent everywhere: save it with its object opaque",
    r"box .* shows nothing": "nothing of the object lies on the photograph: drag it there",
    r"box .* makes the object": "the object is far larger than the photograph: make it smaller",
    r"box .* has no area": "the object has no size: make it larger",
    r"the object is too small": "the object is too small: make it larger, or cut the photograph around a part of it",
    r"the prompt is empty": "nothing says what the finished picture shows: words for it may help",
    r"backbone .* has no CLIP": "this method needs words for both lights here: write them in the settings",
}
OPTION = r"\b[\w.]+=(?=\S|$)"  # of the command line


@dataclass(frozen=True)
class Choice:
    """A method that the page offers: its ``title``, and the ``options`` that it is built from."""

    title: str
    options: Mapping[str, Any]

    @property
    def has_color(self) -> bool:
        """Whether there is a strength of color to choose."""
        return bool(self.options.get("controlnet"))

    @property
    def has_structure(self) -> bool:
        """Whether there is a strength of structure to choose."""
        return bool(self.options.get("structure"))


@dataclass(frozen=True)
class Job:
    """One run: the name of its choice, the ``pictures`` for ``read_inputs``, and the settings of the page.

    ``pictures`` hold paths of the demo's own folder alone; ``words``, for both lights, are text whatever they hold.
    """

    choice: str
    pictures: Mapping[str, Any]
    color: float = 1.0
    structure: float = 1.0
    steps: int = 50
    seed: int = 0
    shadow: bool = True
    prompt: str = ""
    words: str = ""


@dataclass(frozen=True)
class JobResult:
    """What became of a job: views in sRGB, title -> view of each baseline, the ``file`` to download, and ``lines``."""

    before: np.ndarray
    after: np.ndarray
    baselines: Mapping[str, np.ndarray]
    file: Path
    lines: tuple[str, ...]


def list_choices(cfg: DictConfig) -> dict[str, Choice]:
    """Name -> choice: the ControlNet of the command first. UserError where one names weights that are not there."""
    names = [PLAIN if cfg.controlnet is None else cfg.controlnet, RELIGHT, KEEP, EXAMPLE, WORDS]
    choices = {}
    for name in dict.fromkeys(names):
        is_method = name in (PLAIN, EXAMPLE, WORDS)
        each = {"method": name} if is_method else {"method": "controlnet", "controlnet": name}
        node = complete(cfg, each)
        check_places(node)
        title = TITLES.get(name, f"Network {Path(name).name}")
        choices[name] = Choice(title, each | {key: node[key] for key in ("controlnet", "structure") if key in node})
    return choices


class Engine:
    """The methods of a page on one backbone, each built once.

    A choice whose networks do not fit the backbone is left out, with a line. UserError where none is left.
    """

    def __init__(self, cfg: DictConfig, choices: Mapping[str, Choice], backbone: Backbone):
        self.cfg, self.backbone = cfg, backbone
        self.build, self.lock = lru_cache(maxsize=8)(self.build_node), Lock()
        self.choices: dict[str, Choice] = {}
        for name, choice in choices.items():
            try:
                method = self.find_method(choice, {})
            except UserError as error:
                tell(f"{choice.title} left out: {error}")
                continue
            tell(f"{choice.title}: {method.describe()}")
            self.choices[name] = choice
        if not self.choices:
            raise UserError(f"no method fits backbone {backbone.name}: see the lines above, and give controlnet=RUN")

    def build_node(self, node: str) -> Method:
        """The method of a completed node, as JSON."""
        return build(json.loads(node), self.backbone)

    def find_method(self, choice: Choice, settings: Mapping[str, Any]) -> Method:
        """The method of a choice with some of its options set; those that it does not take are left out."""
        node = complete(self.cfg, choice.options)
        node |= {key: value for key, value in settings.items() if key in node}
        return self.build(json.dumps(node, sort_keys=True))

    def run(self, job: Job, folder: Path, advance: Callable[[int, int | None], None]) -> JobResult:
        """Run a job into ``folder``; ``advance`` is called with the steps so far and all of them, where known.

        What ``advance`` raises ends the job. Jobs wait for each other: they share the networks and what watches them.
        """
        with self.lock:
            return self.run_alone(job, folder, advance)

    def run_alone(self, job: Job, folder: Path, advance: Callable[[int, int | None], None]) -> JobResult:
        """Run a job while no other runs."""
        advance(0, None)  # it may have been stopped while it waited
        inputs, lines = replace(read_inputs(job.pictures), lights=parse_lights(job.words)), []
        if inputs.mask.all():
            raise UserError("the object covers the whole picture: leave some of the photograph around it")
        settings = {"lambda_l": job.color, "lambda_h": job.structure, "steps": job.steps}
        settings |= {"describer": "given"} if inputs.lights else {}
        method = self.find_method(self.choices[job.choice], settings)
        method.say = lines.append
        inserter = Inserter(method, self.backbone, job.seed, shadow=job.shadow, say=lines.append)
        request = Request(job.pictures, folder, job.prompt or None)
        total = count_steps(method, inputs, job)
        lines.append(describe_job(job, self.choices[job.choice], total))
        with watch_steps(method, lambda number: advance(number, total)):
            (files,) = inserter.run([request], [inputs])
        pictures = request.read_pictures()
        before = pictures["composite"] if inputs.reference is None else to_srgb(inputs.background, inputs.profile)
        views = (fit_view(picture) for picture in (before, pictures["harmonized"]))
        return JobResult(*views, draw_baselines(inputs, files["harmonized"]), files["harmonized"], tuple(lines))


def describe_job(job: Job, choice: Choice, total: int | None) -> str:
    """A line on the method of a job and its settings."""
    parts = [choice.title, f"strength of color {job.color:g}", f"strength of structure {job.structure:g}"]
    parts = [
        part for part, is_read in zip(parts, (True, choice.has_color, choice.has_structure), strict=True) if is_read
    ]
    steps = [] if total is None else [f"{total} step{'s' if total > 1 else ''}"]
    return ", ".join([*parts, *steps, f"seed {job.seed}"])


def parse_lights(words: str) -> tuple[Description, ...]:
    """The descriptions in words for both lights: text, and never the name of a file. UserError for other words."""
    try:
        return tuple(parse_descriptions(words)) if words else ()
    except UserError:
        raise UserError(f"words for both lights are written as in: {EXAMPLE_OF_WORDS}") from None


def count_steps(method: Method, inputs: Inputs, job: Job) -> int | None:
    """The steps of a job; None where they depend on what the rounds find."""
    if job.choice == WORDS:
        return None
    return 1 if keeps_detail(method, inputs.cut(method, job.prompt, job.shadow), AUTO) else job.steps


@contextmanager
def watch_steps(method: Method, advance: Callable[[int], None]) -> Iterator[None]:
    """Within this block ``advance`` is called with the number of each step when the last block of the UNet has run."""
    numbers = count(1)
    hook = method.networks()["UNet"][-1].register_forward_hook(lambda *args: advance(next(numbers)))
    try:
        yield
    finally:
        hook.remove()


def draw_baselines(inputs: Inputs, file: Path) -> dict[str, np.ndarray]:
    """Title -> small picture in sRGB of each baseline that is known, and of the result between them.

    Poisson blending needs what was behind the object, and an example that is painted has no baseline.
    """
    if inputs.reference is not None:
        return {}
    titles = ["Copy and paste", "Harmony", "Reinhard", "Poisson"]
    squares = compare_baselines(inputs, read_image(file))[: 4 if inputs.is_placed else 3]
    return {title: to_srgb(square, inputs.profile) for title, square in zip(titles, squares, strict=False)}


# --- what the page shows before a run


def fit_view(image: np.ndarray, sides: tuple[int, int] = VIEW_SIDES) -> np.ndarray:
    """An image whose longer side has as many pixels as ``sides`` allow, at least and at most."""
    width, height = get_size(image)
    scale = np.clip(max(width, height), *sides) / max(width, height)
    return resize(image, max(1, round(scale * width)), max(1, round(scale * height)))


def view_photograph(path: str) -> tuple[np.ndarray, tuple[int, int]]:
    """A view of a photograph in sRGB, and its true width and height."""
    pixels = read_in_space(path, None).pixels
    return fit_view(pixels), get_size(pixels)


def view_cut_out(path: str) -> np.ndarray:
    """A small view of the object of a cut-out, uint8 H x W x 4. UserError for a picture without transparency."""
    mask = read_alpha_mask(path)
    x0, y0, x1, y1 = bounding_box(mask)
    pixels = np.dstack([read_in_space(path, None).pixels, mask * np.uint8(255)])
    return fit_view(np.ascontiguousarray(pixels[y0:y1, x0:x1]), (1, CUT_OUT_SIDE))


def choose_place(path: str, size: tuple[int, int]) -> list[int]:
    """The box of a cut-out at first: where it is, if it is as large as the photograph, else at the bottom center."""
    mask = read_alpha_mask(path)
    x0, y0, x1, y1 = bounding_box(mask)
    if get_size(mask) == size:
        return [x0, y0, x1, y1]
    left, top, right, bottom = choose_box(*size)
    scale = min((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))
    width, height = max(1, round(scale * (x1 - x0))), max(1, round(scale * (y1 - y0)))
    left = round((left + right - width) / 2)
    return [left, bottom - height, left + width, bottom]


def encode(image: np.ndarray) -> str:
    """An image as the address of a PNG, without a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_mask(path: Path, paint: np.ndarray, size: tuple[int, int]) -> str:
    """Write what was painted on a view, bool H x W, as a mask of the photograph's size. UserError for nothing."""
    mask = resize(paint * np.uint8(255), *size) > OBJECT
    if not mask.any():
        raise UserError("nothing is painted: paint over the object first")
    write_image(path, mask)
    return str(path)


def check_size(path: str) -> None:
    """UserError for a picture of more pixels than the demo decodes; what is no picture passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=list_formats()) as file:
                pixels = file.width * file.height
    except Image.DecompressionBombError:
        pixels = math.inf
    except Exception:  # whoever reads it says what is wrong with it
        return
    if pixels > LARGEST * 10**6:
        raise UserError(f"{path} has more than {LARGEST} megapixels: make it smaller first")


def reword(message: str) -> str:
    """A message for the command line in the words of the page, which has no options."""
    for beginning, sentence in WORDINGS.items():
        if re.match(beginning, message):
            return sentence
    clauses = re.split(r"(?<=[:;,]) | (?=\()", message)
    parts = list(takewhile(lambda clause: not re.search(OPTION, clause), clauses))
    return message if parts == clauses else " ".join(parts).rstrip(":;,") or "this picture cannot be used here"


def shorten_paths(text: str, *paths: str | None) -> str:
    """A message with the names of files in place of their paths on this machine."""
    for path in filter(None, paths):
        text = text.replace(path, os.path.basename(path))
    return text
