"""``python -m harmony.export RUN``: what other tools read is what we trained, number by number; a stranger's run is
data.
"""

import base64
import json
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetInpaintPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from harmony import export
from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.methods.inpainting import load_branch
from harmony.models.backbone import GEOMETRY, Backbone
from harmony.models.controlnet import FILES, WEIGHTS, export_controlnet, load_controlnet, net_hash, read_hint
from harmony.models.paint_by_example import build_encoder, build_painting_unet, export_painter, load_painter
from harmony.models.shipped import ASSETS
from harmony.pixels.images import read_image, sha256, write_image
from harmony.pixels.masks import hole
from harmony.sampling.guidance import Schedule, inpaint
from harmony.training.cards import escape_cell, format_code, hide_folder, render_controlnet_card
from harmony.training.export import check_comfyui
from harmony.training.run_folder import RunFolder

HINTS = {"color": {"blur": 1.25, "normalize": True}, "structure": {"low": 100, "high": 200, "edge_source": "masked"}}


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


def configuration(backbone) -> dict:
    """What config.yaml of a run of ``ControlTask`` holds, as far as export looks at it."""
    return {
        "model": {"_target_": "harmony.models.backbone.Backbone", "path": backbone.path, "weights": "hub"},
        "module": {"_target_": "harmony.training.control.ControlTask", "branch": "color", "in_channels": 4},
        "data": {"hints": HINTS, "batch_size": 16},
        "dataset": {"name": "studio"},
        "trainer": {"max_steps": 800},
        "evaluate": {"split": "test", "limit": None, "steps": 20, "guidance": 2.0, "seed": 0},
        "seed": 0,
    }


@pytest.fixture
def run(tmp_path, backbone, awake):
    """(folder, net): the run folder of a color ControlNet that is still in training, and the trained network."""
    folder = tmp_path / "runs" / "color" / "now"
    (folder / "checkpoints").mkdir(parents=True)
    net = awake(backbone)
    OmegaConf.save(configuration(backbone), folder / "config.yaml")
    save_checkpoint(folder, "last", net.state_dict(), 400)
    return folder, net


def save_checkpoint(folder: Path, kind: str, state: dict, step: int, **callbacks) -> None:
    """A checkpoint as a training writes it, as far as export looks at it."""
    content = {"state_dict": {f"net.{name}": value for name, value in state.items()}, "global_step": step}
    torch.save(content | {"callbacks": callbacks}, folder / "checkpoints" / f"{kind}.ckpt")


def shift(net, by: float) -> dict[str, torch.Tensor]:
    """The weights of a network, each changed by the same number."""
    return {name: value + by for name, value in net.state_dict().items()}


BEST = {"BestCheckpoint": {"monitor": "validation/loss", "best_model_score": torch.tensor(0.25)}}


