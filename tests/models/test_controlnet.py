"""A ControlNet before it is trained, and on its way to a folder and back."""

import json
import os
import shutil
from unittest.mock import Mock

import pytest
import torch
from diffusers import ControlNetModel

from harmony.core.errors import UserError
from harmony.methods.inpainting import load_branch
from harmony.models.backbone import Backbone
from harmony.models.controlnet import FILES, export_controlnet, from_unet, link_to_top, load_controlnet, read_hint
from harmony.models.shipped import CONTROLNET, find_weights
from harmony.models.unet_halves import decode, encode
from harmony.sampling.guidance import control_residuals, embed_hints, predict

PARAMETERS = {"blur": 1.25, "normalize": True}


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def inputs(backbone):
    rng = torch.Generator().manual_seed(0)
    return {
        "z": torch.randn(2, 4, 8, 8, generator=rng),
        "condition": torch.randn(2, 5, 8, 8, generator=rng),
        "t": torch.tensor([1, 981]),
        "text": backbone.prompt(["a red mushroom", ""]),
    }


@torch.no_grad()
@pytest.mark.parametrize("in_channels", [4, None])
def test_a_fresh_controlnet_changes_nothing(backbone, inputs, in_channels):
    net, shown = from_unet(backbone.unet, backbone.factor, in_channels), torch.rand(2, 3, 32, 32)
    u = torch.cat([inputs["z"], inputs["condition"]], 1)
    down, middle = control_residuals(embed_hints([(net, shown, 1.0)]), u, inputs["t"], inputs["text"])
    assert all(not r.any() for r in (*down, middle))
    plain, first = predict(backbone.unet, **inputs), encode(backbone.unet, u, inputs["t"], inputs["text"])
    assert torch.equal(decode(backbone.unet, first, inputs["text"], (down, middle)), plain)
    assert plain.abs().max() > 0.1


@torch.no_grad()
def test_the_hint_survives_a_fresh_hint_encoder(backbone):
    """Guards short trainings: two hints of different grey still differ before the last layer, which starts at zero."""
    torch.manual_seed(0)
    encoder = from_unet(backbone.unet, backbone.factor).controlnet_cond_embedding
    x = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    for layer in (encoder.conv_in, *encoder.blocks):
        x = torch.nn.functional.silu(layer(x))
    assert (x[1] - x[0]).abs().mean() > max(0.02, 0.2 * x.abs().mean())  # neither faint nor drowned by biases
    assert not encoder.conv_out.weight.any() and not encoder.conv_out.bias.any()


def test_copied_weights_are_the_unets(backbone):
    theirs, net = backbone.unet.state_dict(), from_unet(backbone.unet, backbone.factor)
    own = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding", "conv_in.weight")
    copied = [name for name in net.state_dict() if not name.startswith(own)]
    for part in ("time_embedding.", "down_blocks.", "mid_block.", "conv_in.bias"):
        assert any(name.startswith(part) for name in copied)
    for name in copied:
        assert torch.equal(net.state_dict()[name], theirs[name]), name
    assert torch.equal(net.conv_in.weight, backbone.unet.conv_in.weight[:, :4])
    assert torch.equal(from_unet(backbone.unet, backbone.factor, None).conv_in.weight, backbone.unet.conv_in.weight)


def test_it_is_trained_in_float32_and_the_unet_is_not_touched(backbone):
    net = from_unet(backbone.unet, backbone.factor)
    assert net.training
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, True)}
    assert not any(p.requires_grad for p in backbone.unet.parameters())
    shared = {p.data_ptr() for p in backbone.unet.parameters()} & {p.data_ptr() for p in net.parameters()}
    assert not shared


@pytest.mark.parametrize("factor", [4, 8])
def test_the_hint_encoder_shrinks_by_the_factor(backbone, factor):
    net = from_unet(backbone.unet, factor)
    assert net.controlnet_cond_embedding(torch.rand(1, 3, 64, 64)).shape[-2:] == (64 // factor, 64 // factor)


def test_export_and_load(backbone, awake, tmp_path):
    net = awake(backbone)
    folder = export_controlnet(net, tmp_path / "run" / "export", "color", PARAMETERS, backbone)
    for path in (tmp_path / "run", tmp_path / "run" / "export", folder):
        assert find_weights(CONTROLNET, path) == folder
        loaded = load_controlnet(path)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())
        facts = read_hint(path)
        assert (facts["branch"], facts["parameters"], facts["unet"]) == ("color", PARAMETERS, backbone.hash("unet"))
    assert {p.name for p in folder.parent.iterdir()} == {"controlnet", *FILES}  # nothing half-written stays


def test_weights_at_the_top(backbone, awake, tmp_path, monkeypatch):
    """Guards what a hub counts and fetches: the top of an export loads by itself, is current, and takes no space."""

    def loads(net) -> bool:
        loaded, ours = ControlNetModel.from_pretrained(tmp_path), load_controlnet(tmp_path / "fetched")
        state = net.state_dict()
        return all(torch.equal(v, state[k]) for part in (loaded, ours) for k, v in part.state_dict().items())

    for seed in (0, 1, 2):
        if seed == 2:  # a disk without links
            monkeypatch.setattr("os.link", Mock(side_effect=OSError))
        folder = export_controlnet(awake(backbone, seed), tmp_path, "color", PARAMETERS, backbone)
        (tmp_path / "fetched").mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(tmp_path / name, tmp_path / "fetched" / name)
            assert os.path.samefile(tmp_path / name, folder / name) == (seed < 2)
        assert loads(awake(backbone, seed)) and not loads(awake(backbone, 9))
    (folder / "hint.json").unlink()
    link_to_top(folder)
    assert not (tmp_path / "hint.json").exists(), "nothing says more than its source"


def test_what_is_no_controlnet_is_said(backbone, awake, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no ControlNet"):
        load_controlnet(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="harmony.export"):
        load_controlnet(tmp_path / "run")
    with pytest.raises(UserError, match="there is no ControlNet"):
        load_controlnet(tmp_path / "nowhere")
    folder = export_controlnet(awake(backbone), tmp_path / "damaged", "color", PARAMETERS, backbone)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors cannot be read"):
        load_controlnet(folder)
    (folder / "hint.json").write_text(json.dumps({"branch": "color"}))
    with pytest.raises(UserError, match="damaged"):
        read_hint(folder)
    (folder / "hint.json").unlink()
    assert read_hint(folder) == {}


def test_lengths_of_version_01_are_converted(backbone, awake, tmp_path):
    """Guards old exports, whose blur is in pixels at 512: as many pixels here as they were trained on."""
    folder = export_controlnet(awake(backbone), tmp_path, "color", PARAMETERS, backbone)
    facts = json.loads((folder / "hint.json").read_text())
    assert facts["cell"] == backbone.factor == 4 and facts["parameters"] == PARAMETERS
    del facts["cell"]
    (folder / "hint.json").write_text(json.dumps(facts | {"parameters": {"sigma": 32, "normalize": False}}))
    side = backbone.resolution // backbone.factor
    assert load_branch(str(folder), backbone).parameters == {"blur": 32 * side / 512, "normalize": False}
    (folder / "hint.json").write_text(json.dumps(facts | {"cell": 0}))
    with pytest.raises(UserError, match="cell=0 is no number of pixels"):
        read_hint(folder)
