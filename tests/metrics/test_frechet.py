"""Frechet and kernel distances: golden values, singular covariances, and clean-fid's own figure."""

from types import SimpleNamespace

import cleanfid.fid
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from harmony.core.errors import UserError
from harmony.metrics import frechet
from harmony.metrics.frechet import Statistics, frechet_distance, kid
from harmony.models.features import INCEPTION_FILE, BackboneFeatures, inception_features
from harmony.pixels import images


def features(n, dim, seed=0, shift=0.0, scale=1.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def stats(x):
    return Statistics(x.shape[1]).update(x)


def pictures(n, seed=0, tint=0, side=48):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (n, 6, 6, 3), dtype=np.uint8) + np.uint8(tint)
    return [image.repeat(side // 6, 0).repeat(side // 6, 1) for image in coarse]


@pytest.fixture(scope="module")
def backbone_features():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    return BackboneFeatures(CLIPVisionModelWithProjection(config).eval())


# --- statistics


def test_streaming_equals_numpy():
    x = features(57, 5, shift=3)
    streamed = Statistics(5)
    for part in x.split(10):
        streamed.update(part)
    assert torch.allclose(streamed.mean, x.double().mean(0))
    assert np.allclose(streamed.cov, np.cov(x.double().numpy(), rowvar=False))
    assert int(streamed.n) == 57


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        _ = stats(features(1, 3)).cov


# --- distances


def gaussian(mean, variance):
    return SimpleNamespace(mean=torch.tensor(mean).double(), cov=torch.tensor(variance).double())


def test_frechet_golden_values():
    assert frechet_distance(gaussian([0.0], [[4.0]]), gaussian([3.0], [[9.0]])) == pytest.approx(10)
    a, b = gaussian([0.0, 1.0], [[4.0, 0.0], [0.0, 1.0]]), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 25.0]])
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frechet_agrees_with_the_matrix_root_and_is_symmetric():
    a, b = stats(features(200, 12)), stats(features(200, 12, seed=1, shift=0.3, scale=1.4))
    theirs = cleanfid.fid.frechet_distance(a.mean.numpy(), a.cov.numpy(), b.mean.numpy(), b.cov.numpy())
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6) == pytest.approx(frechet_distance(b, a))


def test_singular_covariances_are_fine():
    x = features(10, 256)
    a, b = stats(x), stats(features(10, 256, seed=1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(a, stats(x + 2)) == pytest.approx(4 * 256, rel=1e-4)
    assert np.isfinite(frechet_distance(a, b)) and frechet_distance(a, b) > 100


def test_kid_is_unbiased_and_sees_a_shift():
    same = [kid(features(60, 8, seed=s), features(60, 8, seed=s + 100)) for s in range(30)]
    assert min(same) < 0 and abs(np.mean(same)) < 3 * np.std(same) / 30**0.5
    assert kid(features(60, 8), features(60, 8, seed=1, shift=1)) > 10 * max(same)


def test_kid_by_hand_and_by_seed():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [0.0]])
    assert kid(x, y) == pytest.approx(1 + 1 - (1 + 1 + 27 + 1) / 2)  # k(u, v) = (uv + 1)^3
    many = features(80, 4), features(90, 4, seed=1)
    assert kid(*many, subsets=3, subset_size=20) == kid(*many, subsets=3, subset_size=20)
    assert kid(*many, subsets=3, subset_size=20) != kid(*many, subsets=3, subset_size=20, seed=1)
    with pytest.raises(ValueError, match="at least 2"):
        kid(x[:1], y)


# --- features


def test_clean_resize_is_not_rounded():
    resized = frechet.clean_resize(pictures(3), 20)
    assert resized.shape == (3, 3, 20, 20) and resized.dtype == torch.float32
    assert 0 <= resized.min() and resized.max() <= 255 and (resized != resized.round()).any()


def test_backbone_features_are_pooled_before_the_projection(backbone_features):
    x = frechet.clean_resize(pictures(2), 32)
    assert backbone_features.protocol == "backbone-clip" and backbone_features.size == 32
    assert backbone_features(x).shape == (2, 16)
    model = backbone_features.model
    projected = model(pixel_values=frechet.normalize_clip(x, 32)).image_embeds
    assert torch.allclose(model.visual_projection(backbone_features(x)), projected, atol=1e-5)
    assert backbone_features(frechet.clean_resize(pictures(2), 299)).shape == (2, 16)


def test_normalize_clip_takes_255():
    white = frechet.normalize_clip(torch.full((1, 3, 4, 4), 255.0), 4)
    expected = [(1 - mean) / std for mean, std in zip(images.CLIP_MEAN, images.CLIP_STD, strict=True)]
    assert torch.allclose(white[0, :, 0, 0], torch.tensor(expected))


def test_batches_do_not_change_features(backbone_features):
    stream = iter(pictures(7))
    batched = frechet.extract(stream, backbone_features, 32, batch=3)
    assert batched.shape == (7, 16)
    assert torch.allclose(batched, frechet.extract(pictures(7), backbone_features, 32, batch=7), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("size", [32, 299])
def test_same_figure_as_clean_fid(tmp_path, backbone_features, size):
    """clean-fid on two folders with our extractor, at the extractor's own side and at clean-fid's 299."""
    sets = pictures(40), pictures(40, seed=1, tint=40)
    for name, pictures_of_set in zip("ab", sets, strict=True):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures_of_set):
            images.write_image(tmp_path / name / f"{i:02}.png", picture)
    resizer = None if size == 299 else cleanfid.fid.make_resizer("PIL", False, "bicubic", (size, size))
    theirs = cleanfid.fid.compute_fid(
        str(tmp_path / "a"), str(tmp_path / "b"), custom_feat_extractor=backbone_features, custom_fn_resize=resizer,
        num_workers=0, device=torch.device("cpu"), verbose=False,
    )  # fmt: skip
    ours = frechet_distance(
        *(stats(frechet.extract(pictures_of_set, backbone_features, size)) for pictures_of_set in sets)
    )
    assert ours > 0.01 and ours == pytest.approx(theirs, rel=1e-3)


# --- Inception, only if it is there


def test_absent_inception_is_none_and_a_broken_one_is_named(tmp_path):
    assert inception_features(tmp_path) is None
    (tmp_path / INCEPTION_FILE).write_bytes(b"half a download")
    with pytest.raises(UserError, match="cannot be loaded"):
        inception_features(tmp_path)


def test_inception_is_wired_as_clean_fid_expects_it(tmp_path):
    """A stand-in with Inception's interface: clean-fid calls ``layers`` with 299 px and flattens to 2048."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((32, 64)), torch.nn.Conv2d(3, 1, 1))

        def forward(self, x):
            return self.layers(x)

    torch.jit.script(Net()).save(str(tmp_path / INCEPTION_FILE))
    extractor = inception_features(tmp_path)
    assert extractor.protocol == "inception-clean"
    assert frechet.extract(pictures(2), extractor, extractor.size).shape == (2, 2048)
