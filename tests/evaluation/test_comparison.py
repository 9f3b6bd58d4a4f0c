"""Comparisons: the same outputs from one process, from two, and from one that was killed; what figures compare."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from harmony.core import pieces
from harmony.core.errors import UserError
from harmony.data.descriptions import Description
from harmony.data.manifest import read_manifest, write_manifest
from harmony.evaluation import blocks
from harmony.evaluation.blocks import fill_blocks, outputs_of
from harmony.evaluation.comparison import Comparison
from harmony.evaluation.eval_sets import EXEMPLAR, RECONSTRUCT, RELIGHT, EvalSet, degrade, load_relight, paste_outputs
from harmony.evaluation.figures import scores
from harmony.evaluation.study import StudyRun
from harmony.methods.baselines import CopyPaste, Poisson, Reinhard
from harmony.methods.inpainting import Branch, Inpainting
from harmony.methods.method import LIGHTS, Composite, Method, fingerprint, make_seeds
from harmony.methods.stored import Stored
from harmony.models.backbone import Backbone
from harmony.pixels.composites import reinhard
from harmony.pixels.images import Crop, crop_resize, read_image, write_image
from harmony.pixels.masks import dilate
from harmony.sampling.guidance import Settings


@pytest.fixture(scope="module")
def items():
    """Twenty items, so two blocks; background, instance and truth all differ."""
    rng, composites, truths = np.random.default_rng(0), [], []
    for i in range(20):
        mask = np.zeros((32, 32), bool)
        mask[8 : 20 + i % 4, 10:22] = True
        background, instance, truth = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
        cut = np.repeat(np.repeat(truth[8:20, 10:22], 9, 0), 9, 1)
        composites.append(Composite(background, instance, mask, dilate(mask, 2), "a red mushroom", cut, name=f"{i}"))
        truths.append(truth)
    return EvalSet("test", composites, truths, [np.roll(c.mask, 6, axis=1) for c in composites], RELIGHT)


class Constant(Method):
    """Counts how often it is asked for a picture, and gives its index."""

    resolution = 32

    def __init__(self, name: str, calls: list, fails: bool = False):
        self.name, self.calls, self.fails = name, calls, fails

    @property
    def fingerprint(self):
        return fingerprint(self.name)

    def fill(self, composites, seeds):
        if self.fails and seeds[0][1]:
            raise KeyboardInterrupt
        self.calls.extend((self.name, i) for _, i in seeds)
        return [np.full((32, 32, 3), 7 + i, np.uint8) for _, i in seeds]


def quiet(line: str) -> None:
    pass


def test_what_is_finished_is_not_made_again(items, tmp_path):
    """Guards resumption: killed in its second block, the same call makes the missing block and no other; a row that is
    equal to another one makes nothing.
    """
    calls = []
    good = Constant("a", calls)
    with pytest.raises(KeyboardInterrupt):
        fill_blocks(items, {"a": Constant("a", calls, fails=True)}, tmp_path, 0, say=quiet)
    assert calls == [("a", i) for i in range(16)]
    assert not list(tmp_path.rglob("*.partial"))
    fill_blocks(items, {"a": good, "equal": Constant("a", calls)}, tmp_path, 0, say=quiet)
    assert calls == [("a", i) for i in range(20)]
    outputs = outputs_of(items, good, tmp_path, 0)
    assert [int(image[0, 0, 0]) for image in outputs] == [7 + i for i in range(20)]


def test_outputs_are_never_mistaken(items, tmp_path):
    """Guards the place of an output: another seed, one pixel of one composite, a caption, another method."""
    calls = []
    other = replace(items.composites[5], caption="snow")
    dot = items.composites[5].background.copy()
    dot[0, 0, 0] ^= 1
    sets = [
        items,
        replace(items, composites=[*items.composites[:5], other, *items.composites[6:]]),
        replace(items, composites=[*items.composites[:5], replace(other, background=dot), *items.composites[6:]]),
    ]
    places = {blocks.folder_of(tmp_path, s, Constant(n, calls), seed) for s in sets for n in "ab" for seed in (0, 1)}
    assert len(places) == 12


def test_two_processes_make_what_one_makes(random_backbone, awake, items, tmp_path, monkeypatch):
    """Guards the shares: disjoint, complete, and the pictures of two processes are those of one, bit for bit."""
    backbone = Backbone(str(random_backbone))
    net = Branch("color", awake(backbone))
    rows = {"ours": Inpainting(backbone, [net], Settings(1, 2.0)), "reinhard": Reinhard(backbone)}
    fill_blocks(items, rows, tmp_path / "one", 0, say=quiet)
    monkeypatch.setattr(blocks, "await_files", lambda files, say: None)  # the two take turns here
    fill_blocks(items, rows, tmp_path / "two", 0, rank=1, world=2, say=quiet)
    half = len(list((tmp_path / "two").rglob("*.npy")))
    fill_blocks(items, rows, tmp_path / "two", 0, rank=0, world=2, say=quiet)
    assert half == 2 and len(list((tmp_path / "two").rglob("*.npy"))) == 4
    for method in rows.values():
        pairs = zip(*(outputs_of(items, method, tmp_path / name, 0) for name in ("one", "two")), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    whole = rows["ours"].fill(items.composites, make_seeds(0, range(20)))
    assert all(np.array_equal(*pair) for pair in zip(whole, outputs_of(items, rows["ours"], tmp_path / "one", 0)))


def test_a_process_that_died_is_named(items, tmp_path, monkeypatch):
    """Guards the wait: blocks that never come end in one line, not in a wait without end."""
    monkeypatch.setattr(pieces, "WAIT", 0)
    with pytest.raises(UserError, match="never came"):
        fill_blocks(items, {"a": Constant("a", [])}, tmp_path, 0, rank=0, world=2, say=quiet)


def test_baselines_put_the_instance_onto_the_background(items, random_backbone):
    """Guards the composites: the object of the instance on the background, nothing of the truth."""
    backbone, c = Backbone(str(random_backbone)), items.composites[3]
    (paste,), (recolored,), (blended,) = (m(backbone).fill([c], [(0, 3)]) for m in (CopyPaste, Reinhard, Poisson))
    assert np.array_equal(paste[c.mask], c.instance[c.mask])
    assert np.array_equal(recolored[c.mask], reinhard(c.instance, c.mask, c.background)[c.mask])
    assert all(np.array_equal(y[~c.mask], c.background[~c.mask]) for y in (paste, recolored, blended))
    assert not np.array_equal(blended, paste)


def test_results_of_other_programs_by_name(items, random_backbone, tmp_path):
    """Guards ``stored``: the square itself, or the whole photograph, cut as its composite was; what is missing or of
    another size is one line; other pictures are another fingerprint.
    """
    backbone, crop = Backbone(str(random_backbone)), Crop(10, 4, 20)
    square, whole = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    photograph = np.repeat(np.repeat(whole, 2, 0), 2, 1)[:40]  # 64 x 40
    write_image(tmp_path / "0.png", square)
    write_image(tmp_path / "1.png", photograph)
    write_image(tmp_path / "2.png", photograph[:30])
    composites = [replace(c, crop=crop, size=(64, 40)) for c in items.composites]
    stored = Stored(backbone, str(tmp_path))
    first, second = stored.fill(composites[:2], [(0, 0), (0, 1)])
    assert np.array_equal(first, square) and np.array_equal(second, crop_resize(photograph, crop, 32))
    with pytest.raises(UserError, match="2.png is 64 x 30: give the whole photograph .64x40. or its square"):
        stored.fill(composites[2:3], [(0, 2)])
    with pytest.raises(UserError, match="has no result for 3: put 3.png there"):
        stored.fill(composites[3:4], [(0, 3)])
    before = stored.fingerprint
    write_image(tmp_path / "0.png", whole)
    assert Stored(backbone, str(tmp_path)).fingerprint != before
    write_image(tmp_path / "1.jpg", photograph)
    stored = Stored(backbone, str(tmp_path))
    with pytest.raises(UserError, match="has 1.jpg and 1.png: keep one of them"):
        stored.fill(composites[1:2], [(0, 1)])
    assert np.array_equal(stored.fill(composites[:1], [(0, 0)])[0], whole), "others are not concerned"
    Image.fromarray(square).save(tmp_path / "3.avif", quality=100)
    (result,) = Stored(backbone, str(tmp_path)).fill(composites[3:4], [(0, 3)])
    assert np.abs(result.astype(int) - read_image(tmp_path / "3.avif")).max() == 0
    with pytest.raises(UserError, match="no such folder of results"):
        Stored(backbone, str(tmp_path / "nowhere"))


def test_scores_compare_with_the_truth_and_drift_with_what_was_given(items):
    """Guards the figures of relighting: error to the truth, drift from the plate, error in the cast shadow."""
    truth = scores(items, items.truths)
    assert all(row["fmse"] == row["shadow_mse"] == row["color_de"] == 0 and row["sharpness"] == 1 for row in truth)
    assert all(row["bg_drift"] > 0 for row in truth), "the truth's background is not the plate"
    back = scores(items, paste_outputs(items, items.truths))
    assert all(row["bg_drift"] == 0 and row["fmse"] == 0 for row in back)
    own = [replace(c, background=t, instance=t) for c, t in zip(items.composites, items.truths, strict=True)]
    plain = EvalSet("test", own, items.truths, None, RECONSTRUCT)
    assert all(row["bg_drift"] == 0 and "shadow_mse" not in row for row in scores(plain, plain.truths))


def test_degraded_instances_lose_detail_alone(items):
    """Guards Fig. 7 of Liu 2025: what the instance is taken from is blurred, the truth and the background stay."""
    poor = degrade(items, 4)
    exemplars = [[c.exemplar for c in s.composites] for s in (items, poor)]
    assert all(p.shape == c.shape and p.std() < 0.5 * c.std() for c, p in zip(*exemplars, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(poor.truths, items.truths, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(poor.backgrounds, items.backgrounds, strict=True))
    fine, coarse = (np.abs(np.diff(np.stack(s.instances).astype(int), axis=1)).mean() for s in (items, poor))
    assert coarse < fine / 2


def test_relighting_takes_its_truth_from_the_studio(small_manifest, tmp_path):
    """Guards the bench: plate, object under light B and shadow of the same scene, hole by the radius that is asked."""
    manifest = small_manifest(tmp_path)
    near, wide = (load_relight(manifest, "test", 32, radius=radius) for radius in (16, 96))
    assert len(near) >= 1
    for i, (a, b) in enumerate(zip(near.composites, wide.composites, strict=True)):
        truth = near.truths[i]
        assert np.array_equal(truth, wide.truths[i]) and a.hole.sum() < b.hole.sum() and a.hole[a.mask].all()
        far = ~b.hole & ~near.shadows[i]
        difference = np.abs(a.background.astype(int) - truth)
        assert difference[a.mask].mean() > 2 * difference[far].mean(), "the plate is the truth without the object"
        assert np.abs(a.instance.astype(int) - truth)[a.mask].mean() > 1


def test_a_shadow_may_fall_outside_of_the_picture(small_manifest, tmp_path):
    """Guards the bench: such a scene has no shadow to compare, and everything else."""
    manifest = small_manifest(tmp_path)
    row = next(r for r in read_manifest(manifest, "test")[1] if "shadow" in r.extras)
    write_image(tmp_path / "none.png", np.zeros((row.height, row.width), bool))
    manifest.write_text(manifest.read_text().replace(row.extras["shadow"], "none.png"))
    items = load_relight(manifest, "test", 32)
    first = scores(items, items.truths)[0]
    assert not items.shadows[0].any() and np.isnan(first["shadow_mse"]) and first["fmse"] == 0


def test_a_dataset_without_truth_is_refused(tmp_path, small_manifest):
    """Guards the one line: relighting needs renders."""
    manifest = small_manifest(tmp_path)
    text = manifest.read_text().replace('"plate"', '"plot"')
    manifest.write_text(text)
    with pytest.raises(UserError, match="knows no truth for relighting"):
        load_relight(manifest, "test", 32)


def test_rows_that_need_validation_are_left_out_without_it(small_manifest, tmp_path):
    """Guards small datasets: what chooses on validation, and what picks from it, is left out with a line; what picks
    from a row that there is not is a mistake as before.
    """
    header, rows = read_manifest(small_manifest(tmp_path))
    write_manifest(tmp_path / "manifest.jsonl", [row for row in rows if row.split != "validation"], "small")
    run = StudyRun("t", tmp_path, prepare=lambda: tmp_path / "manifest.jsonl", build=lambda o: Constant(o["name"], []))
    plain, chosen = {"options": {"name": "plain"}}, {"options": {"name": "best"}, "best": ["lambda_l"]}
    rows = {"plain": plain, "best": chosen, "pick": {"picked": ["plain", "best"]}}
    options = dict.fromkeys(("against", "radius", "degrade", "sweep", "pairs", "figure", "hidden", "drawn", "paper"))
    study = Comparison(run, RECONSTRUCT, rows, **options | {"lambdas": [0.5, 1.0], "degrade": [1]})
    assert list(study.methods()) == ["plain"] and study.parts == 1
    assert study.notes == [
        "best: left out, it chooses on validation pictures, of which the dataset has none",
        "pick: left out, it picks from best",
    ]
    study = Comparison(run, RECONSTRUCT, {"pick": {"picked": ["nobody"]}}, **options | {"lambdas": []})
    with pytest.raises(UserError, match="study.rows.pick picks among rows above it: nobody is none"):
        study.methods()


class Worded(Constant):
    """Needs words for both lights."""

    wants = frozenset({LIGHTS})


def test_what_needs_words_is_left_out_without_them(tmp_path, items):
    """Guards relighting on pairs, whose captions name no lights: one line instead of the end of the study."""
    run = StudyRun("t", tmp_path, prepare=lambda: tmp_path / "manifest.jsonl")
    options = dict.fromkeys(
        ("against", "radius", "degrade", "sweep", "pairs", "figure", "hidden", "drawn", "paper", "lambdas")
    )
    study, methods = Comparison(run, RELIGHT, {}, **options), {"told": Worded("a", []), "plain": Constant("b", [])}
    assert list(study.fitting(methods, items)) == ["plain"]
    assert study.notes == ["told: left out, the dataset has no words for both lights"]
    words = [replace(c, lights=(Description("a cow,", "noon light", "sunset light"),)) for c in items.composites]
    assert study.fitting(methods, replace(items, composites=words)) == methods


def test_a_bench_of_composition_is_measured_on_its_own_exemplars(small_manifest, random_backbone, tmp_path):
    """Guards COCOEE: its exemplars, not the nearest of the split, are painted; without a train split its backgrounds
    stand for real pictures, which is said.
    """
    manifest = small_manifest(tmp_path)
    pictures = [row for row in read_manifest(manifest)[1]][:5]
    rows = [replace(row, id=f"{i}", split="test", extras={"exemplar": row.image}) for i, row in enumerate(pictures)]
    write_manifest(manifest, rows, "cocoee")
    run = StudyRun("t", tmp_path, prepare=lambda: manifest, load=lambda: Backbone(str(random_backbone)))
    names = ("against", "radius", "degrade", "sweep", "pairs", "figure", "hidden", "drawn", "paper", "lambdas")
    options = dict.fromkeys(names)
    study = Comparison(run, EXEMPLAR, {}, **options)
    items = study.load("test")
    assert len(items) == 5 and items.kind == EXEMPLAR and not study.notes
    for c, row in zip(items.composites, rows, strict=True):
        assert np.array_equal(c.exemplar, read_image(manifest.parent / row.image)) and c.hole[c.mask].all()
    assert study.measures(items).real == items.backgrounds
    assert study.notes == ["no train split: clip_fid, fid, kid and qs_own compare with the bench's own backgrounds"]
    with pytest.raises(UserError, match="3 real pictures: qs_own needs 4 at least"):
        study.measures(items.part([0, 1, 2]))
    with pytest.raises(UserError, match="knows no truths, its objects come from other pictures: use experiment=exe"):
        Comparison(run, RECONSTRUCT, {}, **options).load("test")