def finish(folder: Path, net, backbone) -> None:
    """What the end of a training adds to its run folder."""
    export_controlnet(net, folder / "export", "color", HINTS["color"], backbone)
    (folder / "grids").mkdir()
    for step in (0, 800):
        write_image(folder / "grids" / f"samples_{step:06d}.png", np.full((8, 8, 3), step % 251, np.uint8))
    provenance = {
        "command": ["/somewhere/fit.py", "experiment=color", "dataset.name=my set"],
        "manifest": "abc123",
        "device": "cpu",
        "wall_time_s": 12.5,
        "versions": {"torch": "2.15"},
        "git": {"commit": "f00d"},
        "protocol": "backbone-clip features",
        "count": 64,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
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


@pytest.fixture(scope="module")
def settings():
    return compose("export")


@pytest.fixture
def refused(settings):
    """``refused(run, output=...)``: the message of the UserError that the command would print as one line."""

    def call(path: Path, **options) -> str:
        paths = {name: str(value) for name, value in options.items() if isinstance(value, Path)}
        cfg = OmegaConf.merge(settings, options | paths | {"run": str(path)})
        with pytest.raises(UserError) as caught:
            export.main(cfg)
        return str(caught.value)

    return call


@pytest.fixture
def any_size(monkeypatch):
    """Networks of the tests, which are too small for ComfyUI, are written for it all the same."""
    monkeypatch.setattr("harmony.training.export.check_comfyui", lambda facts: None)


def same_weights(net, other) -> bool:
    mine, theirs = net.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# --- folders and files


def test_the_last_checkpoint_of_a_run_that_goes_on(run, command, backbone):
    folder, net = run
    code, out, err = command(folder)
    assert code == 0, err
    assert out == [str(folder / "export")]
    assert same_weights(load_controlnet(folder), net)
    facts = read_hint(folder)
    assert (facts["branch"], facts["parameters"], facts["unet"]) == ("color", HINTS["color"], backbone.hash("unet"))
    save_checkpoint(folder, "last", shift(net, 1), 800)  # the run goes on, and is exported again
    assert command(folder)[0] == 0
    assert torch.equal(load_controlnet(folder).conv_in.weight, net.conv_in.weight + 1)


def test_the_checkpoint_that_is_asked_for(run, command, backbone, refused, tmp_path, any_size):
    """Guards ``checkpoint=`` of a run that goes on: the file, what its own option says, and the line of the card."""
    folder, net = run
    assert "has no best checkpoint" in refused(folder, checkpoint="best", output=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save_checkpoint(folder, "best", shift(net, 1), 200, **BEST)
    best, last = "- checkpoint: best, step 200, validation/loss 0.25\n", "- checkpoint: last, step 400\n"

    def exported(*words) -> tuple[bool, str]:
        code, _, err = command(folder, *words)
        assert code == 0, err
        is_best = torch.equal(load_controlnet(folder).conv_in.weight, net.conv_in.weight + 1)
        assert is_best or same_weights(load_controlnet(folder), net)
        return is_best, next(line for line in card.open() if line.startswith("- checkpoint: "))

    card = folder / "export" / "README.md"
    assert exported("checkpoint=best") == (True, best)
    assert exported("checkpoint=last") == exported() == (False, last)
    OmegaConf.save(configuration(backbone) | {"checkpoint": "best"}, folder / "config.yaml")
    assert exported() == (True, best) and exported("checkpoint=last") == (False, last)
    assert command(folder, "checkpoint=best", "format=comfyui", f"output={tmp_path}")[0] == 0
    stored = load_file(tmp_path / "harmony-color.safetensors")
    assert torch.equal(stored["conv_in.weight"], net.conv_in.weight + 1)
    OmegaConf.save(configuration(backbone) | {"checkpoint": "first"}, folder / "config.yaml")
    assert "checkpoint is first, not one of last, best" in refused(folder)


def test_the_average_of_a_run_that_goes_on(run, command):
    """Guards ``callbacks.average``: what the end would export is exported, not the weights that go on."""
    folder, net = run
    average = [parameter.detach() + 2 for parameter in net.parameters()]
    save_checkpoint(folder, "last", net.state_dict(), 400, WeightAverage={"shadow_params": average, "decay": 0.9})
    assert command(folder)[0] == 0
    assert all(map(torch.equal, load_controlnet(folder).parameters(), average))
    best = [tensor + 1 for tensor in average]
    save_checkpoint(folder, "best", net.state_dict(), 200, WeightAverage={"shadow_params": best}, **BEST)
    assert command(folder, "checkpoint=best")[0] == 0
    assert all(map(torch.equal, load_controlnet(folder).parameters(), best))


def test_another_checkpoint_of_a_run_that_has_ended(run, command, backbone, tmp_path):
    """Guards the run's own export and figures: another checkpoint goes elsewhere, and has a card without them."""
    folder, net = run
    finish(folder, net, backbone)
    save_checkpoint(folder, "best", shift(net, 1), 200, **BEST)
    facts = json.loads((folder / "provenance.json").read_text())
    facts["checkpoint"] = {"kind": "last", "step": 400, "figure": "validation/loss", "value": 0.5}
    (folder / "provenance.json").write_text(json.dumps(facts))
    code, _, err = command(folder, "checkpoint=best")
    assert code == 2 and len(err) == 1 and "would change the run's own weights: add output=FOLDER" in err[0]
    for n, (words, line) in enumerate(
        (
            (("checkpoint=best",), "- checkpoint: best, step 200, validation/loss 0.25\n"),
            (("checkpoint=last",), "- checkpoint: last, step 400, validation/loss 0.5\n"),
            ((), "- checkpoint: last, step 400, validation/loss 0.5\n"),
        )
    ):
        output, is_best = tmp_path / str(n), words == ("checkpoint=best",)
        assert command(folder, *words, f"output={output}")[0] == 0
        text = (output / "README.md").read_text()
        assert line in text and ("| test/pasted/color_de | 20.5 | 5.25 |" not in text) == is_best
        assert same_weights(load_controlnet(output), net) != is_best


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ([torch.zeros(3)], "does not fit backbone"),
        ([1, 2], r"cannot read .*TypeError"),
        ({"a": 1}, "shadow_params must not be a dict"),
        (None, "tensor 0 of the average holds NaN or infinite numbers"),
    ],
)
def test_a_strange_average_is_refused(run, refused, tmp_path, average, message):
    """Guards what is read from a checkpoint: it is data, checked like all weights, and nothing is half-written."""
    folder, net = run
    if average is None:
        average = [torch.full_like(parameter, float("nan")) for parameter in net.parameters()]
    save_checkpoint(folder, "last", net.state_dict(), 400, WeightAverage={"shadow_params": average})
    line = refused(folder, output=tmp_path / "x")
    assert re.search(message, line) and "\n" not in line and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, {"state_dict": {"net.a": SimpleNamespace()}, "global_step": 1}, [1], {"global_step": 1}],
)
def test_a_strange_checkpoint_is_refused(run, refused, tmp_path, content):
    """Guards what is no checkpoint, or has code in it."""
    folder, _ = run
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    line = refused(folder, checkpoint="best", output=tmp_path / "x")
    assert "cannot read" in line and "\n" not in line and not (tmp_path / "x").exists()


def test_the_export_of_a_run_that_has_ended(run, command, backbone, tmp_path):
    folder, net = run
    finish(folder, net, backbone)
    (folder / "checkpoints" / "last.ckpt").unlink()  # not needed any more
    for source, output in ((folder, None), (folder, tmp_path / "a b"), (folder / "export", tmp_path / "c")):
        code, out, err = command(source, *([f"output={output}"] if output else []))
        assert code == 0, err
        written = output or folder / "export"
        assert out == [str(written)]
        pipeline = {"model_index.json", "pipeline.py"}
        assert {p.name for p in written.iterdir()} == {"controlnet", *FILES, "README.md", "grid.png"} | pipeline
        assert same_weights(ControlNetModel.from_pretrained(written), net)
        assert same_weights(load_controlnet(written), net)
        assert (read_image(written / "grid.png") == 800 % 251).all()  # the last one


