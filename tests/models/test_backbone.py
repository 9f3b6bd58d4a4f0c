"""A backbone: what its own files say of it, its codec, its text, its identity."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.models.backbone import Backbone, attention_preference, load_part, scaled_latent
from harmony.models.shipped import ASSETS, backbone_path


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


def test_facts_come_from_the_backbones_own_files(backbone):
    assert (backbone.factor, backbone.channels, backbone.resolution, backbone.prediction_type) == (4, 4, 32, "epsilon")
    assert len(backbone.alphas_cumprod) == 1000
    for part in (backbone.vae, backbone.unet, backbone.text_encoder, backbone.image_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_codec_shapes_and_scale(backbone):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = backbone.moments(x)
    assert moments.shape == (2, 8, 8, 8)
    posterior = backbone.vae.encode(x).latent_dist
    assert torch.equal(backbone.latent(moments), 0.5 * posterior.mean)
    noise = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(backbone.latent(moments, noise), 0.5 * (posterior.mean + posterior.std * noise))
    assert backbone.decode(backbone.latent(moments)).shape == x.shape
    torch.testing.assert_close(backbone.decode(0.5 * posterior.mean), backbone.vae.decode(posterior.mean).sample)


def test_a_wild_variance_stays_finite():
    moments = torch.cat([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 1e4)], 1)
    assert scaled_latent(moments, 0.5, torch.ones(1, 4, 2, 2)).isfinite().all()


def test_text(backbone):
    tokens = backbone.tokens(["a red mushroom on snow", "", "very " * 100])
    assert tokens.shape == (3, backbone.tokenizer.model_max_length)
    states = backbone.prompt(["a red mushroom on snow", ""])
    assert states.shape == (2, 16, 32)
    assert torch.equal(backbone.text(tokens[:2]), states)
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_the_hash_follows_the_weights(random_backbone, tmp_path):
    shutil.copytree(random_backbone, tmp_path / "copy")
    backbone, copy = Backbone(str(random_backbone)), Backbone(str(tmp_path / "copy"))
    assert backbone.hash("vae") == copy.hash("vae") != backbone.hash("unet")
    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert backbone.hash("vae") != Backbone(str(tmp_path / "copy")).hash("vae")


def test_random_weights_have_the_architecture_alone(random_backbone, backbone):
    fresh = Backbone(str(random_backbone), weights="random")
    shapes = {name: tuple(p.shape) for name, p in backbone.unet.named_parameters()}
    assert {name: tuple(p.shape) for name, p in fresh.unet.named_parameters()} == shapes
    assert not torch.equal(fresh.unet.conv_in.weight, backbone.unet.conv_in.weight)
    assert fresh.hash("unet") == "random"


def test_what_every_step_runs_is_rounded_and_nothing_else(random_backbone, backbone):
    """Guards bfloat16: UNet and text encoder alone; states and latents are float32, and a copy to train is exact."""
    half = Backbone(str(random_backbone), dtype="bfloat16")
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == half.prompt(["a red mushroom"]).dtype == torch.float32
    assert torch.equal(half.load_precise("unet").conv_in.weight, backbone.unet.conv_in.weight)
    assert backbone.load_precise("unet") is backbone.unet
    assert Backbone(str(random_backbone), dtype="auto").dtype == (
        torch.bfloat16 if torch.cuda.is_available() else torch.float32
    )
    with pytest.raises(UserError, match="model.dtype=half: choose auto, float32 or bfloat16"):
        Backbone(str(random_backbone), dtype="half")


def test_attention_runs_in_the_kernel_that_is_asked_for(random_backbone, monkeypatch):
    """Guards ``model.attention``: the kernel comes first, the others stay as a way out, and another backbone in the
    process changes nothing; refused without a GPU.
    """
    for name, line in (("flash3", "choose native, cudnn, flash"), ("cudnn", "only a GPU has a choice")):
        with pytest.raises(UserError, match=f"model.attention={name}: {line}"):
            Backbone(str(random_backbone), attention=name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with attention_preference:
        backbone = Backbone(str(random_backbone), attention="cudnn")
        backbone.with_unet(backbone.unet)
        kernels = _cur_sdpa_kernel_backends(with_priority=True)
        assert kernels[0] == SDPBackend.CUDNN_ATTENTION and SDPBackend.MATH in kernels
        Backbone(str(random_backbone), attention="flash")
        assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "image_encoder"])
def test_what_is_saved_does_not_say_where_it_was_read(random_backbone, backbone, tmp_path, part):
    getattr(backbone, part).save_pretrained(tmp_path)
    assert str(random_backbone) not in (tmp_path / "config.json").read_text()


def test_what_is_missing_is_said(backbone, tmp_path):
    with pytest.raises(UserError, match="has no captioner"):
        _ = backbone.captioner
    with pytest.raises(UserError, match="no backbone in"):
        Backbone(str(tmp_path / "nowhere"))


def test_names(random_backbone, monkeypatch):
    assert Backbone(str(random_backbone)).name == str(random_backbone)
    for module in ("shipped", "backbone"):
        monkeypatch.setattr(f"harmony.models.{module}.ASSETS", random_backbone.parent)
    assert backbone_path(random_backbone.name) == str(random_backbone)
    # a shipped backbone goes by its name, never by a machine's path
    assert Backbone(random_backbone.name).name == random_backbone.name
    assert ASSETS.name == "assets"


COUNTS = {
    "sd1": 859_520_964,
    "sd2": 865_925_124,
    "sd2_base": 865_910_724,
}  # parameters of the released UNets


@pytest.mark.parametrize("name", COUNTS)
def test_true_sizes_come_with_the_package(name):
    """Guards model=NAME model.weights=random without a network: the parameters of the real thing, to the last one."""
    cfg = compose("fit", ["experiment=color", f"model={name}", "model.weights=random"]).model
    backbone = instantiate(cfg)
    assert (
        backbone.name == name
        and backbone.hash("unet") == "random"
        and backbone.scheduler.config.prediction_type == "epsilon"
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(backbone.path, subfolder="unet"))
    assert sum(p.numel() for p in unet.parameters()) == COUNTS[name] and unet.config.sample_size == 64
    assert backbone.tokens(["a red mushroom"]).shape == (1, 77)


def test_weights_are_of_the_hub_or_random(random_backbone):
    with pytest.raises(UserError, match="choose hub or random"):
        Backbone(str(random_backbone), weights="pretrained")


def test_weights_from_a_hub_are_known_by_their_bytes(random_backbone, tmp_path):
    """Guards provenance of hub ids: read from the hub's own cache, without a network, the hash is that of the files;
    where they cannot be reached, one line says so.
    """
    cached, commit = tmp_path / "models--someone--backbone", 40 * "a"
    shutil.copytree(random_backbone, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = "from harmony.models.backbone import Backbone; k = Backbone('someone/backbone')\n"
    code += "print(*[k.hash(part) for part in ('unet', 'tokenizer')])\n"
    code += "from harmony.core.errors import UserError\n"
    code += "try: Backbone('someone/other').unet\nexcept UserError as e: print(e)"
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    hashes, said = done.stdout.splitlines()[-2:]
    assert hashes.split() == [Backbone(str(random_backbone)).hash(part) for part in ("unet", "tokenizer")]
    assert said.startswith("cannot fetch unet of someone/other from the hub (") and "model.path=FOLDER" in said


LOAD = """
import resource, sys
import torch, diffusers, transformers
from harmony.models.backbone import load_part
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unet = load_part(sys.argv[1], "unet", dtype=getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in unet.parameters())
assert sum(p.sum() for p in unet.parameters()).isfinite()  # what is mapped from a file is there when it is read
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024 / 2**30, size / 2**30)
"""


@pytest.mark.slow
def test_weights_are_loaded_without_doubling(tmp_path):
    """Guards memory at true size: four shards of a gigabyte, read one after another; a rounded copy takes its own size
    and at most one shard beside it.
    """
    made = "import sys; from harmony.models.backbone import Backbone\n"
    made += "unet = Backbone('sd2', weights='random', geometry='sd2').unet\n"
    made += "unet.save_pretrained(sys.argv[1] + '/unet', max_shard_size='1GB')"
    subprocess.run([sys.executable, "-c", made, str(tmp_path)], check=True, capture_output=True)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) == 4
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), dtype], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        taken, size = map(float, done.stdout.split())
        print(f"{dtype}: {taken:.2f} GiB for weights of {size:.2f}")
        assert 0.9 * size < taken < size + 1.25


def test_the_end_that_is_not_read_is_known():
    """Guards long prompts: what the text encoder drops, and nothing for a prompt that fits."""
    backbone = Backbone("tiny")
    short, long = "a red car on snow", "a red car on snow, " + "very " * 40 + "warm light"
    nothing, end = backbone.unread_ends([short, long])
    assert nothing == "" and end.endswith("warm light") and end in long
    cut = long.removesuffix(end)
    assert torch.equal(backbone.tokens([cut]), backbone.tokens([long])), "the model reads just the rest"


def test_code_of_a_backbone_is_never_run(tmp_path, bring_code):
    """Guards model.path=: a captioner that brings code of its own is refused, without asking whoever sits there."""
    ran = bring_code(tmp_path / "captioner")
    with pytest.raises(UserError, match="cannot load processor of backbone .*contains custom code"):
        load_part(str(tmp_path), "processor")
    assert not ran.exists()
