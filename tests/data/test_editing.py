"""The bench of edits: its cases and concepts are pure functions of their numbers, and the bundled files are whole."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data import preparation
from harmony.data.sources import editing
from harmony.data.sources.editing import CONCEPTS, START, Case, concept_scene, concepts, edits_of, read_cases
from harmony.data.sources.studio import COLOURS, KINDS, LIGHTS, NOVEL, Frames, scene
from harmony.metrics.fidelity import psnr
from harmony.pixels.images import read_image, resize

BUNDLED = Path(__file__).resolve().parents[2] / "datasets" / "editing"
SCENES = [s for s in (scene(START + i) for i in range(256)) if s.split == "test"]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return read_cases(BUNDLED / "edits.jsonl")


# --- what is bundled


def test_the_bundled_cases(cases):
    """Guards the bench: 48 scenes of the test split, each with another colour, kind and light, and nothing else."""
    assert len(cases) == 144 and len({(case.id, case.word) for case in cases}) == 144
    assert [case.id for case in cases[::3]] == [s.id for s in SCENES[:48]]
    assert [case.word for case in cases] == ["colour", "kind", "light"] * 48
    for case in cases:
        (article, colour, kind, *ground), light = (part.split() for part in case.source.split(","))
        (article_, colour_, kind_, *ground_), light_ = (part.split() for part in case.target.split(","))
        assert (
            (article, ground) == (article_, ground_) and {colour, colour_} <= {*COLOURS} and {kind, kind_} <= {*KINDS}
        )
        assert {" ".join(light), " ".join(light_)} <= {known.words for known in LIGHTS.values()}
        changed = {"colour": colour != colour_, "kind": kind != kind_, "light": light != light_}
        assert changed == {word: word == case.word for word in changed}, case


def test_the_bundled_pictures_of_the_cases(cases):
    """Guards the files: 64 px each, nothing superfluous; what changes lies in the mask, and a light changes all."""
    named = {name for case in cases for name in (case.image, case.truth, case.mask) if name}
    assert named == {f"images/{path.name}" for path in (BUNDLED / "images").iterdir()} and len(named) == 48 * 6
    inside, outside = [], []
    for case in cases:
        source, truth = (read_image(BUNDLED / name).astype(int) for name in (case.image, case.truth))
        assert source.shape == truth.shape == (64, 64, 3)
        assert (case.mask is None) == (case.word == "light")
        changed = np.abs(source - truth).mean(2)
        if case.mask is None:
            assert (changed > 4).mean() > 0.5, case
            continue
        mask = cv2.imread(str(BUNDLED / case.mask), cv2.IMREAD_GRAYSCALE)
        assert mask.shape == (64, 64) and {*np.unique(mask)} == {0, 255}
        inside.append(changed[mask > 0].mean())
        outside.append(changed[mask == 0].mean())
    assert len(inside) == 96 and np.mean(np.array(inside) > 2 * np.array(outside)) > 0.95


def test_the_bundled_concepts():
    """Guards the concepts: five pictures to learn from, three to judge by, with what they show besides; no word of the
    dataset names their colours.
    """
    found = concepts(BUNDLED)
    assert set(found) == {f"{colour}_{kind}" for colour, kind in CONCEPTS} and len(CONCEPTS) == 8
    for colour, kind in CONCEPTS:
        assert colour in NOVEL and colour not in COLOURS and kind in KINDS
        seen, held_out = found[f"{colour}_{kind}"]
        assert [path.name for path in seen] == [f"{n}.jpg" for n in range(5)]
        assert [path.name for path in held_out] == [f"{n}.jpg" for n in range(5, 8)]
        for pictures in (seen, held_out):
            said = json.loads((pictures[0].parent / "captions.json").read_text())
            assert [*said] == [path.stem for path in pictures]
            for path in pictures:
                whole = concept_scene(colour, kind, int(path.stem)).caption()
                assert said[path.stem].count("{}") == 1 and said[path.stem].format(f"{colour} {kind}") == whole
                assert read_image(path).shape == (64, 64, 3)


def test_the_bench_is_small():
    """Guards the repository's size."""
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 2 * 2**20


# --- scenes


def test_an_edit_changes_one_thing():
    """Guards edits_of: the same every time, one field of the scene (a light swaps with its rival), never to itself."""
    for s in SCENES[:16]:
        edits = edits_of(s)
        assert edits == edits_of(scene(s.index)) and [*edits] == ["colour", "kind", "light"]
        for word, edited in edits.items():
            differ = {name for name, value in vars(s).items() if getattr(edited, name) != value}
            assert differ == ({"light", "relight"} if word == "light" else {word})
        assert edits["light"].light == s.relight and edits["light"].relight == s.light
        assert edits["colour"].colour in COLOURS and edits["kind"].kind in KINDS
    assert len({edits_of(s)["kind"].kind for s in SCENES[:16]}) > 4


def test_a_concept_is_seen_from_eight_sides():
    """Guards concept_scene: the same every time, alone and matte, by daylight, no view twice, no scene of the cases."""
    views = {}
    for colour, kind in CONCEPTS:
        for n in range(8):
            s = views[colour, kind, n] = concept_scene(colour, kind, n)
            assert (s.colour, s.kind, s.finish, s.others) == (colour, kind, "matte", ())
            assert s.light in ("noon", "overcast", "sunset") and s == concept_scene(colour, kind, n)
    assert len({s.id for s in views.values()}) == 64 == len({(s.yaw, s.camera) for s in views.values()})
    assert not {s.id for s in views.values()} & {s.id for s in SCENES}
    for colour, kind in CONCEPTS:
        assert len({views[colour, kind, n].ground for n in range(5)}) == 5, "what is learnt is no ground"


