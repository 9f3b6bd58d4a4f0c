"""LPIPS, DINO's look at objects and structure: real libraries with random weights, against plain computations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from harmony.core.errors import UserError
from harmony.metrics.fidelity import ssim
from harmony.models import perception
from harmony.models.perception import SIDE, DinoI, Lpips, StructureDistance, load_metrics

RNG = np.random.default_rng(0)
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (perception.MEAN, perception.STD))


def pictures(height: int = 70, width: int = 90) -> tuple[np.ndarray, np.ndarray]:
    a = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return a, np.clip(a + RNG.normal(0, 30, a.shape), 0, 255).astype(np.uint8)


@pytest.fixture(params=["dino", "dinov2"])
def dino(request, tmp_path) -> tuple[str, torch.nn.Module]:
    """The folder of a random DINO or DINOv2 of transformers, and the model."""
    torch.manual_seed(0)
    if request.param == "dino":
        model = ViTModel(ViTConfig(**SMALL, image_size=224, patch_size=8), add_pooling_layer=False)
    else:
        model = Dinov2Model(Dinov2Config(**SMALL, image_size=518, patch_size=14))
    model.save_pretrained(tmp_path)
    return str(tmp_path), model.eval()


def test_lpips_is_that_of_its_paper(tmp_path, monkeypatch):
    """Guards range, net and weights: the sum of weighted differences of unit features, by plain torch."""
    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    net = torchvision.models.squeezenet1_1()
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    a, b = pictures()
    (value,) = Lpips("squeeze")([a], [b])
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x, y = ((torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 - shift)[None] / scale for p in (a, b))
    package = torchmetrics.functional.image.lpips.__file__.removesuffix(".py") + "_models/squeeze.pth"
    weights, total = torch.load(package, "cpu", weights_only=True), 0.0
    with torch.no_grad():
        ends = [1, 4, 7, 9, 10, 11, 12]  # the layers that are compared
        for n, layer in enumerate(net.eval().features):
            x, y = layer(x), layer(y)
            if n in ends:
                u, v = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-8) for z in (x, y))
                total += ((u - v) ** 2 * weights[f"lin{ends.index(n)}.model.1.weight"]).sum(1).mean().item()
    assert value == pytest.approx(total, rel=1e-4) and Lpips("squeeze")([a], [a]) == [0.0]


def test_the_structural_similarity_is_that_of_torchmetrics():
    a, b = pictures()
    x, y = (torch.from_numpy(p).permute(2, 0, 1)[None].float() for p in (a, b))
    expected = torchmetrics.functional.structural_similarity_index_measure(x, y, data_range=255.0)
    assert ssim(a, b) == pytest.approx(float(expected), abs=2e-4) and ssim(a, a) == pytest.approx(1)
    assert np.isnan(ssim(a[:10], b[:10]))


def test_an_object_is_seen_through_its_box(dino):
    """Guards what DINO is shown: the box of the mask alone, as a square, normalized by ImageNet's values."""
    folder, model = dino
    (a, b), mask = pictures(), np.zeros((70, 90), bool)
    mask[10:50, 20:80] = True
    other = np.where(mask[..., None], b, 0).astype(np.uint8)  # outside the box anything
    (value,) = DinoI(folder)([other], [a], [mask])
    with torch.no_grad():
        looks = []
        for image in (b, a):
            box = perception.clean_resize([image[10:50, 20:80]], SIDE)
            looks.append(model(pixel_values=(box / 255 - MEAN) / STD, interpolate_pos_encoding=True).last_hidden_state)
    expected = F.cosine_similarity(looks[0][:, 0], looks[1][:, 0]).item()
    assert value == pytest.approx(expected, abs=1e-5) and DinoI(folder)([a], [a], [mask]) == pytest.approx([1.0])


def test_structure_is_the_similarity_of_keys(dino):
    """Guards the layer and its keys: from the last layer's input by hand."""
    folder, model = dino
    a, b = pictures(112, 144)
    (value,) = StructureDistance(folder)([b], [a])
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    maps = []
    for image in (b, a):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        pixels = (F.interpolate(pixels, (224, 288), mode="bilinear", antialias=True) / 255 - MEAN) / STD
        with torch.no_grad():
            states = model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
            norm = layers[-1].norm1 if hasattr(layers[-1], "norm1") else layers[-1].layernorm_before
            keys = layers[-1].attention.k_proj(norm(states[-2]))[0]
        lengths = keys.norm(dim=1)
        maps.append(keys @ keys.T / (lengths[:, None] * lengths))
    assert value == pytest.approx(1000 * float((maps[0] - maps[1]).square().mean()), rel=1e-3) and value > 0


def test_what_cannot_be_had_is_left_out_with_a_line(tmp_path, monkeypatch, dino):
    """Guards tables on machines without a network: a line for each, no column, and never another network instead."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = {"lpips": "alexander", "dino_i": str(tmp_path / "nowhere"), "structure": dino[0]}
    metrics, lines = load_metrics(weights)
    assert [metric.name for metric in metrics] == ["structure"] and len(lines) == 2
    assert lines[0].startswith("lpips: left out, alexander cannot be loaded")
    assert lines[1].startswith("dino_i: left out") and str(tmp_path / "nowhere") in lines[1]
    assert load_metrics({"lpips": None}) == ([], [])
    with pytest.raises(UserError, match="metrics.beauty: no such metric"):
        load_metrics({"beauty": "x"})


def test_code_of_a_network_is_never_run(tmp_path, bring_code):
    """Guards metrics.dino_i=: a folder that brings code of its own is left out, without asking whoever sits there."""
    ran = bring_code(tmp_path / "own")
    metrics, (line,) = load_metrics({"dino_i": str(tmp_path / "own")})
    assert metrics == [] and "contains custom code" in line and not ran.exists()
