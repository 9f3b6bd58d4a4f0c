"""``python -m harmony.export RUN``: what other tools read is what we trained, number by number."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetInpaintPipeline
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from harmony import export
from harmony.models.backbone import Kit
from harmony.models.controlnet import export_controlnet, load_controlnet, read_hint
from harmony.models.paint_by_example import export_painter, fresh_encoder, load_painter, painting_unet
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import hole
from harmony.sampling.guidance import Schedule, inpaint

HINTS = {"color": {"sigma": 10, "normalize": True}, "structure": {"low": 100, "high": 200, "edge_source": "masked"}}


@pytest.fixture(scope="module")
def kit(random_kit):
    return Kit(str(random_kit))


@pytest.fixture
def run(tmp_path, kit, awake):
    """(folder, net): the run folder of a colour ControlNet that is still in training, and the trained network."""
    folder = tmp_path / "runs" / "color" / "now"
    (folder / "checkpoints").mkdir(parents=True)
    net = awake(kit)
    OmegaConf.save(
        {
            "model": {"_target_": "harmony.models.backbone.Kit", "path": kit.path, "weights": "hub"},
            "module": {"_target_": "harmony.training.control.ControlTask", "branch": "color", "in_channels": 4},
            "data": {"hints": HINTS, "batch_size": 16},
            "dataset": {"name": "studio"},
            "trainer": {"max_steps": 800},
            "evaluate": {"split": "test", "limit": None, "steps": 20, "guidance": 2.0, "seed": 0},
            "seed": 0,
        },
        folder / "config.yaml",
    )
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
    return folder, net


def finish(folder: Path, net, kit) -> None:
    """What the end of a training adds to its run folder."""
    export_controlnet(net, folder / "export", "color", HINTS["color"], kit)
    (folder / "grids").mkdir()
    for step in (0, 800):
        write_image(folder / "grids" / f"samples_{step:06d}.png", np.full((8, 8, 3), step % 251, np.uint8))
    told = {
        "command": ["/somewhere/fit.py", "experiment=color", "dataset.name=my set"],
        "manifest": "abc123",
        "device": "cpu",
        "wall_time_s": 12.5,
        "versions": {"torch": "2.15"},
        "git": {"commit": "f00d"},
        "protocol": "kit-clip features",
        "count": 64,
    }
    (folder / "provenance.json").write_text(json.dumps(told))
    numbers = {"test/pasted/color_de": 5.25, "baseline/test/pasted/color_de": 20.5, "train/loss": 0.1}
    (folder / "metrics.json").write_text(json.dumps(numbers))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["harmony-export", *map(str, words)])
        code = 0
        try:
            export.main()
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def same_weights(net, other) -> bool:
    mine, theirs = net.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# --- folders and files


def test_the_last_checkpoint_of_a_run_that_goes_on(run, command, kit):
    folder, net = run
    code, out, err = command(folder)
    assert code == 0, err
    assert out == [str(folder / "export")]
    assert same_weights(load_controlnet(folder), net)
    facts = read_hint(folder)
    assert (facts["branch"], facts["parameters"], facts["unet"]) == ("color", HINTS["color"], kit.hash("unet"))
    with torch.no_grad():  # the run goes on, and is exported again
        later = {f"net.{k}": v + 1 for k, v in net.state_dict().items()}
    torch.save({"state_dict": later}, folder / "checkpoints" / "last.ckpt")
    assert command(folder)[0] == 0
    assert torch.equal(load_controlnet(folder).conv_in.weight, net.conv_in.weight + 1)


def test_the_export_of_a_run_that_has_ended(run, command, kit, tmp_path):
    folder, net = run
    finish(folder, net, kit)
    (folder / "checkpoints" / "last.ckpt").unlink()  # not needed any more
    for source, output in ((folder, None), (folder, tmp_path / "a b"), (folder / "export", tmp_path / "c")):
        code, out, err = command(source, *([f"output={output}"] if output else []))
        assert code == 0, err
        written = output or folder / "export"
        assert out == [str(written)]
        assert {p.name for p in written.iterdir()} == {"controlnet", "README.md", "grid.png"}
        assert same_weights(load_controlnet(written), net)
        assert (read_image(written / "grid.png") == 800 % 251).all()  # the last one


def test_the_card_says_what_it_is(run, command, kit):
    folder, net = run
    finish(folder, net, kit)
    assert command(folder, "licence=openrail++")[0] == 0
    card = ModelCard.load(folder / "export" / "README.md")
    assert (card.data.license, card.data.library_name) == ("openrail++", "diffusers")
    for words in (
        kit.hash("unet"),
        kit.hash("vae"),
        "python -m harmony.fit experiment=color 'dataset.name=my set'",
        'hint("color", image, mask, sigma=10, normalize=True)',
        "| test/pasted/color_de | 20.5 | 5.25 |",
        "64 held-out pictures (test): DDIM, 20 steps, guidance 2.0, seed 0, fid and kid on kit-clip features",
        "Outside the mask nothing changes",
        "](grid.png)",
        "manifest sha256 `abc123`",
    ):
        assert words in card.text, words
    assert "/somewhere" not in card.text


def test_one_file(run, command, kit, tmp_path):
    folder, net = run
    finish(folder, net, kit)
    code, out, err = command(folder, "format=comfyui", f"output={tmp_path / 'models'}")
    assert code == 0, err
    path = tmp_path / "models" / "harmony-color.safetensors"
    assert out == [str(path)] and list(path.parent.iterdir()) == [path]
    tensors = load_file(path)
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[k], v) for k, v in net.state_dict().items())
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert json.loads(told["hint"])["branch"] == "color"
    again = ControlNetModel.from_config(json.loads(told["config"]))
    again.load_state_dict(tensors)
    assert same_weights(again, net)


def test_half_the_size(run, command, kit, tmp_path):
    """Guards ``half=true``: float16 on disk, the same network within its rounding, and never into the run itself."""
    folder, net = run
    finish(folder, net, kit)
    code, lines, _ = command(str(folder), "half=true", f"output={tmp_path / 'out'}")
    assert code == 0
    stored = safetensors_of(tmp_path / "out" / "controlnet")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = load_controlnet(tmp_path / "out")
    assert loaded.dtype == torch.float32 and loaded.conv_in.weight.allclose(net.conv_in.weight, atol=1e-3)
    code, _, errors = command(str(folder), "half=true")
    assert code == 2 and "add output=FOLDER" in errors[-1]
    assert {t.dtype for t in safetensors_of(folder / "export" / "controlnet").values()} == {torch.float32}


def safetensors_of(folder: Path) -> dict:
    return load_file(next(folder.glob("*.safetensors")))


def test_paint_by_example(command, kit, tmp_path):
    """Guards the second kind of run: both networks and a card whose command can be typed; refused while it trains."""
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "paint_by_example" / "now"
    folder.mkdir(parents=True)
    cfg = {
        "model": {"_target_": "harmony.models.backbone.Kit", "path": kit.path, "weights": "hub"},
        "module": {"_target_": "harmony.training.paint_by_example.ExemplarTask"}, "data": {"batch_size": 32},
        "dataset": {"name": "kit"}, "trainer": {"max_steps": 20}, "seed": 0,
        "evaluate": {"split": "test", "limit": None, "steps": 20, "guidance": 3.0, "seed": 0},
    }  # fmt: skip
    OmegaConf.save(cfg, folder / "config.yaml")
    code, _, err = command(folder)
    assert code == 2 and "has not ended" in err[-1]
    encoder = fresh_encoder(kit.image_encoder, kit.unet.config.cross_attention_dim)
    export_painter(painting_unet(kit.unet), encoder, folder / "export", kit)
    (folder / "metrics.json").write_text(json.dumps({"test/raw/fid": 1.5, "baseline/test/raw/fid": 2.5}))
    code, out, err = command(folder, f"output={tmp_path / 'shipped'}", "half=true", "tower=false")
    assert code == 0 and Path(out[-1]) == tmp_path / "shipped", err
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "method=paint_by_example" in card and "the kit's" in card and "| test/raw/fid | 2.5 | 1.5 |" in card
    assert load_painter(tmp_path / "shipped", kit).encoder.size == 32
    code, _, err = command(folder, "format=comfyui")
    assert code == 2 and "format=comfyui is for ControlNets" in err[-1]


def test_mistakes(run, command, tmp_path, kit, awake):
    folder, net = run
    other = export_controlnet(net, tmp_path / "plain", "color", {}, kit)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"PK not a checkpoint")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((), "what shall be exported?"),
        ((tmp_path / "nowhere",), "does not exist"),
        ((folder,), "cannot read"),
        ((folder, "format=onnx"), "choose one of diffusers, comfyui"),
        ((other,), "belongs to no run; add output="),
        ((tmp_path / "empty", f"output={tmp_path / 'x'}"), "holds no ControlNet"),
    ):
        code, _, err = command(*words)
        assert code == 2 and len(err) == 1 and message in err[0], (words, err)
    cfg = OmegaConf.load(folder / "config.yaml")
    del cfg.module["branch"]
    OmegaConf.save(cfg, folder / "config.yaml")
    assert "trained no ControlNet" in command(folder)[2][0]


# --- the stock pipeline


def stock(kit, *folders):
    nets = [ControlNetModel.from_pretrained(folder / "controlnet") for folder in folders]
    net = nets[0] if len(nets) == 1 else nets
    pipeline = StableDiffusionControlNetInpaintPipeline.from_pretrained(kit.path, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "weights, predicts", [((1.0,), "epsilon"), ((0.7, 0.3), "epsilon"), ((0.7, 0.3), "v_prediction")]
)
def test_the_stock_pipeline_gives_the_identical_image(kit, awake, tmp_path, weights, predicts):
    shutil.copytree(kit.path, tmp_path / "kit")
    settings = tmp_path / "kit" / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prediction_type": predicts}))
    kit = Kit(str(tmp_path / "kit"))
    assert kit.prediction_type == predicts
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 32, 32, generator=rng) * 2 - 1
    opened = torch.zeros(1, 1, 32, 32)
    opened[..., 8:26, 5:21] = 1
    noise, hints = torch.randn(1, 4, 8, 8, generator=rng), [torch.rand(1, 3, 32, 32, generator=rng) for _ in weights]
    nets, folders = [awake(kit, 1 + i) for i in range(len(weights))], [tmp_path / str(i) for i in range(len(weights))]
    for net, folder in zip(nets, folders, strict=True):
        export_controlnet(net, folder, "color", {}, kit)
    alone = len(weights) == 1
    theirs = stock(kit, *folders)(
        "a red mushroom on snow",
        image=image,
        mask_image=opened,
        control_image=hints[0] if alone else hints,
        height=32,
        width=32,
        num_inference_steps=10,
        guidance_scale=3.0,
        latents=noise,
        generator=torch.Generator().manual_seed(7),
        controlnet_conditioning_scale=weights[0] if alone else list(weights),
        output_type="pt",
    ).images

    moments = kit.moments(image * (1 - opened))
    unit = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))  # the pipeline samples the posterior
    masked, cells = kit.latent(moments, unit), torch.nn.functional.interpolate(opened, size=(8, 8))
    text, empty = kit.prompt(["a red mushroom on snow"]), kit.prompt([""])

    def ours(controls):
        z = inpaint(kit, noise, cells, masked, text, empty, Schedule(10, 3.0), controls)
        return (kit.decode(z) / 2 + 0.5).clamp(0, 1)

    made = ours(list(zip(nets, hints, weights, strict=True)))
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-5)
    assert (ours([]) - theirs).abs().max() > 1e-2  # the ControlNets matter
    assert (ours([(nets[0], hints[0], 0.5)]) - theirs).abs().max() > 1e-3  # and so do their weights


def test_the_cards_own_lines_run(run, command, kit, monkeypatch):
    folder, net = run
    finish(folder, net, kit)
    assert command(folder)[0] == 0
    snippet = re.search(r"```python\n(.*?)```", (folder / "export" / "README.md").read_text(), re.S)[1]
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[10:20, 8:24] = True
    write_image(folder / "export" / "composite.png", picture)
    write_image(folder / "export" / "mask.png", mask)
    monkeypatch.chdir(folder / "export")
    exec(snippet, {})
    made, opened = read_image("harmonized.png"), hole(mask, "dilate")
    assert np.array_equal(made[~opened], picture[~opened])
    assert (made[opened] != picture[opened]).mean() > 0.5
