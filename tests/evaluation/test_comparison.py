"""Studies: the same table from one process, from two, and from one that was killed; what the methods are."""

from dataclasses import replace

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.latent_cache import Example
from harmony.data.manifest import read_manifest
from harmony.evaluation import comparison as study
from harmony.evaluation.eval_sets import Bench, by_hints, degraded, pasted, relight_bench, scores
from harmony.methods.insert import Branch
from harmony.models.backbone import Kit
from harmony.pixels.composites import reinhard
from harmony.pixels.images import Crop, write_image
from harmony.pixels.masks import dilate
from harmony.sampling.guidance import Settings


@pytest.fixture(scope="module")
def bench():
    """Twenty items, so two blocks; background, instance and truth all differ."""
    rng, examples = np.random.default_rng(0), []
    for i in range(20):
        mask = np.zeros((32, 32), bool)
        mask[8 : 20 + i % 4, 10:22] = True
        examples.append(Example(rng.integers(0, 256, (32, 32, 3), np.uint8), mask, dilate(mask, 2), Crop(0, 0, 32)))
    others = [[rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in examples] for _ in range(2)]
    shadows = [np.roll(e.mask, 6, axis=1) for e in examples]
    return Bench("test", examples, ["a red mushroom"] * 20, *others, shadows)


def constant(name: str, calls: list, value: int = 7):
    """A method that counts how often it is asked for a picture, and gives its index."""

    def fill(part, indices):
        calls.extend((name, i) for i in indices)
        return [np.full((32, 32, 3), value + i, np.uint8) for i in indices]

    return study.Method(name, fill)


def quiet(line: str) -> None:
    pass


def test_what_is_finished_is_not_made_again(bench, tmp_path):
    """Guards resumption: killed in its second block, the same call makes the missing block and no other."""
    calls = []
    good = constant("a", calls)

    def fails(part, indices):
        if indices[0]:
            raise KeyboardInterrupt
        return good.fill(part, indices)

    with pytest.raises(KeyboardInterrupt):
        study.run(bench, [study.Method("a", fails)], tmp_path, say=quiet)
    assert calls == [("a", i) for i in range(16)]
    assert not list(tmp_path.rglob("*.partial"))
    study.run(bench, [good], tmp_path, say=quiet)
    assert calls == [("a", i) for i in range(20)]
    made = study.outputs(bench, good, tmp_path)
    assert [int(image[0, 0, 0]) for image in made] == [7 + i for i in range(20)]


