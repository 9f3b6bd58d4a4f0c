"""Eval sets: which pictures, in which order, and what their figures mean."""

from dataclasses import replace

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.manifest import read_manifest, write_manifest
from harmony.evaluation.eval_sets import EvalSet, enough, load_reconstruct, load_relight
from harmony.evaluation.figures import Fidelity
from harmony.methods.inpainting import Branch, Inpainting
from harmony.methods.method import Composite, make_seeds
from harmony.models.backbone import Backbone
from harmony.models.clip import backbone_clip
from harmony.models.features import BackboneFeatures, feature_extractor
from harmony.pixels.masks import dilate
from harmony.sampling.guidance import Settings

NAMES = {"psnr", "mse", "fpsnr", "fmse", "bg_drift", "edge_f1", "color_de", "seam", "fid", "kid", "clip_i", "clip_t"}


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def items():
    rng, composites = np.random.default_rng(0), []
    for i, caption in enumerate(("a red mushroom", "a blue car", "snow", "")):
        mask = np.zeros((32, 32), bool)
        mask[8 : 20 + i, 10:22] = True
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        composites.append(Composite(image, image, mask, dilate(mask, 2), caption))
    return EvalSet("test", composites, [c.background for c in composites])


def test_a_perfect_reconstruction(backbone, items):
    ruler = Fidelity(items, BackboneFeatures(backbone.image_encoder), backbone_clip(backbone))
    numbers = ruler.measure(items.truths).means
    assert {name for name in numbers if name.startswith("test/raw/")} >= {f"test/raw/{name}" for name in NAMES}
    for kind in ("raw", "pasted"):
        assert numbers[f"test/{kind}/mse"] == numbers[f"test/{kind}/color_de"] == numbers[f"test/{kind}/bg_drift"] == 0
        assert numbers[f"test/{kind}/edge_f1"] == numbers[f"test/{kind}/ssim"] == 1
        assert numbers[f"test/{kind}/fid"] == pytest.approx(0, abs=1e-6)
        assert numbers[f"test/{kind}/clip_i"] == pytest.approx(100) and abs(numbers[f"test/{kind}/clip_t"]) < 100


def test_pasting_back_mends_the_background_and_nothing_else(backbone, items):
    outputs = [np.roll(truth, 1, axis=0) for truth in items.truths]
    numbers = Fidelity(items, BackboneFeatures(backbone.image_encoder)).measure(outputs).means
    assert "test/raw/clip_i" not in numbers, "a backbone without an image tower has no CLIP score"
    assert numbers["test/raw/bg_drift"] > 100
    assert numbers["test/pasted/bg_drift"] == 0 and numbers["test/raw/shift"] == pytest.approx(1, abs=0.05)
    assert numbers["test/raw/fmse"] == numbers["test/pasted/fmse"] > 100
    assert numbers["test/raw/mse"] > numbers["test/pasted/mse"]


def test_reconstruction_keeps_the_order(backbone, items, awake):
    branch = Branch("color", awake(backbone))
    outputs = Inpainting(backbone, [branch], Settings(2, 2.0, batch=3)).fill(items.composites, make_seeds(0, range(4)))
    assert len(outputs) == 4 and {y.shape for y in outputs} == {(32, 32, 3)}
    alone = Inpainting(backbone, [branch], Settings(2, 2.0)).fill(items.composites[:1], make_seeds(0, [0]))[0]
    assert np.abs(outputs[0].astype(int) - alone).max() <= 1


def test_pictures_are_spread_over_the_split(small_manifest, tmp_path):
    manifest = small_manifest(tmp_path)
    rows = read_manifest(manifest, "train")[1]
    every, few = load_reconstruct(manifest, "train", 32), load_reconstruct(manifest, "train", 32, limit=3)
    assert every.name == "train" and len(every) == len(rows)
    assert few.captions[0] == rows[0].caption and few.captions[-1] == rows[-1].caption
    assert len(few) == 3 and few.composites[0].name == rows[0].id
    assert not any(c.is_photograph for c in every.composites), "these have a relit twin, as renders alone do"
    for c, truth in zip(few.composites, few.truths, strict=True):
        assert truth.shape == (32, 32, 3) and c.hole[c.mask].all() and c.hole.sum() > c.mask.sum()
    again = load_reconstruct(manifest, "train", 32, limit=3)
    assert few.fingerprint == again.fingerprint != every.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(few.truths, again.truths, strict=True))


def test_the_words_for_both_lights_travel_with_the_manifest(small_manifest, tmp_path):
    """Guards manifests that are moved: the words are those of the row and of its extras, not of files elsewhere; there
    are none where a captioner's words stand in place of the renderer's.
    """
    manifest = small_manifest(tmp_path)
    row = next(row for row in read_manifest(manifest, "test")[1] if "plate" in row.extras)
    first = load_relight(manifest, "test", 32).composites[0].lights[0]
    (subject, _, light), (_, _, relit) = (text.rpartition(", ") for text in (row.caption, row.extras["relit_caption"]))
    assert (first.object, first.foreground, first.background) == (f"{subject},", relit, light) and relit != light
    text = manifest.read_text()
    manifest.write_text(text.replace(row.extras["relit_caption"], f"{subject}, green light"))
    assert load_relight(manifest, "test", 32).composites[0].lights[0].foreground == "green light"
    manifest.write_text(text.replace('"relit_caption"', '"caption_source": "blip", "relit_caption"'))
    assert not any(c.lights for c in load_relight(manifest, "test", 32).composites)


def test_pairs_are_relit_against_their_photographs(small_manifest, tmp_path):
    """Guards datasets of pairs: the composite is all that is given, the photograph is the truth, there is no shadow."""
    manifest = small_manifest(tmp_path)
    rows = [row for row in read_manifest(manifest, "test")[1] if "plate" in row.extras]
    pairs = [replace(row, extras={"composite": row.extras["relit"]}) for row in rows]
    write_manifest(manifest, pairs, "pairs")
    items = load_relight(manifest, "test", 32)
    assert len(items) == len(rows) and items.shadows is None and items.kind == "relight"
    for c, truth, own in zip(
        items.composites, items.truths, load_reconstruct(manifest, "test", 32).truths, strict=True
    ):
        assert np.array_equal(truth, own) and np.array_equal(c.background, c.instance)
        assert not np.array_equal(c.instance, truth) and c.is_photograph and not c.lights
    write_manifest(manifest, [replace(row, extras={}) for row in rows], "folder")
    with pytest.raises(UserError, match="knows no truth for relighting .*dataset=studio or dataset=pairs"):
        load_relight(manifest, "test", 32)


def test_one_picture_is_refused_before_it_is_painted(items):
    """Guards limit=1: a distance between two sets wants two pictures."""
    with pytest.raises(UserError, match="fid needs two at least"):
        enough(items.part([0]))


def test_features_say_what_they_are(backbone):
    assert feature_extractor(backbone).protocol in ("backbone-clip", "inception-clean")
