"""Pairs: photographs under another light, what their figures compare, and resumption."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.manifest import read_manifest
from harmony.evaluation import pairs
from harmony.evaluation.pairs import Pairs
from harmony.evaluation.study import StudyRun
from harmony.methods.baselines import CopyPaste, Reinhard
from harmony.methods.method import Method, fingerprint
from harmony.methods.stored import Stored
from harmony.pixels.images import read_image, resize, write_image

ROOT = Path(__file__).resolve().parents[2]


class Truth(Method):
    """Knows the photographs: what a perfect method would return, at their size or at a backbone's."""

    relights = True

    def __init__(self, photographs: dict, resolution: int | None, calls: list):
        self.photographs, self.resolution, self.calls = photographs, resolution, calls

    @property
    def fingerprint(self):
        return fingerprint("truth", self.resolution)

    def relight(self, composites, seeds):
        return list(zip([c.copy_paste() for c in composites], self.fill(composites, seeds), strict=True))

    def fill(self, composites, seeds):
        self.calls += [c.name for c in composites]
        photographs = [self.photographs[c.name.removesuffix(pairs.AS_IT_IS)] for c in composites]
        return [pairs.crop_resize(p, c.crop, len(c.mask)) for p, c in zip(photographs, composites, strict=True)]


@pytest.fixture
def study(small_manifest, tmp_path):
    """Makes studies of copy and paste, Reinhard and the truth on renders; the names of what the truth was asked for."""
    manifest = small_manifest(tmp_path / "data")
    photographs = {row.id: read_image(manifest.parent / row.image) for row in read_manifest(manifest, "test")[1]}
    calls = []

    def build(options: dict) -> Method:
        match options["method"]:
            case "copy_paste":
                return CopyPaste()
            case "reinhard":
                return Reinhard()
            case "stored":
                return Stored(None, options["folder"])
            case _:
                return Truth(photographs, options.get("side"), calls)

    def make(**changes) -> Pairs:
        rows = {name: {"options": {"method": name}} for name in ("copy_paste", "reinhard", "truth")}
        rows["small"] = {"options": {"method": "truth", "side": 32}}
        rows["enlarged"] = {"options": {"method": "truth", "side": 32, "detail": "none"}}
        run = StudyRun("pairs", tmp_path / "run", prepare=lambda: manifest, build=build)
        return Pairs(**({"run": run, "rows": rows, "unchanged": 2} | changes))

    return make, calls


def test_figures_are_at_the_photographs_size(study):
    """Guards the protocol: the truth has no error, the light is another one, its change is carried to full size, and
    what is left as it was counts apart.
    """
    report = study[0]().measure()
    figures = report.figures
    assert figures["truth/fmse"] == 0 and figures["truth/unchanged/fmse"] == 0 and figures["truth/better"] == 1
    assert figures["truth/fpsnr"] == 100, "identical pictures count 100 dB"
    assert figures["copy_paste/fmse"] > 100 and figures["copy_paste/better"] == 0 == figures["copy_paste/gain"]
    assert figures["copy_paste/unchanged/fmse"] == 0 < figures["reinhard/unchanged/fmse"]
    assert figures["small/fmse"] < 0.5 * figures["copy_paste/fmse"], "the change alone comes from 32 pixels"
    assert figures["small/unchanged/fmse"] == 0 < figures["enlarged/unchanged/fmse"]
    assert figures["truth/gain"] == pytest.approx(figures["copy_paste/fmse"])
    assert all(figures[f"{row}/bg_drift"] == 0 for row in ("copy_paste", "reinhard", "truth", "small", "enlarged"))
    assert "as they are" in report.text and report.pictures[0].exists()


def test_what_is_measured_is_not_measured_again(study):
    """Guards resumption: a second run of the same study fills only the pictures of its figure."""
    make, calls = study
    first = make().measure()
    done, calls[:] = len(calls), []
    assert make().measure().figures == first.figures
    assert 0 < len(calls) < done
    other = make(unchanged=1)
    assert other.file("truth", range(1)) != make().file("truth", range(1))


def test_another_program_takes_part(study, tmp_path):
    """Guards inputs= and stored results: composites handed back are copy and paste itself; a background that moved is
    told; a photograph that is scaled counts as one.
    """
    make, _ = study
    inputs, results = tmp_path / "inputs", {name: tmp_path / name for name in ("same", "moved", "scaled")}
    rows = {"copy_paste": {"options": {"method": "copy_paste"}}}
    rows |= {name: {"options": {"method": "stored", "folder": str(folder)}} for name, folder in results.items()}
    make().write_inputs(inputs)
    files = sorted((inputs / "composites").iterdir())
    count = len(make().items)
    assert (
        len(files)
        == count
        == len(list((inputs / "masks").iterdir()))
        == len(json.loads((inputs / "captions.json").read_text()))
    )
    for file in files:
        picture = read_image(file)
        height, width = picture.shape[:2]
        write_image(results["same"] / file.name, picture)
        write_image(results["moved"] / file.name, np.roll(picture, 2, axis=1))
        write_image(results["scaled"] / file.name, resize(picture, 3 * width, 3 * height))
    figures = make(rows=rows).measure().figures
    assert figures["same/fmse"] == figures["copy_paste/fmse"] and figures["same/unchanged/fmse"] == 0
    assert figures["same/raw/shift"] == figures["same/raw/bg_drift"] == figures["same/bg_drift"] == 0
    assert figures["moved/raw/shift"] == pytest.approx(2, abs=0.2) and figures["moved/raw/bg_drift"] > 30
    assert figures["moved/bg_drift"] == 0 and figures["moved/fmse"] != figures["same/fmse"]
    make(run=StudyRun("pairs", tmp_path / "run", seed=7, prepare=lambda: make().run.manifest)).write_inputs(inputs)
    same = [np.array_equal(read_image(file), read_image(results["same"] / file.name)) for file in files]
    assert same == [pairs.AS_IT_IS in file.name for file in files], "another seed is another light"
    assert figures["scaled/raw/shift"] < 0.1 and abs(figures["scaled/fmse"] / figures["same/fmse"] - 1) < 0.1


