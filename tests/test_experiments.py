"""No experiment can rot: each file composes, holds only known keys, and runs for two steps on a small backbone."""

import csv
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch.utils._pytree import tree_leaves
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPConfig, CLIPModel

from harmony import evaluate, fit
from harmony.cli.compose import CONFIGS, compose, load_yaml, options, why
from harmony.cli.explain import check_experiment, experiments
from harmony.fit import main
from harmony.models.backbone import Backbone, load_part
from harmony.models.controlnet import export_controlnet, from_unet
from harmony.models.judge import load_judge
from harmony.models.textual_inversion import read_word
from harmony.pixels.images import sha256

FILES = {
    name: path for name, path in options("experiment").items() if path.parents[1] == Path(__file__).resolve().parents[1]
}
TRAININGS = {name: path for name, path in experiments("fit", CONFIGS).items() if name in FILES}
QUICK = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "checkpoint_every=1",
    "logger=none",
]
TOWER = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, projection_dim: 16"
CONCEPT = Path(__file__).resolve().parents[1] / "datasets" / "editing" / "concepts" / "teal_mug"
PIXELS = ["data.size=16", "data.batch_size=4", "trainer.val_check_interval=1"]
CONTROL = [
    "data.batch_size=2", "evaluate.limit=2", "evaluate.steps=2", "callbacks.samples.steps=2",
    "+callbacks.samples.count=2",
]  # fmt: skip
# what makes an experiment small, by the task that it trains
SMALL = {
    "ControlTask": CONTROL,
    "JointTask": CONTROL,
    "ExemplarTask": [*CONTROL, "data.variants=1", "data.hints.exemplar.size=32"],
    "VAETask": [*PIXELS, "module.config.block_out_channels=[8,8,8]"],
    "CLIPTask": [
        *PIXELS, "module.vocabulary=400", "module.length=16", f"module.config.text_config={TOWER}}}",
        f"module.config.vision_config={TOWER}, image_size: 16, patch_size: 8}}", "module.config.projection_dim=16",
    ],
    "CaptionerTask": [
        *PIXELS, "module.vocabulary=200", "module.length=16",
        f"module.config.text_config={TOWER}, encoder_hidden_size: 16}}",
        f"module.config.vision_config={TOWER}, image_size: 16, patch_size: 8}}", "module.config.projection_dim=16",
    ],
    "InpaintTask": [
        "data.batch_size=2", "data.variants=1", "trainer.val_check_interval=2", "module.config.sample_size=8",
        "module.config.block_out_channels=[8,16,16]", "module.config.norm_num_groups=4",
        "module.config.attention_head_dim=2",
    ],
    "TextualInversionTask": [
        "token='<mug>'", "init=car", "vectors=2", f"dataset.dir={CONCEPT}", "data.batch_size=2", "data.previews=2",
        "module.steps=2", "trainer.val_check_interval=2",
    ],
    "JudgeTask": ["data.side=32", "data.batch_size=2", "trainer.val_check_interval=2"],
}  # fmt: skip
WRITES = {"VAETask": ["vae"], "CLIPTask": ["text_encoder", "image_encoder", "tokenizer"],
          "CaptionerTask": ["captioner"],
          "InpaintTask": ["unet", "scheduler"]}  # fmt: skip