def test_two_processes_make_what_one_makes(random_kit, awake, bench, tmp_path, monkeypatch):
    """Guards the shares: disjoint, complete, and the pictures of two processes are those of one, bit for bit."""
    kit = Kit(str(random_kit))
    net = Branch("color", awake(kit))
    methods = [
        study.Method("ours", by_hints(kit, [net], Settings(1, 2.0, batch=study.BLOCK))),
        study.baseline("reinhard"),
    ]
    study.run(bench, methods, tmp_path / "one", say=quiet)
    monkeypatch.setattr(study, "await_blocks", lambda files, say: None)  # the two take turns here
    study.run(bench, methods, tmp_path / "two", rank=1, world=2, say=quiet)
    half = len(list((tmp_path / "two").rglob("*.npy")))
    study.run(bench, methods, tmp_path / "two", rank=0, world=2, say=quiet)
    assert half == 2 and len(list((tmp_path / "two").rglob("*.npy"))) == 4
    for method in methods:
        pairs = zip(*(study.outputs(bench, method, tmp_path / name) for name in ("one", "two")), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    whole = by_hints(kit, [net], Settings(1, 2.0, batch=16))(bench)
    assert all(
        np.array_equal(a, b) for a, b in zip(whole, study.outputs(bench, methods[0], tmp_path / "one"), strict=True)
    )


def test_a_process_that_died_is_named(bench, tmp_path, monkeypatch):
    """Guards the wait: blocks that never come end in one line, not in a wait without end."""
    monkeypatch.setattr(study, "WAIT", 0)
    with pytest.raises(UserError, match="never came"):
        study.run(bench, [constant("a", [])], tmp_path, rank=0, world=2, say=quiet)


def test_baselines_put_the_instance_onto_the_background(bench):
    """Guards the composites: the object of ``instances`` on ``backgrounds``, nothing of the truth."""
    e, given, seen = bench.examples[3], bench.given()[3], bench.seen()[3]
    part = bench.part([3])
    (paste,) = study.baseline("copy_paste").fill(part, [3])
    assert np.array_equal(paste[e.mask], given[e.mask]) and np.array_equal(paste[~e.mask], seen[~e.mask])
    (recoloured,) = study.baseline("reinhard").fill(part, [3])
    assert np.array_equal(recoloured[e.mask], reinhard(given, e.mask, seen)[e.mask])
    assert np.array_equal(recoloured[~e.mask], seen[~e.mask])
    (blended,) = study.baseline("poisson").fill(part, [3])
    assert np.array_equal(blended[~e.mask], seen[~e.mask]) and not np.array_equal(blended, paste)
    with pytest.raises(UserError, match="choose one of copy_paste"):
        study.baseline("gimp")


def test_scores_compare_with_the_truth_and_drift_with_what_was_given(bench):
    """Guards the figures of relighting: error to the truth, drift from the plate, error in the cast shadow."""
    truth = scores(bench, bench.truths())
    assert all(row["fmse"] == row["shadow_mse"] == row["color_de"] == 0 and row["sharpness"] == 1 for row in truth)
    assert all(row["bg_drift"] > 0 for row in truth), "the truth's background is not the plate"
    back = scores(bench, pasted(bench, bench.truths()))
    assert all(row["bg_drift"] == 0 and row["fmse"] == 0 for row in back)
    plain = replace(bench, backgrounds=None, instances=None, shadows=None)
    assert all(row["bg_drift"] == 0 and "shadow_mse" not in row for row in scores(plain, plain.truths()))


def test_degraded_instances_lose_detail_alone(bench):
    """Guards Fig. 7 of Liu 2025: what the instance is taken from is blurred, the truth and the background stay."""
    cuts = [np.repeat(np.repeat(e.image[8:20, 10:22], 9, 0), 9, 1) for e in bench.examples]
    bench = replace(bench, examples=[replace(e, exemplar=c) for e, c in zip(bench.examples, cuts, strict=True)])
    poor = degraded(bench, 4)
    assert all(p.exemplar.shape == c.shape for p, c in zip(poor.examples, cuts, strict=True))
    assert all(p.exemplar.std() < 0.5 * c.std() for p, c in zip(poor.examples, cuts, strict=True)), "exemplars alike"
    assert all(np.array_equal(a, b) for a, b in zip(poor.truths(), bench.truths(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(poor.seen(), bench.seen(), strict=True))
    fine, coarse = (np.abs(np.diff(np.stack(b.given()).astype(int), axis=1)).mean() for b in (bench, poor))
    assert coarse < fine / 2


def test_relighting_takes_its_truth_from_the_studio(small_manifest, tmp_path):
    """Guards the bench: plate, object under light B and shadow of the same scene, hole by the radius that is asked."""
    manifest = small_manifest(tmp_path)
    near, wide = (relight_bench(manifest, "test", 32, radius=radius) for radius in (16, 96))
    assert len(near) >= 1
    for i, (a, b) in enumerate(zip(near.examples, wide.examples, strict=True)):
        assert np.array_equal(a.image, b.image) and a.hole.sum() < b.hole.sum() and a.hole[a.mask].all()
        far = ~wide.examples[i].hole & ~near.shadows[i]
        difference = np.abs(near.seen()[i].astype(int) - a.image)
        assert difference[a.mask].mean() > 2 * difference[far].mean(), "the plate is the truth without the object"
        assert np.abs(near.given()[i].astype(int) - a.image)[a.mask].mean() > 1


def test_a_shadow_may_fall_outside_of_the_picture(small_manifest, tmp_path):
    """Guards the bench: such a scene has no shadow to compare, and everything else."""
    manifest = small_manifest(tmp_path)
    row = next(r for r in read_manifest(manifest, "test")[1] if "shadow" in r.extras)
    write_image(tmp_path / "none.png", np.zeros((row.height, row.width), bool))
    manifest.write_text(manifest.read_text().replace(row.extras["shadow"], "none.png"))
    bench = relight_bench(manifest, "test", 32)
    first = scores(bench, bench.truths())[0]
    assert not bench.shadows[0].any() and np.isnan(first["shadow_mse"]) and first["fmse"] == 0


def test_a_dataset_without_truth_is_refused(tmp_path, small_manifest):
    """Guards the one line: relighting needs renders."""
    manifest = small_manifest(tmp_path)
    text = manifest.read_text().replace('"plate"', '"plot"')
    manifest.write_text(text)
    with pytest.raises(UserError, match="knows no truth for relighting"):
        relight_bench(manifest, "test", 32)