def test_a_case_agrees_with_the_bundled_one(cases, tmp_path, monkeypatch):
    """Guards the renderer: a scene and its edits are still those of the bundled files, its cases the lines there."""
    pytest.importorskip("mitsuba", reason="needs the extra: pip install -e '.[studio]'")
    monkeypatch.setattr(editing, "SIDE", 32)
    monkeypatch.setattr(editing, "SAMPLES", 16)
    made = editing.render_case((SCENES[0], tmp_path))
    assert made == cases[:3]
    for case in made:
        for name in (case.image, case.truth):
            assert psnr(resize(read_image(BUNDLED / name), 32, 32), read_image(tmp_path / name)) > 25, name
        if case.mask:
            mask, bundled = (read_image(root / case.mask)[..., 0] > 0 for root in (tmp_path, BUNDLED))
            assert (mask & bundled[::2, ::2]).sum() / (mask | bundled[::2, ::2]).sum() > 0.8
    editing.render_concept(("teal", "mug", 6, tmp_path))
    bundled = read_image(BUNDLED / "held_out" / "teal_mug" / "6.jpg")
    assert psnr(resize(bundled, 32, 32), read_image(tmp_path / "held_out" / "teal_mug" / "6.jpg")) > 25


class Here:
    """A pool that works in this process."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def imap(self, function, jobs):
        return map(function, jobs)

    def map(self, function, jobs):
        return [function(job) for job in jobs]


def test_generate_writes_what_is_read(tmp_path, monkeypatch):
    """Guards the layout: cases, pictures and concepts are found again; what is there is not rendered anew."""
    rendered = []

    def render(s, side, samples, plate):
        rendered.append(s)
        pixels = np.full((side, side, 3), 9 * len(rendered) % 256, np.uint8)
        mask = np.zeros((side, side), bool)
        mask[:, len(rendered) % side] = True
        return Frames(pixels, 255 - pixels, mask)

    monkeypatch.setattr(editing, "mitsuba", lambda: None)
    monkeypatch.setattr(editing, "render", render)
    monkeypatch.setattr(editing, "worker_pool", Here)
    assert editing.generate(tmp_path, 2) == tmp_path
    made = read_cases(tmp_path / "edits.jsonl")
    assert [case.id for case in made] == [s.id for s in SCENES[:2] for _ in range(3)]
    assert made == read_cases(BUNDLED / "edits.jsonl")[:6] and len(rendered) == 2 * 3 + 64
    for case in made:
        assert all((tmp_path / name).is_file() for name in (case.image, case.truth, case.mask) if name)
    joint = read_image(tmp_path / made[0].mask)[..., 0] > 0
    assert joint.any(0).sum() == 2, "where the object is, and where it will be"
    assert {name: tuple(map(len, pictures)) for name, pictures in concepts(tmp_path).items()} == {
        f"{colour}_{kind}": (5, 3) for colour, kind in CONCEPTS
    }
    for folder in ("concepts", "held_out"):
        said = "teal_mug/captions.json"
        assert (tmp_path / folder / said).read_bytes() == (BUNDLED / folder / said).read_bytes()
    editing.generate(tmp_path, 2)
    assert len(rendered) == 70


# --- reading


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist: use dataset=editing"),
        ('{"schema": 2, "count": 0}\n', "has schema 2, this version reads 1: render it anew"),
        ("", "is damaged"),
        ("not json\n", "is damaged"),
        ('{"count": 0}\n', "is damaged"),
        ("[1]\n", "is damaged"),
        ('{"schema": 1, "count": 1}\n{"id": "a"}\n', "is damaged"),
        ('{"schema": 1, "count": 1}\n{"id": "a", "wo', "is damaged"),
    ],
)
def test_cases_that_cannot_be_read(tmp_path, text, said):
    """Guards bad input: no file, another schema, a file that is cut short or something else."""
    if text is not None:
        (tmp_path / "edits.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_cases(tmp_path / "edits.jsonl")


def test_missing_lines_are_noticed(tmp_path, cases):
    """Guards bad input: a file that was cut between two lines."""
    lines = (BUNDLED / "edits.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "edits.jsonl").write_text("".join(lines[:50]))
    with pytest.raises(UserError):
        read_cases(tmp_path / "edits.jsonl")


def test_datasets_that_are_read_as_they_are(tmp_path, monkeypatch):
    """Guards as_it_is: a folder of pictures, the list of edits (rendered first where a count is asked), or neither; and
    that ``ensure`` prepares nothing of it.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    work, asked = str(tmp_path / "work"), []
    pictures = {"name": "pictures", "layout": "pictures", "dir": "mine"}
    edits = {"name": "editing", "layout": "editing", "dir": "datasets/editing", "count": None}
    monkeypatch.setattr(editing, "generate", lambda root, count: (asked.append((root, count)), root)[1])
    assert preparation.as_it_is(pictures, work) == tmp_path / "mine" == preparation.ensure(pictures, "tiny", work)
    assert preparation.as_it_is(edits, work) == BUNDLED / "edits.jsonl" == preparation.prepare(edits, "tiny", work)
    assert preparation.as_it_is({"layout": "folder", "name": "mine", "dir": "mine"}, work) is None
    assert not asked and not (tmp_path / "work").exists(), "nothing was rendered, nothing written"
    folder = tmp_path / "work" / "editing" / "renders-3"
    assert preparation.as_it_is(edits | {"count": 3}, work) == folder / "edits.jsonl" and asked == [(folder, 3)]
    with pytest.raises(UserError, match="dataset.dir=nowhere: no such folder"):
        preparation.as_it_is(pictures | {"dir": "nowhere"}, work)