def test_the_card_says_what_it_is(run, command, backbone):
    folder, net = run
    finish(folder, net, backbone)
    assert command(folder, "license=openrail++")[0] == 0
    card = ModelCard.load(folder / "export" / "README.md")
    assert (card.data.license, card.data.library_name) == ("openrail++", "diffusers")
    assert card.data.pipeline_tag == "image-to-image" and card.data.base_model is None  # a local folder has no page
    for words in (
        backbone.hash("unet"),
        backbone.hash("vae"),
        "python -m harmony.fit experiment=color 'dataset.name=my set'",
        'hint("color", image, mask, cell=4, blur=1.25, normalize=True)',
        "| test/pasted/color_de | 20.5 | 5.25 |",
        "64 held-out pictures (test): DDIM, 20 steps, guidance\n2.0, seed 0; fid and kid on backbone-clip features",
        "Nothing changes outside the hole",
        "](grid.png)",
        "manifest sha256 `abc123`",
    ):
        assert words in card.text, words
    assert "/somewhere" not in card.text


def detect_unet(net: ControlNetModel) -> str | None:
    """Which of its UNets ComfyUI takes a ControlNet for, by what its detector looks at: shapes alone."""
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    depths, context = [], None
    for i in range(len(net.down_blocks)):
        blocks = [name for name in shapes if re.match(rf"down_blocks\.{i}\.attentions\.\d+\.norm\.weight", name)]
        depths += [1] * len(blocks) or [0] * len(net.down_blocks[i].resnets)
        context = shapes.get(f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.to_k.weight", (0, context))[1]
    facts = (*shapes["conv_in.weight"][:2], context, depths)
    names = {768: "SD15", 1024: "SD21"}
    return names.get(context) if facts == (320, 4, context, [1, 1, 1, 1, 1, 1, 0, 0]) else None


def build_controlnet(geometry: str, **sizes) -> ControlNetModel:
    """A ControlNet of a backbone's size without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(GEOMETRY / geometry / "unet"))
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        return ControlNetModel.from_config({**net.config, "in_channels": 4} | sizes)


@pytest.mark.parametrize("geometry, name", [("sd1", "SD15"), ("sd2", "SD21"), ("sd2_base", "SD21")])
def test_comfyui_knows_stable_diffusion(geometry, name):
    net = build_controlnet(geometry)
    assert detect_unet(net) == name
    check_comfyui(json.loads(net.to_json_string()))


@pytest.mark.parametrize(
    "sizes, is_detected",
    [
        ({"in_channels": 9}, False),
        ({"cross_attention_dim": 512}, False),
        ({"layers_per_block": 1}, False),
        ({"block_out_channels": [128, 256, 512, 512], "attention_head_dim": 8}, False),
        ({"attention_head_dim": 8}, True),  # it would be loaded with other heads
        ({"conditioning_embedding_out_channels": [16, 32, 96]}, True),
    ],
)
def test_comfyui_does_not_know_other_sizes(sizes, is_detected):
    """Guards the rule itself: what ComfyUI's detector does not know, and what it takes for another network."""
    net = build_controlnet("sd2", **sizes)
    assert bool(detect_unet(net)) == is_detected
    with pytest.raises(UserError, match=f"this one has another {', '.join(sizes)}: leave out") as caught:
        check_comfyui(json.loads(net.to_json_string()))
    assert "\n" not in str(caught.value)


def test_a_file_that_comfyui_cannot_load_is_not_written(command, tmp_path):
    """Guards the shipped networks, which are too small for ComfyUI: one line, and nothing is left."""
    code, out, err = command("color", "format=comfyui", f"output={tmp_path / 'models'}")
    assert (code, out, len(err)) == (2, [], 1) and "ComfyUI loads ControlNets of sd1 and sd2" in err[0]
    assert "another block_out_channels" in err[0] and not (tmp_path / "models").exists()


def test_one_file(run, command, backbone, tmp_path, any_size):
    folder, net = run
    finish(folder, net, backbone)
    code, out, err = command(folder, "format=comfyui", f"output={tmp_path / 'models'}")
    assert code == 0, err
    path = tmp_path / "models" / "harmony-color.safetensors"
    assert out == [str(path)] and list(path.parent.iterdir()) == [path]
    tensors = load_file(path)
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[k], v) for k, v in net.state_dict().items())
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    assert json.loads(texts["hint"])["branch"] == "color"
    again = ControlNetModel.from_config(json.loads(texts["config"]))
    again.load_state_dict(tensors)
    assert same_weights(again, net)


