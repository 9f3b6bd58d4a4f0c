"""The bench of edits: its cases and concepts are pure functions of their numbers, and the bundled files are whole."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.sources import editing
from harmony.data.sources.editing import CONCEPTS, START, Case, concept_scene, concepts, edit_scene, read_cases
from harmony.data.sources.studio.rendering import Frames
from harmony.data.sources.studio.scenes import COLORS, LIGHTS, NOVEL, scene
from harmony.data.sources.studio.shapes import KINDS
from harmony.metrics.fidelity import psnr
from harmony.pixels.images import read_image, resize

BUNDLED = Path(__file__).resolve().parents[2] / "datasets" / "editing"
SCENES = [s for s in (scene(START + i) for i in range(256)) if s.split == "test"]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return read_cases(BUNDLED / "edits.jsonl")


# --- what is bundled


def test_the_bundled_cases(cases):
    """Guards the bench: 48 scenes of the test split, each with another color, kind and light, and nothing else."""
    assert len(cases) == 144 and len({(case.id, case.word) for case in cases}) == 144
    assert [case.id for case in cases[::3]] == [s.id for s in SCENES[:48]]
    assert [case.word for case in cases] == ["color", "kind", "light"] * 48
    for case in cases:
        (article, color, kind, *ground), light = (part.split() for part in case.source.split(","))
        (article_, color_, kind_, *ground_), light_ = (part.split() for part in case.target.split(","))
        assert (article, ground) == (article_, ground_) and {color, color_} <= {*COLORS} and {kind, kind_} <= {*KINDS}
        assert {" ".join(light), " ".join(light_)} <= {known.words for known in LIGHTS.values()}
        changed = {"color": color != color_, "kind": kind != kind_, "light": light != light_}
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
    dataset names their colors.
    """
    found = concepts(BUNDLED)
    assert set(found) == {f"{color}_{kind}" for color, kind in CONCEPTS} and len(CONCEPTS) == 8
    for color, kind in CONCEPTS:
        assert color in NOVEL and color not in COLORS and kind in KINDS
        seen, held_out = found[f"{color}_{kind}"]
        assert [path.name for path in seen] == [f"{n}.jpg" for n in range(5)]
        assert [path.name for path in held_out] == [f"{n}.jpg" for n in range(5, 8)]
        for pictures in (seen, held_out):
            said = json.loads((pictures[0].parent / "captions.json").read_text())
            assert [*said] == [path.stem for path in pictures]
            for path in pictures:
                whole = concept_scene(color, kind, int(path.stem)).caption()
                assert said[path.stem].count("{}") == 1 and said[path.stem].format(f"{color} {kind}") == whole
                assert read_image(path).shape == (64, 64, 3)


def test_the_bench_is_small():
    """Guards the repository's size."""
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 2 * 2**20


# --- scenes


def test_an_edit_changes_one_thing():
    """Guards ``edit_scene``: the same every time, one field of the scene (both lights swap), never to itself."""
    for s in SCENES[:16]:
        edits = edit_scene(s)
        assert edits == edit_scene(scene(s.index)) and [*edits] == ["color", "kind", "light"]
        for word, edited in edits.items():
            differ = {name for name, value in vars(s).items() if getattr(edited, name) != value}
            assert differ == ({"light": {"light", "relight"}, "kind": {"kind"}, "color": {"color"}}[word])
        assert edits["light"].light == s.relight and edits["light"].relight == s.light
        assert edits["color"].color in COLORS and edits["kind"].kind in KINDS
    assert len({edit_scene(s)["kind"].kind for s in SCENES[:16]}) > 4


def test_a_concept_is_seen_from_eight_sides():
    """Guards concept_scene: the same every time, alone and matte, by daylight, no view twice, no scene of the cases."""
    views = {}
    for color, kind in CONCEPTS:
        for n in range(8):
            s = views[color, kind, n] = concept_scene(color, kind, n)
            assert (s.color, s.kind, s.finish, s.others) == (color, kind, "matte", ())
            assert s.light in ("noon", "overcast", "sunset") and s == concept_scene(color, kind, n)
    assert len({s.id for s in views.values()}) == 64 == len({(s.yaw, s.camera) for s in views.values()})
    assert not {s.id for s in views.values()} & {s.id for s in SCENES}
    for color, kind in CONCEPTS:
        assert len({views[color, kind, n].ground for n in range(5)}) == 5, "what is learnt is no ground"


