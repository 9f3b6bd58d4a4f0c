"""The reconstruction benchmark: which pictures, in which order, and what its figures mean."""

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.latent_cache import Example
from harmony.data.manifest import read_manifest
from harmony.evaluation.eval_sets import Bench, Fidelity, by_hints, enough, load_bench, relight_bench
from harmony.methods.insert import Branch
from harmony.models.backbone import Kit
from harmony.models.clip import kit_clip
from harmony.models.features import KitFeatures, feature_extractor
from harmony.pixels.images import Crop
from harmony.pixels.masks import dilate
from harmony.sampling.guidance import Settings

NAMES = {"psnr", "mse", "fpsnr", "fmse", "bg_drift", "edge_f1", "color_de", "seam", "fid", "kid", "clip_i", "clip_t"}


@pytest.fixture(scope="module")
def kit(random_kit):
    return Kit(str(random_kit))


@pytest.fixture(scope="module")
def bench():
    rng, examples = np.random.default_rng(0), []
    for i in range(4):
        mask = np.zeros((32, 32), bool)
        mask[8 : 20 + i, 10:22] = True
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        examples.append(Example(image, mask, dilate(mask, 2), Crop(0, 0, 32)))
    return Bench("test", examples, ["a red mushroom", "a blue car", "snow", ""])


def test_a_perfect_reconstruction(kit, bench):
    numbers = Fidelity(bench, KitFeatures(kit.image_encoder), kit_clip(kit)).figures(bench.truths())
    assert {name for name in numbers if name.startswith("test/raw/")} >= {f"test/raw/{name}" for name in NAMES}
    for kind in ("raw", "pasted"):
        assert numbers[f"test/{kind}/mse"] == numbers[f"test/{kind}/color_de"] == numbers[f"test/{kind}/bg_drift"] == 0
        assert numbers[f"test/{kind}/edge_f1"] == 1
        assert numbers[f"test/{kind}/fid"] == pytest.approx(0, abs=1e-6)
        assert numbers[f"test/{kind}/clip_i"] == pytest.approx(100) and abs(numbers[f"test/{kind}/clip_t"]) < 100


def test_pasting_back_mends_the_background_and_nothing_else(kit, bench):
    outputs = [np.roll(e.image, 1, axis=0) for e in bench.examples]
    numbers = Fidelity(bench, KitFeatures(kit.image_encoder)).figures(outputs)
    assert "test/raw/clip_i" not in numbers, "a kit without an image tower has no CLIP score"
    assert numbers["test/raw/bg_drift"] > 100
    assert numbers["test/pasted/bg_drift"] == 0
    assert numbers["test/raw/fmse"] == numbers["test/pasted/fmse"] > 100
    assert numbers["test/raw/mse"] > numbers["test/pasted/mse"]


def test_reconstruction_keeps_the_order(kit, bench, awake):
    branch = Branch("color", awake(kit))
    outputs = by_hints(kit, [branch], Settings(2, 2.0, 0, batch=3))(bench)
    assert len(outputs) == 4 and {y.shape for y in outputs} == {(32, 32, 3)}
    first = Bench("test", bench.examples[:1], bench.prompts[:1])
    alone = by_hints(kit, [branch], Settings(2, 2.0))(first)[0]
    assert np.abs(outputs[0].astype(int) - alone).max() <= 1


def test_pictures_are_spread_over_the_split(small_manifest, tmp_path):
    manifest = small_manifest(tmp_path)
    rows = read_manifest(manifest, "train")[1]
    every, few = load_bench(manifest, "train", 32), load_bench(manifest, "train", 32, limit=3)
    assert every.name == "train" and len(every.examples) == len(rows)
    assert few.prompts[0] == rows[0].caption and few.prompts[-1] == rows[-1].caption
    assert len(few.examples) == 3
    for e in few.examples:
        assert e.image.shape == (32, 32, 3) and e.hole[e.mask].all() and e.hole.sum() > e.mask.sum()
    again = load_bench(manifest, "train", 32, limit=3)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(few.examples, again.examples, strict=True))


def test_the_words_for_both_lights_travel_with_the_manifest(small_manifest, tmp_path):
    """Guards manifests that are moved: the words are those of the row and of its extras, not of files elsewhere; there
    are none where a captioner's words stand in place of the renderer's.
    """
    manifest = small_manifest(tmp_path)
    row = next(row for row in read_manifest(manifest, "test")[1] if "plate" in row.extras)
    first = relight_bench(manifest, "test", 32).lights[0]
    (subject, _, light), (_, _, relit) = (text.rpartition(", ") for text in (row.caption, row.extras["relit_caption"]))
    assert (first.object, first.foreground, first.background) == (f"{subject},", relit, light) and relit != light
    text = manifest.read_text()
    manifest.write_text(text.replace(row.extras["relit_caption"], f"{subject}, green light"))
    assert relight_bench(manifest, "test", 32).lights[0].foreground == "green light"
    manifest.write_text(text.replace('"relit_caption"', '"caption_source": "blip", "relit_caption"'))
    assert relight_bench(manifest, "test", 32).lights is None


def test_one_picture_is_refused_before_it_is_painted(bench):
    """Guards limit=1: a distance between two sets wants two pictures."""
    with pytest.raises(UserError, match="fid needs two at least"):
        enough(bench.part([0]))


def test_features_say_what_they_are(kit):
    assert feature_extractor(kit).protocol in ("kit-clip", "inception-clean")