def test_half_the_size(run, command, backbone, tmp_path):
    """Guards ``half=true``: float16 on disk, the same network within its rounding, and never into the run itself."""
    folder, net = run
    finish(folder, net, backbone)
    code, lines, _ = command(str(folder), "half=true", f"output={tmp_path / 'out'}")
    assert code == 0
    for place in (tmp_path / "out" / "controlnet", tmp_path / "out"):
        assert {tensor.dtype for tensor in safetensors_of(place).values()} == {torch.float16}
    loaded = load_controlnet(tmp_path / "out")
    assert loaded.dtype == torch.float32 and loaded.conv_in.weight.allclose(net.conv_in.weight, atol=1e-3)
    code, _, errors = command(str(folder), "half=true")
    assert code == 2 and "add output=FOLDER" in errors[-1]
    assert {t.dtype for t in safetensors_of(folder / "export" / "controlnet").values()} == {torch.float32}


def safetensors_of(folder: Path) -> dict:
    return load_file(next(folder.glob("*.safetensors")))


def test_weights_that_are_halved_already(command, tmp_path):
    """Guards a file that is read by mapping it into memory: it may not be written over meanwhile."""
    output = tmp_path / "out"
    code, _, err = command(ASSETS / "color", f"output={output}", "half=true")
    assert code == 0, err
    stored = safetensors_of(output / "controlnet")
    shipped = safetensors_of(ASSETS / "color" / "controlnet")
    assert all(torch.equal(stored[name], value) for name, value in shipped.items())


def test_one_of_several_controlnets(run, command, backbone):
    """A run of several is exported one by one, each into its own folder."""
    folder, net = run
    finish(folder, net, backbone)
    (folder / "export" / "color").mkdir()
    for name in ("controlnet", *FILES):
        (folder / "export" / name).rename(folder / "export" / "color" / name)
    code, _, err = command(folder)
    assert code == 2 and "choose one of" in err[-1]
    for path in (folder / "export" / "color", folder / "export" / "color" / "controlnet"):
        code, out, err = command(path)
        assert (code, out) == (0, [str(folder / "export" / "color")]), err
    assert not (folder / "export" / "controlnet").exists()


def test_paint_by_example(command, backbone, tmp_path):
    """Guards the second kind of run: both networks and a card whose command can be typed; refused while it trains."""
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "paint_by_example" / "now"
    folder.mkdir(parents=True)
    cfg = {
        "model": {"_target_": "harmony.models.backbone.Backbone", "path": backbone.path, "weights": "hub"},
        "module": {"_target_": "harmony.training.paint_by_example.ExemplarTask"}, "data": {"batch_size": 32},
        "dataset": {"name": "backbone"}, "trainer": {"max_steps": 20}, "seed": 0,
        "evaluate": {"split": "test", "limit": None, "steps": 20, "guidance": 3.0, "seed": 0},
    }  # fmt: skip
    OmegaConf.save(cfg, folder / "config.yaml")
    code, _, err = command(folder)
    assert code == 2 and "has not ended" in err[-1]
    encoder = build_encoder(backbone.image_encoder, backbone.unet.config.cross_attention_dim)
    export_painter(build_painting_unet(backbone.unet), encoder, folder / "export", backbone)
    (folder / "metrics.json").write_text(json.dumps({"test/raw/fid": 1.5, "baseline/test/raw/fid": 2.5}))
    code, out, err = command(folder, f"output={tmp_path / 'shipped'}", "half=true", "tower=false")
    assert code == 0 and Path(out[-1]) == tmp_path / "shipped", err
    card = (tmp_path / "shipped" / "README.md").read_text()
    for words in ("method=paint_by_example", "harmony takes the backbone's", "| test/raw/fid | 2.5 | 1.5 |"):
        assert words in card, words
    assert load_painter(tmp_path / "shipped", backbone).encoder.size == 32
    code, _, err = command(folder, "format=comfyui")
    assert code == 2 and "format=comfyui is for ControlNets" in err[-1]
    code, _, err = command(folder, "checkpoint=best", f"output={tmp_path / 'x'}")
    assert code == 2 and "checkpoint=best is for ControlNets" in err[-1] and not (tmp_path / "x").exists()


@pytest.mark.parametrize("is_own", [False, True])
def test_a_backbone(command, random_backbone, tmp_path, is_own):
    """Float16 weights, and a card with figures and pictures of the newest trainings that have ended, of the experiments
    that have the folder's name, if there are any.
    """
    family = f"backbone_{random_backbone.name}" if is_own else "backbone"
    output, runs = tmp_path / "small", tmp_path / "runs"
    words = (f"backbone={random_backbone}", f"output={output}", f"paths.runs={runs}")
    code, _, err = command(*words)
    assert code == 2 and "python -m harmony.fit experiment=backbone_vae" in err[-1]
    for part in ("vae", "clip", "captioner", "inpaint"):
        for n, day in enumerate(("2026-01-01", "2026-01-02")):
            folder = runs / f"{family}_{part}" / day
            (folder / "grids").mkdir(parents=True)
            write_image(folder / "grids" / "samples_000100.png", np.full((8, 8, 3), n, np.uint8))
            (folder / "metrics.json").write_text(json.dumps({"validation/loss": n + 0.5, "train/loss": 7}))
            place = None if is_own else "datasets/studio"
            cfg = {"dataset": {"dir": place, "photos": "photos", "sources": ["coco", "a|b"], "count": 10 * n}}
            OmegaConf.save(cfg, folder / "config.yaml")
    code, out, err = command(*words)
    assert (code, out) == (0, [str(output)]), err
    assert {t.dtype for t in safetensors_of(output / "unet").values()} == {torch.float16}
    metadata, text = metadata_load(output / "README.md"), (output / "README.md").read_text()
    assert (metadata["license"], metadata["pipeline_tag"]) == ("apache-2.0", "image-to-image")
    scenes, training = f"{10 if is_own else 522} studio scenes", f"experiment={family}_vae`"
    figure = "| vae: validation/loss | 1.5 |"
    OmegaConf.save({"module": {"backbone": "work/backbone/another"}}, runs / f"{family}_vae" / day / "config.yaml")
    code, _, err = command(*words)
    assert code == 2 and "trained work/backbone/another, not" in err[-1]
    for phrase in (scenes, training, r"photographs of coco, a\|b", figure, "](clip.png)"):
        assert phrase in text, phrase
    assert (read_image(output / "inpaint.png") == 1).all()