@pytest.mark.parametrize("name", ["color", "structure", "raw", "joint"])
def test_the_runs_of_liu_2025(name):
    """Guards ``color_paper`` and its siblings: their setting in the place of the embedded one, below what is typed;
    several machines keep the global batch; a trainer alone changes no learning rate.
    """
    words = ["model=sd2", "dataset=open_images"]
    cfg, plain = composed(f"{name}_paper", *words), composed(name)
    assert composed(name, "trainer=ddp8").module == plain.module
    assert cfg.trainer.devices * cfg.data.batch_size == 64 and cfg.trainer.precision == "bf16-mixed"
    assert (cfg.module.lr, cfg.module.zero_init_lr, cfg.module.warmup, cfg.module.decay) == (1e-6, None, 10_000, False)
    untouched = OmegaConf.load(CONFIGS / "task" / "control.yaml")
    assert cfg.module.objective == untouched.module.objective and cfg.evaluate.steps == untouched.evaluate.steps
    assert cfg.module.prompt_dropout == untouched.module.prompt_dropout and cfg.guidance == untouched.guidance
    assert cfg.model.geometry == "sd2" and cfg.module.branch == plain.module.branch and cfg.module.compile
    assert plain.module.lr == 1e-3 and plain.trainer.max_steps == 500
    assert composed(f"{name}_paper", *words, "module.lr=2e-6").module.lr == 2e-6
    script = (FILES["color"].parent / "color_paper.sbatch").read_text()
    sizes = dict(re.findall(r"--(nodes|ntasks-per-node)=(\d+)", script)) | dict(
        re.findall(r"(batch_size)=(\d+)", script)
    )
    assert int(sizes["nodes"]) * int(sizes["ntasks-per-node"]) * int(sizes["batch_size"]) == 64


def composed(name: str, *more: str):
    return compose("fit", [f"experiment={name}", f"name={name}", *more])


def test_the_small_backbone_fits_together():
    """Guards the small backbone: one folder, one dataset, 256 px, all parts and three ControlNets below 45 MB."""
    parts = {part: composed(f"backbone_small_{part}") for part in ("vae", "clip", "captioner", "inpaint")}
    assert {cfg.module.backbone for cfg in parts.values()} == {"work/backbone/small"}
    assert len({str(cfg.dataset) for cfg in parts.values()}) == 1 and parts["vae"].dataset.size == 256
    config = {part: OmegaConf.to_container(cfg.module.config, resolve=True) for part, cfg in parts.items()}
    clip, captioner = CLIPConfig(**config["clip"]), BlipConfig(**config["captioner"])
    clip.text_config.vocab_size, captioner.text_config.vocab_size = 2048, 1500
    with torch.device("meta"):
        vae = AutoencoderKL(**config["vae"])
        unet = UNet2DConditionModel(cross_attention_dim=clip.text_config.hidden_size, **config["inpaint"])
        nets = [vae, CLIPModel(clip), BlipForConditionalGeneration(captioner), unet, *3 * [from_unet(unet, 8, 4)]]
    assert unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1) == vae.config.sample_size == 256
    assert 2 * sum(p.numel() for net in nets for p in net.parameters()) < 45e6
    tiny = composed("backbone_inpaint")
    assert tiny.module.backbone == "work/backbone/tiny" and tiny.module.config.sample_size == 16


@pytest.mark.parametrize("name", TRAININGS)
def test_it_composes_and_says_why_it_exists(name):
    """Guards the files: known keys only, a first line for ``--help``, everything resolvable."""
    check_experiment("fit", {"experiment": name})
    assert len(why(FILES[name])) > 20 and "experiment" not in load_yaml(FILES[name])
    cfg = composed(name)
    assert cfg.trainer.max_steps > 0 and cfg.module["_target_"].startswith("harmony.training.")


def find_task(name: str) -> str:
    return composed(name).module["_target_"].rpartition(".")[2]


def make_small(name: str, folder: Path, random_backbone: Path, prepared_work) -> list[str]:
    """Overrides that make an experiment small and keep it in ``folder``, where its dataset lies prepared."""
    task, backbone = find_task(name), folder / "backbone"
    shutil.copytree(random_backbone, backbone, ignore=shutil.ignore_patterns("unet") if task == "InpaintTask" else None)
    words = [f"paths.work={folder / 'work'}", f"paths.runs={folder / 'runs'}", f"model.path={backbone}", *QUICK]
    words += SMALL[task]
    prepared_work(folder / "work", [f"experiment={name}", f"name={name}", *words])
    return words