def test_a_case_agrees_with_the_bundled_one(cases, tmp_path, monkeypatch):
    """Guards the renderer: a scene and its edits are still those of the bundled files, its cases the lines there."""
    pytest.importorskip("mitsuba", reason="needs the extra: pip install -e '.[studio]'")
    monkeypatch.setattr(editing, "SIDE", 32)
    monkeypatch.setattr(editing, "SAMPLES", 16)
    editing.render_case(SCENES[0], tmp_path)
    assert editing.scene_cases(SCENES[0]) == cases[:3]
    for case in cases[:3]:
        for name in (case.image, case.truth):
            assert psnr(resize(read_image(BUNDLED / name), 32, 32), read_image(tmp_path / name)) > 25, name
        if case.mask:
            mask, bundled = (read_image(root / case.mask)[..., 0] > 0 for root in (tmp_path, BUNDLED))
            assert (mask & bundled[::2, ::2]).sum() / (mask | bundled[::2, ::2]).sum() > 0.8
    editing.render_concept(("teal", "mug", 6), tmp_path)
    bundled = read_image(BUNDLED / "held_out" / "teal_mug" / "6.jpg")
    assert psnr(resize(bundled, 32, 32), read_image(tmp_path / "held_out" / "teal_mug" / "6.jpg")) > 25


def test_generate_writes_what_is_read(tmp_path, monkeypatch, render_here):
    """Guards the layout: cases, pictures and concepts are found again; a stopped rendering goes on where it was."""
    rendered, interrupted = [], []

    def render(s, side, samples, plate):
        if len(rendered) == 7 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        rendered.append(s)
        pixels = np.full((side, side, 3), 9 * len(rendered) % 256, np.uint8)
        mask = np.zeros((side, side), bool)
        mask[:, len(rendered) % side] = True
        return Frames(pixels, 255 - pixels, mask)

    monkeypatch.setattr(editing, "render", render)
    with pytest.raises(KeyboardInterrupt):
        editing.generate(tmp_path, 2)
    assert editing.generate(tmp_path, 2) == tmp_path
    made = read_cases(tmp_path / "edits.jsonl")
    assert [case.id for case in made] == [s.id for s in SCENES[:2] for _ in range(3)]
    assert made == read_cases(BUNDLED / "edits.jsonl")[:6] and len(rendered) == 2 * 3 + 64
    for case in made:
        assert all((tmp_path / name).is_file() for name in (case.image, case.truth, case.mask) if name)
    joint = read_image(tmp_path / made[0].mask)[..., 0] > 0
    assert joint.any(0).sum() == 2, "where the object is, and where it will be"
    assert {name: tuple(map(len, pictures)) for name, pictures in concepts(tmp_path).items()} == {
        f"{color}_{kind}": (5, 3) for color, kind in CONCEPTS
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
        ('{"schema": 2, "count": 0}\n', "has schema 2, this version reads 1: render it again"),
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


@pytest.mark.parametrize("name", ["image", "truth", "mask"])
def test_files_of_cases_are_in_their_folder(tmp_path, cases, name):
    """Guards foreign lists: no picture is read from outside the folder; U+2028 may stand in a caption."""
    case = asdict(replace(cases[0], source="a\u2028b"))
    for change in ({}, {name: "../x.png"}, {name: "/etc/x.png"}):
        lines = [{"schema": 1, "count": 1}, case | change]
        (tmp_path / "edits.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
        if not change:
            assert read_cases(tmp_path / "edits.jsonl")[0].source == "a\u2028b"
            continue
        with pytest.raises(UserError, match="x.png' leads out of"):
            read_cases(tmp_path / "edits.jsonl")