def test_mistakes(run, command, tmp_path, backbone, awake):
    folder, net = run
    other = export_controlnet(net, tmp_path / "plain", "color", {}, backbone)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"PK not a checkpoint")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((), "what shall be exported?"),
        ((tmp_path / "nowhere",), "does not exist"),
        ((folder,), "cannot read"),
        ((folder, "format=onnx"), "give one of diffusers, comfyui"),
        ((other,), "belongs to no run; add output="),
        ((other, "checkpoint=last", f"output={tmp_path / 'x'}"), "belongs to no run: leave out checkpoint=last"),
        ((tmp_path / "empty", f"output={tmp_path / 'x'}"), "holds no ControlNet"),
    ):
        code, _, err = command(*words)
        assert code == 2 and len(err) == 1 and message in err[0], (words, err)
    assert not (tmp_path / "x").exists()
    for node, message in (  # what a run was that export does not know, or not yet
        ({"_target_": "harmony.training.judge.JudgeTask"}, "export takes runs of ControlTask"),
        ({"_target_": "harmony.training.control.ControlTask"}, "module.branch is None"),
        ({"_target_": "harmony.training.control.JointTask", "branch": ["color", "raw"]}, "several ControlNets"),
    ):
        OmegaConf.save(configuration(backbone) | {"module": node}, folder / "config.yaml")
        code, _, err = command(folder)
        assert code == 2 and len(err) == 1 and message in err[0], err


# --- the stock pipeline


def stock(backbone, *folders):
    nets = [ControlNetModel.from_pretrained(folder / "controlnet") for folder in folders]
    net = nets[0] if len(nets) == 1 else nets
    pipeline = StableDiffusionControlNetInpaintPipeline.from_pretrained(backbone.path, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "weights, predicts", [((1.0,), "epsilon"), ((0.7, 0.3), "epsilon"), ((0.7, 0.3), "v_prediction")]
)
def test_the_stock_pipeline_gives_the_identical_image(backbone, awake, tmp_path, weights, predicts):
    shutil.copytree(backbone.path, tmp_path / "backbone")
    settings = tmp_path / "backbone" / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prediction_type": predicts}))
    backbone = Backbone(str(tmp_path / "backbone"))
    assert backbone.prediction_type == predicts
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 32, 32, generator=rng) * 2 - 1
    region = torch.zeros(1, 1, 32, 32)
    region[..., 8:26, 5:21] = 1
    noise, hints = torch.randn(1, 4, 8, 8, generator=rng), [torch.rand(1, 3, 32, 32, generator=rng) for _ in weights]
    nets, folders = (
        [awake(backbone, 1 + i) for i in range(len(weights))],
        [tmp_path / str(i) for i in range(len(weights))],
    )
    for net, folder in zip(nets, folders, strict=True):
        export_controlnet(net, folder, "color", {}, backbone)
    alone = len(weights) == 1
    theirs = stock(backbone, *folders)(
        "a red mushroom on snow",
        image=image,
        mask_image=region,
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

    moments = backbone.moments(image * (1 - region))
    unit = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))  # the pipeline samples the posterior
    masked, cells = backbone.latent(moments, unit), torch.nn.functional.interpolate(region, size=(8, 8))
    text, empty = backbone.prompt(["a red mushroom on snow"]), backbone.prompt([""])

    def ours(controls):
        z = inpaint(backbone, noise, cells, masked, text, empty, Schedule(10, 3.0), controls)
        return (backbone.decode(z) / 2 + 0.5).clamp(0, 1)

    pictures = ours(list(zip(nets, hints, weights, strict=True)))
    torch.testing.assert_close(pictures, theirs, rtol=0, atol=1e-5)
    assert (ours([]) - theirs).abs().max() > 1e-2  # the ControlNets matter
    assert (ours([(nets[0], hints[0], 0.5)]) - theirs).abs().max() > 1e-3  # and so do their weights