@pytest.mark.parametrize("name", [n for n in TRAININGS if not n.endswith("_paper") and "_small_" not in n])
def test_it_runs(name, random_backbone, awake, prepared_work, tmp_path):
    """Guards the run: two steps of the experiment as it is written, with smaller networks and fewer pictures."""
    task = find_task(name)
    words = make_small(name, tmp_path, random_backbone, prepared_work)
    runs, backbone = tmp_path / "runs", tmp_path / "backbone"
    if composed(name).module.get("companion"):
        small, taught = Backbone(str(random_backbone)), {"blur": 1.25, "normalize": True}
        export_controlnet(awake(small, 0), tmp_path / "companion", "color", taught, small)
        words.append(f"module.companion={tmp_path / 'companion'}")
    began = time.time_ns()
    main(composed(name, *words))
    (folder,) = (runs / name).iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics and all(isinstance(value, float) for value in metrics.values())
    assert (folder / "metrics.csv").read_text().count("\n") > 2 and (folder / "checkpoints" / "last.ckpt").exists()
    assert (folder / "checkpoints" / "best.ckpt").exists() == ("validation/loss" in metrics)
    assert list((folder / "grids").iterdir())
    has_pictures = "data:image/" in (folder / "report.html").read_text()
    assert has_pictures == any((folder / "grids").glob("*.png")), "the grids, where nothing else was drawn"
    if task in ("ControlTask", "JointTask"):
        exports = [""] if task == "ControlTask" else ["color", "structure"]
        assert all((folder / "export" / name / "controlnet" / "config.json").exists() for name in exports)
        assert "test/pasted/color_de" in metrics
    if task == "ExemplarTask":
        assert (folder / "export" / "paint_by_example" / "image_encoder" / "config.json").exists()
    if task == "TextualInversionTask":
        assert (folder / "export" / "learned_embeds.safetensors").exists() and read_word(folder).tokens[0] == "<mug>"
        seen = json.loads((folder / "provenance.json").read_text())["pictures"]
        assert set(seen) == {"captions.json", *(f"{n}.jpg" for n in range(5))}
        assert {"concept/clip_i", "baseline/concept/clip_i"} <= set(metrics)
    if task == "JudgeTask":
        assert load_judge(folder).side == 32 and "test/auc" in metrics
    for part in WRITES.get(task, []):
        assert max(path.stat().st_mtime_ns for path in (backbone / part).iterdir()) > began
        load_part(str(backbone), part)


def read_figures(folder: Path) -> dict[tuple[str, str], str]:
    """(step, name) -> value of ``metrics.csv``, without the speed."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] != "train/images_per_second"]
    return {(row["step"], row["name"]): row["value"] for row in rows}


def read_state(folder: Path) -> list[torch.Tensor]:
    """All tensors of the last checkpoint: weights, their average, the optimizer's moments."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    parts = [checkpoint[key] for key in ("state_dict", "averaged", "optimizer_states") if key in checkpoint]
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


def hash_parts(backbone: Path) -> dict[str, str]:
    """sha256 of each weights file of a backbone."""
    return {str(f.relative_to(backbone)): sha256(f) for f in sorted(backbone.rglob("*.safetensors"))}


