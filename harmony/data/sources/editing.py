"""Renders for prompt editing: scenes with one word of their caption changed, and objects that no word describes.

A case is a picture with its caption, the same caption with another color, kind or light, and the render of that other
scene as the truth, which photographs cannot provide. A concept is an object in a color that no training picture has
(``scenes.NOVEL``), with some views for learning and some for evaluation.

    edits.jsonl                     a header with the schema version, then one line for each case
    images/<id>.jpg                 the source; images/<id>_<word>.jpg the truth, images/<id>_<word>.png the mask
    concepts/<name>/<n>.jpg         views for learning; held_out/<name>/<n>.jpg for evaluation; <name> = <color>_<kind>
    .../<name>/captions.json        their captions, {} in place of the word
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.foreign import parse_json, path_inside, read_lines
from harmony.data.sources.studio.files import render_scenes
from harmony.data.sources.studio.rendering import render, save
from harmony.data.sources.studio.scenes import COLORS, GROUNDS, Scene, scene
from harmony.data.sources.studio.shapes import KINDS

SCHEMA = 1
WORDS = ("color", "kind", "light")
START = 1_000_000  # index of the first scene of a case, far from the indices of all datasets
CONCEPTS = (
    ("teal", "mug"),
    ("pink", "car"),
    ("brown", "duck"),
    ("lime", "robot"),
    ("gold", "rocket"),
    ("azure", "house"),
    ("maroon", "chair"),
    ("mint", "boat"),
)
EXAMPLES, TESTS = 5, 3  # views of a concept for learning, and for evaluation
DAYLIGHT = ("noon", "overcast", "sunset")  # the lights of a concept's views
SIDE, SAMPLES = 64, 64  # pixels; samples per pixel


@dataclass(frozen=True)
class Case:
    """One edit. ``word`` is the kind of change, for renders one of ``WORDS``; paths are relative to the list's folder.

    ``truth``: the edited picture, None where it is not known. ``mask`` is white where the object is before or after the
    edit; None if everything may change.
    """

    id: str
    word: str
    source: str
    target: str
    image: str
    truth: str | None
    mask: str | None


def edit_scene(s: Scene) -> dict[str, Scene]:
    """Edit a scene: with another color, kind or light, each of which is a word or two of its caption."""
    rng = np.random.default_rng([s.seed, s.index, 2])

    def other(names: Iterable[str], name: str) -> str:
        return str(rng.choice([n for n in names if n != name]))

    return {
        "color": replace(s, color=other(COLORS, s.color)),
        "kind": replace(s, kind=other(KINDS, s.kind)),
        "light": replace(s, light=s.relight, relight=s.light),
    }


def concept_scene(color: str, kind: str, n: int) -> Scene:
    """View ``n`` of a concept: matte, without other objects, with its own ground and daylight."""
    s = scene(START + CONCEPTS.index((color, kind)) * (EXAMPLES + TESTS) + n, seed=1)
    light = DAYLIGHT[n % len(DAYLIGHT)]
    ground = GROUNDS[(n + len(kind)) % len(GROUNDS)]
    return replace(s, kind=kind, color=color, finish="matte", light=light, ground=ground, others=())


def scene_cases(s: Scene) -> list[Case]:
    """The cases of one scene: its three edits."""
    cases = []
    for word, edit in edit_scene(s).items():
        name = f"images/{s.id}_{word}"
        mask = None if word == "light" else f"{name}.png"
        cases.append(Case(s.id, word, s.caption(), edit.caption(), f"images/{s.id}.jpg", f"{name}.jpg", mask))
    return cases


def render_case(s: Scene, root: Path) -> None:
    """Render one scene and its three edits; the scene's own picture is written last."""
    frames, edits = render(s, SIDE, SAMPLES, plate=False), edit_scene(s)
    for case in scene_cases(s):
        if case.mask is None:
            save(root / case.truth, frames.relit)
        else:
            truth = render(edits[case.word], SIDE, SAMPLES, plate=False)
            save(root / case.truth, truth.image)
            save(root / case.mask, frames.mask | truth.mask)
    save(root / f"images/{s.id}.jpg", frames.image)


def view_file(root: Path, color: str, kind: str, n: int) -> Path:
    """The picture of view ``n`` of a concept."""
    return root / ("concepts" if n < EXAMPLES else "held_out") / f"{color}_{kind}" / f"{n}.jpg"


def render_concept(view: tuple[str, str, int], root: Path) -> None:
    """Render one view of a concept: its color, its kind and its number."""
    save(view_file(root, *view), render(concept_scene(*view), SIDE, SAMPLES, plate=False).image)


def generate(root: Path, count: int, workers: int | None = None) -> Path:
    """Render ``count`` scenes of the test split with their edits, and all concepts, into ``root``; returns it."""
    if (root / "edits.jsonl").exists():
        return root
    tests = (s for s in (scene(START + i) for i in range(16 * count)) if s.split == "test")
    scenes = list(islice(tests, count))
    views = [(*concept, n) for concept in CONCEPTS for n in range(EXAMPLES + TESTS)]
    is_rendered = {s: (root / f"images/{s.id}.jpg").exists() for s in scenes}
    render_scenes("editing", scenes, is_rendered.get, partial(render_case, root=root), 8, workers)
    is_rendered = {view: view_file(root, *view).exists() for view in views}
    render_scenes("concepts", views, is_rendered.get, partial(render_concept, root=root), 16, workers)
    for color, kind in CONCEPTS:
        for numbers in (range(EXAMPLES), range(EXAMPLES, EXAMPLES + TESTS)):
            captions = {n: concept_scene(color, kind, n).caption().replace(f"{color} {kind}", "{}") for n in numbers}
            folder = view_file(root, color, kind, numbers[0]).parent
            write_text(folder / "captions.json", json.dumps(captions, indent=0) + "\n")
    cases = [case for s in scenes for case in scene_cases(s)]
    lines = [{"schema": SCHEMA, "count": len(cases)}, *map(asdict, cases)]
    write_text(root / "edits.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return root


def read_cases(file: Path) -> list[Case]:
    """Read the cases of an ``edits.jsonl``. UserError if it is missing, damaged or of another schema."""
    if not Path(file).exists():
        raise UserError(f"{file} does not exist: use dataset=editing")
    try:
        header, *lines = map(parse_json, read_lines(file))
        if header["schema"] != SCHEMA:
            raise UserError(f"{file} has schema {header['schema']}, this version reads {SCHEMA}: render it again")
        if header["count"] != len(lines):
            raise UserError(f"{file} has {len(lines)} of its {header['count']} edits: render it again")
        return [check_case(Case(**line), Path(file).parent) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): render it again") from None


def check_case(case: Case, root: Path) -> Case:
    """Return ``case``. UserError if its files are not in ``root``."""
    for name in filter(None, (case.image, case.truth, case.mask)):
        path_inside(root, name)
    return case


def concepts(root: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Map the name of each concept to its pictures for learning, and those for evaluation; empty if there are none."""
    if not (root / "concepts").is_dir():
        return {}
    return {
        folder.name: (sorted(folder.glob("*.jpg")), sorted((root / "held_out" / folder.name).glob("*.jpg")))
        for folder in sorted((root / "concepts").iterdir())
    }
