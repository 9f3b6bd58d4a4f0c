"""A bench for editing by words, rendered: scenes with one word of their caption changed, objects without a word.

A case is a picture with its caption, the same caption with another colour, kind or light, and the render of the scene
so changed: the truth that photographs cannot give. A concept is an object in a colour that no training picture has
(``studio.NOVEL``), seen a few times to learn from and a few times to be judged by.

    edits.jsonl                     a header with the schema's version, then a line a case
    images/<id>.jpg                 the source; images/<id>_<word>.jpg the truth, images/<id>_<word>.png what may change
    concepts/<name>/<n>.jpg         to learn from, held_out/<name>/<n>.jpg to judge by; <name> = <colour>_<kind>
    .../<name>/captions.json        what they show besides, {} in the place of the word
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.signals import worker_pool
from harmony.data.sources.studio import COLOURS, GROUNDS, KINDS, Scene, mitsuba, render, save, scene

SCHEMA = 1
WORDS = ("colour", "kind", "light")
START = 1_000_000  # index of the first scene that may be a case: far from those of any dataset
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
SEEN, HELD_OUT = 5, 3  # pictures of a concept
DAYLIGHT = ("noon", "overcast", "sunset")  # under which a concept is seen
SIDE, SAMPLES = 64, 64  # pixels; samples a pixel


@dataclass(frozen=True)
class Case:
    """One edit. ``word``: what changes (colour, kind, light); paths are relative to the folder of ``edits.jsonl``.

    ``mask`` is white where the object is, or will be; None where everything may change.
    """

    id: str
    word: str
    source: str
    target: str
    image: str
    truth: str
    mask: str | None


def edits_of(s: Scene) -> dict[str, Scene]:
    """The scene with another colour, kind or light; each a word (or two) of its caption."""
    rng = np.random.default_rng([s.seed, s.index, 2])

    def other(names, own: str) -> str:
        return str(rng.choice([name for name in names if name != own]))

    return {
        "colour": replace(s, colour=other(COLOURS, s.colour)),
        "kind": replace(s, kind=other(KINDS, s.kind)),
        "light": replace(s, light=s.relight, relight=s.light),
    }


def concept_scene(colour: str, kind: str, n: int) -> Scene:
    """View ``n`` of a concept: matte, alone, on a ground and under a daylight of its own."""
    s = scene(START + CONCEPTS.index((colour, kind)) * (SEEN + HELD_OUT) + n, seed=1)
    light = DAYLIGHT[n % len(DAYLIGHT)]
    ground = GROUNDS[(n + len(kind)) % len(GROUNDS)]
    return replace(s, kind=kind, colour=colour, finish="matte", light=light, ground=ground, others=())


def render_case(job: tuple[Scene, Path]) -> list[Case]:
    """Render one scene and its three edits."""
    s, root = job
    frames, cases = render(s, SIDE, SAMPLES, plate=False), []
    for word, edited in edits_of(s).items():
        seen = frames if word == "light" else render(edited, SIDE, SAMPLES, plate=False)
        name = f"images/{s.id}_{word}"
        save(root / f"{name}.jpg", frames.relit if word == "light" else seen.image)
        if word != "light":
            save(root / f"{name}.png", frames.mask | seen.mask)
        mask = None if word == "light" else f"{name}.png"
        cases.append(Case(s.id, word, s.caption(), edited.caption(), f"images/{s.id}.jpg", f"{name}.jpg", mask))
    save(root / f"images/{s.id}.jpg", frames.image)
    return cases


def render_concept(job: tuple[str, str, int, Path]) -> None:
    colour, kind, n, root = job
    folder = "concepts" if n < SEEN else "held_out"
    picture = render(concept_scene(colour, kind, n), SIDE, SAMPLES, plate=False).image
    save(root / folder / f"{colour}_{kind}" / f"{n}.jpg", picture)


def generate(root: Path, count: int, workers: int | None = None) -> Path:
    """Render ``count`` scenes of the test split with their edits, and all concepts, into ``root``; returns it."""
    if (root / "edits.jsonl").exists():
        return root
    mitsuba()
    tests = (s for s in (scene(START + i) for i in range(16 * count)) if s.split == "test")
    jobs = [(s, root) for s, _ in zip(tests, range(count), strict=False)]
    views = [(*concept, n, root) for concept in CONCEPTS for n in range(SEEN + HELD_OUT)]
    began, cases = time.monotonic(), []
    with worker_pool(workers or os.cpu_count()) as pool:
        for done, made in enumerate(pool.imap(render_case, jobs), 1):
            cases += made
            rate = done / (time.monotonic() - began)
            if done % 8 == 0 or done == count:
                print(f"editing: {done}/{count} scenes, {rate:.1f} a second, {(count - done) / rate:.0f} s left")
        pool.map(render_concept, views)
    for colour, kind in CONCEPTS:
        for folder, numbers in (("concepts", range(SEEN)), ("held_out", range(SEEN, SEEN + HELD_OUT))):
            said = {n: concept_scene(colour, kind, n).caption().replace(f"{colour} {kind}", "{}") for n in numbers}
            write_text(root / folder / f"{colour}_{kind}" / "captions.json", json.dumps(said, indent=0) + "\n")
    lines = [{"schema": SCHEMA, "count": len(cases)}, *map(asdict, cases)]
    write_text(root / "edits.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return root


def read_cases(file: Path) -> list[Case]:
    """The cases of an ``edits.jsonl``. UserError where there is none, or one of another schema."""
    try:
        head, *lines = (json.loads(line) for line in Path(file).read_text().splitlines())
        if head["schema"] != SCHEMA:
            raise UserError(f"{file} has schema {head['schema']}, this version reads {SCHEMA}: render it anew")
        if head["count"] != len(lines):
            raise UserError(f"{file} has {len(lines)} of its {head['count']} edits: render it anew")
        return [Case(**line) for line in lines]
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: use dataset=editing") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): render it anew") from None


def concepts(root: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Name of each concept -> its pictures to learn from, and those to judge by."""
    found = {}
    for folder in sorted((root / "concepts").iterdir()):
        found[folder.name] = sorted(folder.glob("*.jpg")), sorted((root / "held_out" / folder.name).glob("*.jpg"))
    return found