def test_the_mirror_beyond_the_photograph_has_not_moved():
    """Guards raw/shift of a long object, whose square is larger than the photograph."""
    path = ROOT / "datasets" / "studio" / "test" / "data"
    photograph = read_image(sorted(path.iterdir())[0])[:, 40:90]
    mask = np.zeros(photograph.shape[:2], bool)
    mask[10:120, 20:30] = True
    pair = pairs.Pair(None, photograph, photograph, photograph, mask, True)
    insertion = pairs.cut(None, photograph, photograph, mask)
    assert insertion.crop.side > photograph.shape[1]
    moved = cv2.warpAffine(
        photograph, np.float32([[1, 0, 0.6], [0, 1, 0.4]]), photograph.shape[1::-1], borderMode=cv2.BORDER_REFLECT
    )
    figures = pairs.score(insertion.paste(pairs.crop_resize(moved, insertion.crop, insertion.crop.side)), pair)
    assert figures["raw/shift"] == pytest.approx(0.72, abs=0.1)


def test_a_shift_is_in_pixels_of_the_photograph():
    """Guards a column that methods of all sizes share."""
    photograph = read_image(sorted((ROOT / "datasets" / "studio" / "test" / "data").iterdir())[0])
    mask = np.zeros(photograph.shape[:2], bool)
    mask[10:120, 50:70] = True
    pair = pairs.Pair(None, photograph, photograph, photograph, mask, True)
    insertion = pairs.cut(None, photograph, photograph, mask)
    moved = np.roll(photograph, 4, axis=1)
    for side in (64, 128, 256):
        figures = pairs.score(insertion.paste(pairs.crop_resize(moved, insertion.crop, side)), pair)
        assert figures["raw/shift"] == pytest.approx(4, abs=0.3), side


def test_the_light_depends_on_the_seed_and_the_photograph_alone(small_manifest, tmp_path):
    manifest = small_manifest(tmp_path / "data")
    first, second = read_manifest(manifest, "test")[1][:2]

    def read(row, seed: int = 0, is_changed: bool = True) -> pairs.Pair:
        return pairs.read_pair(row, manifest.parent, seed, is_changed)

    assert np.array_equal(read(first).foreground, read(first).foreground)
    assert not np.array_equal(read(first).foreground, read(first, seed=1).foreground)
    assert np.array_equal(read(first, is_changed=False).foreground, read(first).photograph)
    assert read(first).photograph.shape == read(first).foreground.shape != ()
    assert read(second).row.id == second.id


def test_a_dataset_of_pairs_brings_its_composites(small_manifest, tmp_path, monkeypatch):
    """Guards iHarmony4's protocol: the composite itself is harmonized, and its own background does not count as
    drift; as it is, the photograph is used.
    """
    manifest = small_manifest(tmp_path / "data")
    row = read_manifest(manifest, "test")[1][0]
    row = replace(row, extras={"composite": row.extras["relit"], "composite_sha256": "1" * 64})
    pair, plain = (pairs.read_pair(row, manifest.parent, 0, changed) for changed in (True, False))
    composite = read_image(manifest.parent / row.extras["composite"])
    assert np.array_equal(pair.composite, composite) and np.array_equal(pair.foreground, composite)
    assert np.array_equal(plain.composite, pair.photograph)
    method = CopyPaste()
    result = pairs.insert(method, [pair.cut(method)], 0, 0, "none")[0]
    assert np.array_equal(result.image, composite)
    figures = pairs.score(result, pair)
    assert figures["bg_drift"] == 0 < figures["fmse"]
    monkeypatch.setattr(pairs, "LARGEST", 24)
    small = pairs.read_pair(row, manifest.parent, 0, True)
    assert small.composite.shape == small.photograph.shape and max(small.mask.shape) == 24


def test_large_photographs_are_measured_at_512_px(small_manifest, tmp_path, monkeypatch):
    manifest = small_manifest(tmp_path / "data")
    row = read_manifest(manifest, "test")[1][0]
    monkeypatch.setattr(pairs, "LARGEST", 24)
    pair = pairs.read_pair(row, manifest.parent, 0, True)
    assert max(pair.photograph.shape) == 24 and pair.mask.shape == pair.photograph.shape[:2] and pair.mask.any()


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"reinhard": {"options": {"method": "reinhard"}}}, "add copy_paste"),
        ({"copy_paste": {"picked": ["reinhard"]}}, "leave out best and picked"),
    ],
)
def test_rows_that_cannot_be_measured(study, rows, message):
    with pytest.raises(UserError, match=message):
        study[0](rows=rows)


def test_an_object_that_vanishes_is_left_out_for_all(study, monkeypatch):
    """Guards fairness: every row is measured on the same photographs; how many there are is said."""
    cut = pairs.Pair.cut

    def fail(pair, method):
        if method.resolution == 32 and pair.row.id == pair_id:
            raise UserError("too small")
        return cut(pair, method)

    make, _ = study
    pair_id = make().items[0][0].id
    monkeypatch.setattr(pairs.Pair, "cut", fail)
    report = make().measure()
    assert f"left out for all rows, such as {pair_id} for small: too small" in report.text
    assert report.figures["truth/fmse"] == 0
