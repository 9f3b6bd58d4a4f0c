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
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.progress import Progress
from harmony.core.signals import worker_pool
from harmony.data.sources.studio.rendering import mitsuba, render, save
from harmony.data.sources.studio.scenes import COLORS, GROUNDS, Scene, scene
from harmony.data.sources.studio.shapes import KINDS

SCHEMA = 1
WORDS = ("colour", "kind", "light")  # as written in files
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
    """One edit. ``word`` is the kind of change, one of ``WORDS``; paths are relative to the folder of ``edits.jsonl``.

    ``mask`` is white where the object is before or after the edit; None if everything may change.
    """

    id: str
    word: str
    source: str
    target: str
    image: str
    truth: str
    mask: str | None


def edit_scene(s: Scene) -> dict[str, Scene]:
    """Edit a scene: with another color, kind or light, each of which is a word or two of its caption."""
    rng = np.random.default_rng([s.seed, s.index, 2])

    def other(names: Iterable[str], name: str) -> str:
        return str(rng.choice([n for n in names if n != name]))

    return {
        "colour": replace(s, color=other(COLORS, s.color)),
        "kind": replace(s, kind=other(KINDS, s.kind)),
        "light": replace(s, light=s.relight, relight=s.light),
    }


def concept_scene(color: str, kind: str, n: int) -> Scene:
    """View ``n`` of a concept: matte, without other objects, with its own ground and daylight."""
    s = scene(START + CONCEPTS.index((color, kind)) * (EXAMPLES + TESTS) + n, seed=1)
    light = DAYLIGHT[n % len(DAYLIGHT)]
    ground = GROUNDS[(n + len(kind)) % len(GROUNDS)]
    return replace(s, kind=kind, color=color, finish="matte", light=light, ground=ground, others=())


def render_case(job: tuple[Scene, Path]) -> list[Case]:
    """Render one scene and its three edits."""
    s, root = job
    frames, cases = render(s, SIDE, SAMPLES, plate=False), []
    for word, edit in edit_scene(s).items():
        name, mask = f"images/{s.id}_{word}", None
        if word == "light":
            save(root / f"{name}.jpg", frames.relit)
        else:
            truth, mask = render(edit, SIDE, SAMPLES, plate=False), f"{name}.png"
            save(root / f"{name}.jpg", truth.image)
            save(root / mask, frames.mask | truth.mask)
        cases.append(Case(s.id, word, s.caption(), edit.caption(), f"images/{s.id}.jpg", f"{name}.jpg", mask))
    save(root / f"images/{s.id}.jpg", frames.image)
    return cases


def render_concept(job: tuple[str, str, int, Path]) -> None:
    """Render one view of a concept."""
    color, kind, n, root = job
    folder = "concepts" if n < EXAMPLES else "held_out"
    picture = render(concept_scene(color, kind, n), SIDE, SAMPLES, plate=False).image
    save(root / folder / f"{color}_{kind}" / f"{n}.jpg", picture)


def generate(root: Path, count: int, workers: int | None = None) -> Path:
    """Render ``count`` scenes of the test split with their edits, and all concepts, into ``root``; returns it."""
    if (root / "edits.jsonl").exists():
        return root
    mitsuba()
    tests = (s for s in (scene(START + i) for i in range(16 * count)) if s.split == "test")
    jobs = [(s, root) for s, _ in zip(tests, range(count), strict=False)]
    views = [(*concept, n, root) for concept in CONCEPTS for n in range(EXAMPLES + TESTS)]
    cases, progress = [], Progress("editing", count, "scenes")
    with worker_pool(workers or os.cpu_count()) as pool:
        for edits in pool.imap(render_case, jobs):
            cases += edits
            progress.advance(1, every=8)
        pool.map(render_concept, views)
    for color, kind in CONCEPTS:
        for folder, numbers in (("concepts", range(EXAMPLES)), ("held_out", range(EXAMPLES, EXAMPLES + TESTS))):
            captions = {n: concept_scene(color, kind, n).caption().replace(f"{color} {kind}", "{}") for n in numbers}
            write_text(root / folder / f"{color}_{kind}" / "captions.json", json.dumps(captions, indent=0) + "\n")
    lines = [{"schema": SCHEMA, "count": len(cases)}, *map(asdict, cases)]
    write_text(root / "edits.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return root


def read_cases(file: Path) -> list[Case]:
    """Read the cases of an ``edits.jsonl``. UserError if it is missing, damaged or of another schema."""
    try:
        header, *lines = (json.loads(line) for line in Path(file).read_text().splitlines())
        if header["schema"] != SCHEMA:
            raise UserError(f"{file} has schema {header['schema']}, this version reads {SCHEMA}: render it again")
        if header["count"] != len(lines):
            raise UserError(f"{file} has {len(lines)} of its {header['count']} edits: render it again")
        return [Case(**line) for line in lines]
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: use dataset=editing") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): render it again") from None


def concepts(root: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Map the name of each concept to its pictures for learning, and those for evaluation."""
    return {
        folder.name: (sorted(folder.glob("*.jpg")), sorted((root / "held_out" / folder.name).glob("*.jpg")))
        for folder in sorted((root / "concepts").iterdir())
    }