def picture_and_mask(side: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((side, side), bool)
    mask[side // 3 : side * 2 // 3, side // 4 : side * 3 // 4] = True
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8), mask


def run_snippets(folder: Path, side: int) -> None:
    """Run each block of Python in the card in ``folder`` with two steps; only the hole may change."""
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    picture, mask = picture_and_mask(side)
    write_image(folder / "composite.png", picture)
    write_image(folder / "mask.png", mask)
    assert snippets
    for snippet in snippets:
        exec(snippet.replace("num_inference_steps=20", "num_inference_steps=2"), {})
        result, region = read_image("harmonized.png"), hole(mask, "dilate")
        assert np.array_equal(result[~region], picture[~region])
        assert (result[region] != picture[region]).mean() > 0.5
        Path("harmonized.png").unlink()


def test_an_export_of_version_01_counts_in_cells(run, command, backbone, tmp_path):
    """Guards old runs: card, script and net speak of the same blur, in latent cells of the run's backbone."""
    folder, net = run
    finish(folder, net, backbone)
    file = folder / "export" / "controlnet" / "hint.json"
    facts = json.loads(file.read_text())
    del facts["cell"]
    file.write_text(json.dumps(facts | {"parameters": {"sigma": 64, "normalize": True}}))
    code, _, err = command(folder, f"output={tmp_path / 'new'}")
    assert code == 0, err
    facts = json.loads((tmp_path / "new" / "controlnet" / "hint.json").read_text())
    assert facts["parameters"] == {"blur": 64 * 8 / 512, "normalize": True} and facts["cell"] == 4
    assert "cell=4, blur=1.0, normalize=True" in (tmp_path / "new" / "README.md").read_text()


def test_the_snippets_of_a_card_run(run, command, backbone, monkeypatch):
    folder, net = run
    finish(folder, net, backbone)
    assert command(folder)[0] == 0
    monkeypatch.chdir(folder / "export")
    run_snippets(folder / "export", 32)


@pytest.mark.parametrize("name", ["color", "color_relight"])
@pytest.mark.parametrize("is_new", [False, True], ids=["shipped", "exported again"])
def test_the_snippets_of_a_shipped_card_run(name, is_new, command, tmp_path, monkeypatch):
    """Guards weights in half precision: all parts of the pipeline must be asked for in one precision."""
    assert {tensor.dtype for tensor in safetensors_of(ASSETS / name / "controlnet").values()} == {torch.float16}
    if is_new:
        code, _, err = command(name, f"output={tmp_path / name}")
        assert code == 0, err
    else:
        shutil.copytree(ASSETS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    run_snippets(tmp_path / name, 64)


# --- the hub


class Hub(BaseHTTPRequestHandler):
    """What a model hub answers to an upload: it keeps the files of the commit in ``server.files``."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server, answer = self.server, {}
        if self.headers["Authorization"] != "Bearer hf_secret":
            return self.reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            server.repositories.append(json.loads(body))
            answer = {"url": f"{server.address}/{json.loads(body)['organization']}/net", "id": "org/net"}
        elif self.path == "/api/models/org/net/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **kinds} for path in paths]}
        elif self.path == "/api/models/org/net/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{server.address}/org/net/commit/abc", "commitOid": "abc"}
        self.reply(200, answer)

    def do_GET(self):
        self.reply(404, {"error": "not here"})

    def reply(self, code: int, answer: dict):
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, which is the one that uploads go to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.files, server.address = [], {}, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_push(run, command, backbone, hub, monkeypatch, any_size):
    """Guards what leaves this machine: the files of the export and nothing else, into a repository that is private."""
    folder, net = run
    finish(folder, net, backbone)
    (folder / "export" / "notes.txt").write_text("mine")
    code, out, err = command(folder, "push=org/net")
    assert code == 0, err
    assert out == [f"uploaded to {hub.address}/org/net", str(folder / "export")]
    (repository,) = hub.repositories
    assert (repository["organization"], repository["name"]) == ("org", "net")
    assert repository.get("private") or repository.get("visibility") == "private"
    names = {*FILES, *(f"controlnet/{name}" for name in FILES), "README.md", "grid.png", "model_index.json"}
    assert hub.files.keys() == names | {"pipeline.py"}
    assert all((folder / "export" / name).read_bytes() == content for name, content in hub.files.items())
    card = hub.files["README.md"].decode()
    assert 'custom_pipeline="org/net"' in card and "controlnet=org/net " in card and "folder of this card" not in card
    told = b"".join(content for name, content in hub.files.items() if name.endswith((".md", ".json")))
    assert str(Path(backbone.path).parent).encode() not in told, "no folder of this machine"
    words = ("dataset.dir=/home/me/photos", "experiment=color", "/home/me")
    assert [hide_folder(word) for word in words] == ["dataset.dir=FOLDER", "experiment=color", "/home/me"]
    fetched = folder.parent / "fetched"
    for name, content in hub.files.items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **options: str(fetched))
    branch = load_branch("org/net", backbone)
    assert (branch.name, branch.parameters) == ("color", HINTS["color"]), "by its id it sees what it was taught with"
    assert branch.source == net_hash(fetched)
    assert command(folder, "format=comfyui", "push=org/net")[0] == 0
    assert hub.files.keys() == names | {"pipeline.py", "harmony-color.safetensors"}


def test_nothing_else_is_overwritten(run, command, backbone, tmp_path):
    """Guards what lies in output= already: the weights that are read, another pipeline, code and settings of others."""
    folder, net = run
    finish(folder, net, backbone)
    flat = tmp_path / "flat"
    shutil.copytree(folder / "export" / "controlnet", flat)
    before = sha256(flat / WEIGHTS)
    code, _, err = command(flat, f"output={flat}", "half=true")
    assert code == 2 and "holds the weights that are read" in err[-1] and sha256(flat / WEIGHTS) == before
    others = {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}
    others |= {"config.json": "[]", "pipeline.py": "mine"}
    for name, text in others.items():
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        (place / name).write_text(text)
        code, _, err = command(folder, f"output={place}")
        assert code == 2 and f"{name} is not of an export" in err[-1], err
        assert [path.name for path in place.iterdir()] == [name] and (place / name).read_text() == text
    assert [command(folder, f"output={tmp_path / 'own'}")[0] for _ in range(2)] == [0, 0], "its own it replaces"


def test_a_push_that_fails_is_said(run, command, backbone, hub, monkeypatch):
    folder, net = run
    finish(folder, net, backbone)
    for name in ("net", "a/b/c", "org/a b", "../net"):
        code, _, err = command(folder, f"push={name}")
        assert code == 2 and len(err) == 1 and "give a repository on the hub, owner/name" in err[0], err
    assert not (folder / "export" / "README.md").exists(), "a wrong name is refused before anything is written"
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    code, _, err = command(folder, "push=org/net")
    assert code == 2 and len(err) == 1 and "log in by hf auth login" in err[0] and str(folder / "export") in err[0], err
    hub.shutdown()
    hub.server_close()
    code, _, err = command(folder, "push=org/net")
    assert code == 2 and len(err) == 1 and "cannot be uploaded to org/net" in err[0], err
    assert "log in" not in err[0] and err[0].endswith("give the same command again")
    assert not hub.files and (folder / "export" / "README.md").exists()
    code, _, err = command(f"backbone={backbone.path}", "output=x", "push=org/net")
    assert code == 2 and len(err) == 1 and "push=org/net is for runs" in err[0], err


# --- cards


def card_of(folder: Path, **facts) -> tuple[dict, str]:
    """(metadata, text) of the card of a color ControlNet; ``facts`` join those of hint.json."""
    text = render_controlnet_card(
        RunFolder(folder), {"branch": "color", "parameters": {}, "backbone": "tiny"} | facts, False, None
    )
    (folder / "README.md").write_text(text)
    return metadata_load(folder / "README.md"), text


def test_metadata_for_the_hub(tmp_path):
    """A backbone on the hub is the base model, a folder of any name is not."""
    metadata, text = card_of(tmp_path, backbone="sd2-community/stable-diffusion-2-inpainting")
    assert metadata["base_model"] == "sd2-community/stable-diffusion-2-inpainting"
    assert (metadata["base_model_relation"], metadata["pipeline_tag"]) == ("adapter", "image-to-image")
    assert "model.path=sd2-community/stable-diffusion-2-inpainting" in text
    assert "    backbone=" not in text, "the export names it"
    for name in ("tiny", "/some/where", "work/backbone/small", "a b/c"):
        metadata, text = card_of(tmp_path, backbone=name)
        assert metadata["library_name"] == "diffusers" and "base_model" not in metadata
        assert f"    backbone=backbone_path({name!r})," in text


def test_a_controlnet_of_unknown_origin_has_a_card(tmp_path):
    text = render_controlnet_card(RunFolder(tmp_path), {}, False, "mit")
    assert "came without a `hint.json`" in text and "```python" not in text and "None were measured" in text


def test_foreign_text_is_shown_literally(run, command, backbone):
    """Nothing that a stranger's files hold is markup, ends a code block or is read by a shell."""
    folder, net = run
    finish(folder, net, backbone)
    hint = folder / "export" / "controlnet" / "hint.json"
    hint.write_text(json.dumps(json.loads(hint.read_text()) | {"backbone": "a'; rm -rf ~ #"}))
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance |= {"device": "<img src=x>\n# a | b", "command": ["fit", "x=\n```\n# title", "{{ 7 * 7 }}"]}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    name = "a|b](http://x)<b>"
    (folder / "metrics.json").write_text(json.dumps({name: 1, f"baseline/{name}": 2}))
    assert command(folder)[0] == 0
    text = (folder / "export" / "README.md").read_text()
    assert "\n# title" not in text and "<img" not in text.replace("\\<img", "") and "{{ 7 * 7 }}" in text
    assert r"| a\|b\](http://x)\<b\> | 2 | 1 |" in text
    assert """controlnet=. 'model.path=a'"'"'; rm -rf ~ #'""" in text
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```bash", "```", "```python", "```", "```bash", "```"]


def test_escapes():
    assert escape_cell("a|b\n<c> `d`") == r"a\|b \<c\> \`d\`"
    assert [format_code(text) for text in ("plain", "a`b``c", None)] == ["`plain`", "``` a`b``c ```", "`unknown`"]


# --- runs of strangers, and of an older day


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_from_before_the_modules_moved(run, command, backbone, ended):
    folder, net = run
    old = configuration(backbone)
    old["model"]["_target_"], old["module"]["_target_"] = "harmony.models.kit.Kit", "harmony.control.ControlTask"
    OmegaConf.save(old, folder / "config.yaml")
    if ended:
        finish(folder, net, backbone)
    code, _, err = command(folder)
    assert code == 0, err
    assert same_weights(load_controlnet(folder), net)


@pytest.mark.parametrize("place", ["model", "module", "model.path", "data.hints.color.blur", "data", "callbacks.x"])
@pytest.mark.parametrize("ended", [False, True])
def test_nothing_that_a_config_names_is_called(run, command, backbone, tmp_path, place, ended):
    """A stranger's run is refused in one line, or exported where nothing reads what it names."""
    folder, net = run
    if ended:
        finish(folder, net, backbone)
    proof = tmp_path / "proof"
    bait = {"_target_": "shutil.copyfile", "src": str(folder / "config.yaml"), "dst": str(proof)}
    instantiate(bait)
    assert proof.exists(), "the bait itself works"
    proof.unlink()
    cfg = OmegaConf.create(configuration(backbone))
    OmegaConf.update(cfg, place, bait, merge=False, force_add=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    code, _, err = command(folder)
    assert not proof.exists()
    read = place in ("model", "module") or (not ended and place in ("model.path", "data.hints.color.blur"))
    assert (code, len(err)) == ((2, 1) if read else (0, 0)), err


def test_interpolations_of_a_stranger_stay_text(run, command, backbone, monkeypatch):
    folder, net = run
    monkeypatch.setenv("SECRET", "hunter2")
    cfg = configuration(backbone)
    cfg["dataset"]["name"] = "${oc.env:SECRET}"
    OmegaConf.save(cfg, folder / "config.yaml")
    assert command(folder)[0] == 0
    card = (folder / "export" / "README.md").read_text()
    assert "${oc.env:SECRET}" in card and "hunter2" not in card
    cfg["model"]["path"] = "${oc.env:SECRET}"
    OmegaConf.save(cfg, folder / "config.yaml")
    code, _, err = command(folder)
    assert code == 2 and len(err) == 1 and "hunter2" not in err[0]


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.json",
        "provenance.json",
        "checkpoints/last.ckpt",
        "grids/samples_000800.png",
        "export/controlnet/hint.json",
        "export/controlnet/config.json",
        "export/controlnet/diffusion_pytorch_model.safetensors",
        "grids",
        "export/controlnet",
        "export",
    ],
)
def test_links_out_of_a_run_are_refused(run, refused, backbone, tmp_path, name):
    folder, net = run
    finish(folder, net, backbone)
    if name.startswith("checkpoints"):
        (folder / "metrics.json").unlink()
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / Path(name).name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    output, before = tmp_path / "x", sorted(path.name for path in outside.rglob("*"))
    for options in ({"output": output}, {}):
        assert "no regular file" in refused(folder, **options)
        assert sorted(path.name for path in outside.rglob("*")) == before and not output.exists()


def test_links_in_a_paint_by_example_are_refused(refused, backbone, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = configuration(backbone) | {"module": {"_target_": "harmony.training.paint_by_example.ExemplarTask"}}
    OmegaConf.save(cfg, folder / "config.yaml")
    encoder = build_encoder(backbone.image_encoder, backbone.unet.config.cross_attention_dim)
    export_painter(build_painting_unet(backbone.unet), encoder, folder / "export", backbone)
    (folder / "metrics.json").write_text("{}")
    weights = folder / "export" / "paint_by_example" / "image_encoder" / "model.safetensors"
    weights.rename(tmp_path / "outside")
    weights.symlink_to(tmp_path / "outside")
    assert "no regular file" in refused(folder, output=tmp_path / "x") and not (tmp_path / "x").exists()


def test_a_pipe_is_no_picture(run, refused, backbone, tmp_path):
    """Reading it would wait for ever."""
    folder, net = run
    finish(folder, net, backbone)
    os.mkfifo(folder / "grids" / "samples_999999.png")
    assert "no regular file" in refused(folder, output=tmp_path / "x")


@pytest.mark.parametrize(
    "facts",
    [
        {"branch": "../../../escaped"},
        {"branch": "edges"},
        {"branch": ["color"]},
        {"parameters": {"blur": {"a": 1}}},
        {"parameters": {"__class__": 1}},
        {"parameters": []},
    ],
)
@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_a_hint_is_one_of_ours(run, refused, backbone, tmp_path, facts, kind):
    folder, net = run
    finish(folder, net, backbone)
    hint = folder / "export" / "controlnet" / "hint.json"
    hint.write_text(json.dumps(json.loads(hint.read_text()) | facts))
    output = tmp_path / "a" / "b" / "c"
    assert "hint.json is damaged" in refused(folder, format=kind, output=output)
    assert not output.exists() and not list(tmp_path.glob("*escaped*"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("config.yaml", "model: !!python/object/apply:os.getcwd []"),
        ("metrics.json", "{"),
        ("metrics.json", '{"a": [1]}'),
        ("metrics.json", '{"a": 1%s}' % ("0" * 400)),
        ("metrics.json", "[" * 100_000),
        ("provenance.json", "[]"),
        ("provenance.json", '{"device": {"a": 1}}'),
        ("provenance.json", '{"command": "fit"}'),
        ("export/controlnet/diffusion_pytorch_model.safetensors", "no weights"),
    ],
)
def test_damaged_files_are_refused(run, refused, backbone, tmp_path, name, content):
    folder, net = run
    finish(folder, net, backbone)
    (folder / name).write_text(content)
    assert Path(name).name in refused(folder, output=tmp_path / "x", half=True)
    assert not (tmp_path / "x").exists()