class Interrupt(Callback):
    """Ctrl-C in step 3, behind the checkpoint of step 2."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name",
    ["backbone_vae", "backbone_clip", "backbone_captioner", "backbone_inpaint", "joint", "paint_by_example", "judge",
     "textual_inversion"],
)  # fmt: skip
def test_stopped_it_goes_on_exactly(name, random_backbone, prepared_work, tmp_path, monkeypatch):
    """Guards resumption of each task: stopped in step 3 of 4, the same command gives the losses, the weights and the
    exports of the unbroken run to the last bit. Killed behind the last checkpoint, it ends well with all figures.
    """
    words = make_small(name, tmp_path, random_backbone, prepared_work)
    words += ["trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=null"]
    main(composed(name, *words))
    (unbroken,) = (tmp_path / "runs" / name).iterdir()
    parts = hash_parts(tmp_path / "backbone")
    other = [*words, f"paths.runs={tmp_path / 'stopped'}"]
    original, handler = fit.list_callbacks, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(fit, "list_callbacks", lambda node: [*original(node), Interrupt()])
    with pytest.raises(SystemExit):
        main(composed(name, *other))
    signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(fit, "list_callbacks", original)
    main(composed(name, *other))
    (stopped,) = (tmp_path / "stopped" / name).iterdir()
    assert read_figures(stopped) == read_figures(unbroken) and len(read_figures(stopped)) >= 4
    states = zip(read_state(stopped), read_state(unbroken), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in states)
    assert hash_parts(tmp_path / "backbone") == parts and hash_parts(stopped / "export") == hash_parts(
        unbroken / "export"
    )

    figures = json.loads((unbroken / "metrics.json").read_text())
    (unbroken / "metrics.json").unlink()
    lines = (unbroken / "metrics.csv").read_text().splitlines(keepends=True)
    kept_lines = [line for line in lines if not line.startswith("4,") or ",train/" in line]
    (unbroken / "metrics.csv").write_text("".join(kept_lines))
    for part in WRITES.get(find_task(name), []):
        shutil.rmtree(tmp_path / "backbone" / part)
    for grid in (unbroken / "grids").iterdir() if name not in ("joint", "paint_by_example") else ():
        grid.unlink()  # of tasks that draw while they validate
    best = unbroken / "checkpoints" / "best.ckpt"
    best.unlink(missing_ok=True)
    main(composed(name, *words))
    assert best.exists() == ("validation/loss" in figures)
    if best.exists():  # what the last validation was of
        assert torch.load(best, weights_only=True)["global_step"] == 4
    figures_again = json.loads((unbroken / "metrics.json").read_text())
    for each in (figures, figures_again):
        each.pop("train/images_per_second", None)  # measured anew
    assert figures_again == pytest.approx(figures, rel=1e-4)
    assert hash_parts(tmp_path / "backbone") == parts and any((unbroken / "grids").iterdir())
    assert len(kept_lines) < len(lines) or name == "backbone_inpaint", "which draws, but measures nothing"


def test_a_training_without_evaluation_exports_all_the_same(random_backbone, prepared_work, tmp_path):
    """Guards ``evaluate=null``: nothing is measured, grid and ControlNet are there."""
    work, runs = tmp_path / "work", tmp_path / "runs"
    more = [f"paths.work={work}", f"paths.runs={runs}", f"model.path={random_backbone}", *QUICK, "data.batch_size=2"]
    more += ["evaluate=null", "callbacks.samples.steps=2", "+callbacks.samples.count=2"]
    prepared_work(work, ["experiment=color", "name=color", *more])
    main(composed("color", *more))
    (folder,) = (runs / "color").iterdir()
    assert not any("test/" in name for name in json.loads((folder / "metrics.json").read_text()))
    assert (folder / "export" / "controlnet" / "config.json").exists()
    text = (folder / "report.html").read_text()
    content = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    grids = [f"step {file.stem.rpartition('_')[2]}" for file in sorted((folder / "grids").iterdir())]
    (row,) = content["rows"]
    assert row["name"] == "samples" and [picture["title"] for picture in row["pictures"]] == grids
    assert ["train/loss"] == [name for name, _ in content["blocks"][0] if name == "train/loss"]


def test_trainings_and_studies_know_their_command(monkeypatch, capsys):
    """``fit`` lists trainings and ``evaluate`` studies; an experiment of the other one names the right command."""
    trainings, studies = (experiments(name, CONFIGS) for name in ("fit", "evaluate"))
    assert {"color", "backbone_vae", "judge"} <= {*trainings} and {"table1", "editing", "judge_bench"} <= {*studies}
    assert not {*trainings} & {*studies} and len(trainings) + len(studies) == len(options("experiment"))
    for command, right, experiment in ((fit.main, "evaluate", "table1"), (evaluate.main, "fit", "color")):
        monkeypatch.setattr(sys, "argv", ["harmony", f"experiment={experiment}"])
        with pytest.raises(SystemExit, match="2"):
            command()
        assert f": python -m harmony.{right} experiment={experiment}\n" in capsys.readouterr().err
