"""No experiment can rot: each file composes, holds only known keys, and runs for two steps on a small kit."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from harmony import evaluate
from harmony.config import check_experiment, compose, load_yaml, options, why
from harmony.errors import UserError
from harmony.fit import main
from harmony.models.controlnet import export_controlnet
from harmony.models.exemplar import export_painter, fresh_encoder, painting_unet
from harmony.models.kit import Kit, load_part

FILES = {
    name: path for name, path in options("experiment").items() if path.parents[1] == Path(__file__).resolve().parents[1]
}
STUDIES = {name: path for name, path in FILES.items() if "study" in load_yaml(path)}
TRAININGS = {name: path for name, path in FILES.items() if name not in STUDIES}
QUICK = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "checkpoint_every=1",
    "logger=none",
]
TOWER = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, projection_dim: 16"
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
}  # fmt: skip
WRITES = {"VAETask": ["vae"], "CLIPTask": ["text_encoder", "image_encoder", "tokenizer"],
          "CaptionerTask": ["captioner"],
          "InpaintTask": ["unet", "scheduler"]}  # fmt: skip


@pytest.fixture(autouse=True)
def restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def composed(name: str, *more: str):
    return compose("fit", [f"experiment={name}", f"name={name}", *more])


@pytest.mark.parametrize("name", TRAININGS)
def test_it_composes_and_says_why_it_exists(name):
    """Guards the files: known keys only, a first line for ``--help``, everything resolvable."""
    check_experiment("fit", {"experiment": name})
    assert len(why(FILES[name])) > 20 and "experiment" not in load_yaml(FILES[name])
    cfg = composed(name)
    assert cfg.trainer.max_steps > 0 and cfg.module["_target_"].startswith("harmony.training.")


@pytest.mark.parametrize("name", TRAININGS)
def test_it_runs(name, random_kit, awake, prepared_work, tmp_path):
    """Guards the run: two steps of the experiment as it is written, with smaller networks and fewer pictures."""
    task = composed(name).module["_target_"].rpartition(".")[2]
    work, runs, kit = tmp_path / "work", tmp_path / "runs", tmp_path / "kit"
    shutil.copytree(random_kit, kit, ignore=shutil.ignore_patterns("unet") if task == "InpaintTask" else None)
    more = [f"paths.work={work}", f"paths.runs={runs}", f"model.path={kit}", *QUICK, *SMALL[task]]
    if composed(name).module.get("companion"):
        small, taught = Kit(str(random_kit)), {"sigma": 10, "normalize": True}
        export_controlnet(awake(small, 0), tmp_path / "companion", "color", taught, small)
        more.append(f"module.companion={tmp_path / 'companion'}")
    prepared_work(work, [f"experiment={name}", f"name={name}", *more])
    began = time.time_ns()
    main(composed(name, *more))
    (folder,) = (runs / name).iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics and all(isinstance(value, float) for value in metrics.values())
    assert (folder / "metrics.csv").read_text().count("\n") > 2 and (folder / "checkpoints" / "last.ckpt").exists()
    assert list((folder / "grids").iterdir())
    if task in ("ControlTask", "JointTask"):
        exports = [""] if task == "ControlTask" else ["color", "structure"]
        assert all((folder / "export" / name / "controlnet" / "config.json").exists() for name in exports)
        assert "test/pasted/color_de" in metrics
    if task == "ExemplarTask":
        assert (folder / "export" / "paint_by_example" / "image_encoder" / "config.json").exists()
    for part in WRITES.get(task, []):
        assert max(path.stat().st_mtime_ns for path in (kit / part).iterdir()) > began
        load_part(str(kit), part)


def test_a_training_without_evaluation_exports_all_the_same(random_kit, prepared_work, tmp_path):
    """Guards ``evaluate=null``: nothing is measured, grid and ControlNet are there."""
    work, runs = tmp_path / "work", tmp_path / "runs"
    more = [f"paths.work={work}", f"paths.runs={runs}", f"model.path={random_kit}", *QUICK, "data.batch_size=2"]
    more += ["evaluate=null", "callbacks.samples.steps=2", "+callbacks.samples.count=2"]
    prepared_work(work, ["experiment=color", "name=color", *more])
    main(composed("color", *more))
    (folder,) = (runs / "color").iterdir()
    assert not any("test/" in name for name in json.loads((folder / "metrics.json").read_text()))
    assert (folder / "export" / "controlnet" / "config.json").exists() and list((folder / "grids").iterdir())


@pytest.fixture(scope="module")
def controlnets(random_kit, awake, tmp_path_factory):
    """Overrides that give every study the ControlNets it names, none of which has learnt anything."""
    folder, kit = tmp_path_factory.mktemp("controlnets"), Kit(str(random_kit))
    branches = {"color": "color", "color_relight": "color", "structure": "structure", "raw": "raw"}
    for seed, (name, branch) in enumerate(branches.items()):
        export_controlnet(awake(kit, seed), folder / name, branch, {}, kit)
    encoder = fresh_encoder(kit.image_encoder, kit.unet.config.cross_attention_dim)
    painter = export_painter(painting_unet(kit.unet), encoder, folder, kit)
    return [*(f"controlnets.{name}={folder / name}" for name in branches), f"painter={painter}"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_composes_and_says_why_it_exists(name):
    """Guards the files: known keys only, a first line for ``--help``, a name of its own."""
    check_experiment("evaluate", {"experiment": name})
    assert len(why(STUDIES[name])) > 20
    assert compose("evaluate", [f"experiment={name}"]).name == name


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs(name, random_kit, controlnets, small_manifest, prepared_work, tmp_path):
    """Guards the way of every study: table with all rows, figure, flat metrics; nothing changes outside the hole."""
    work, runs = tmp_path / "work", tmp_path / "runs"
    more = [f"paths.work={work}", f"paths.runs={runs}", f"model.path={random_kit}", "limit=2", "steps=1", *controlnets]
    prepared_work(work, [f"experiment={name}", *more], "evaluate")
    cfg = compose("evaluate", [f"experiment={name}", *more])
    evaluate.main(cfg)
    (folder,) = (runs / name).iterdir()
    head, *rows = (folder / "table.csv").read_text().splitlines()
    listed = [row for row, node in cfg.study.methods.items() if node is not None]
    assert head.split(",")[0] == ("method" if listed else "lambda")
    assert {row.split(",")[0].split(" x")[0] for row in rows} >= set(listed)
    metrics = json.loads((folder / "metrics.json").read_text())
    drifts = [value for key, value in metrics.items() if key.endswith("test/pasted/bg_drift")]
    assert len(drifts) >= 2 and set(drifts) == {0.0}
    assert "n = 2 test pictures" in (folder / "table.md").read_text() and (folder / "figure.png").stat().st_size > 5000


def test_a_study_leaves_out_what_no_controlnet_was_given_for(
    random_kit, controlnets, small_manifest, prepared_work, tmp_path
):
    """Guards a fresh clone, which ships one ControlNet: the other rows run, and the table says what is missing."""
    work, runs = tmp_path / "work", tmp_path / "runs"
    more = [f"paths.work={work}", f"paths.runs={runs}", f"model.path={random_kit}", "limit=2", "steps=1", *controlnets]
    more += ["controlnets.raw=null", "study.degrade=[1]"]
    prepared_work(work, ["experiment=fig7", *more], "evaluate")
    evaluate.main(compose("evaluate", ["experiment=fig7", *more]))
    (folder,) = (runs / "fig7").iterdir()
    text = (folder / "table.md").read_text()
    assert "| decomposed |" in text and "| raw |" not in text and "raw: left out, give controlnets.raw=RUN" in text


def test_a_study_that_cannot_do_without_a_controlnet_says_so(random_kit, controlnets, prepared_work, tmp_path):
    """Guards the curve over lambda, which is nothing without both."""
    more = [f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}", f"model.path={random_kit}"]
    more += ["limit=2", "steps=1", *controlnets, "controlnets.structure=null"]
    prepared_work(tmp_path / "work", ["experiment=table2", *more], "evaluate")
    with pytest.raises(UserError, match="controlnets.structure=RUN"):
        evaluate.main(compose("evaluate", ["experiment=table2", *more]))
