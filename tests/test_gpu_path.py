"""What a GPU does differently, done by the CPU: frozen networks with their channels last, UNet and text encoder in
bfloat16, mixed precision; from the latent cache to every method and export.
"""

import csv
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from harmony import edit, evaluate, export, fit, harmonize
from harmony.cli.compose import compose
from harmony.pixels.images import read_image, write_image

CONCEPT = Path(__file__).resolve().parents[1] / "datasets" / "editing" / "concepts" / "teal_mug"
CONTROL = ["evaluate.limit=2", "evaluate.steps=2", "callbacks.samples.steps=2", "+callbacks.samples.count=2"]
TRAININGS = {
    "color": CONTROL,
    "joint": [*CONTROL, "evaluate=null"],
    "paint_by_example": [*CONTROL, "data.variants=1", "data.hints.exemplar.size=32"],
    "textual_inversion": ["token='<mug>'", "init=car", f"dataset.dir={CONCEPT}", "data.previews=2", "module.steps=2"],
    "judge": ["data.side=32"],
}
GPU = ["model.dtype=bfloat16", "trainer.precision=bf16-mixed"]


@pytest.fixture(scope="module", autouse=True)
def layout():
    """Frozen networks are laid out as they are on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmony.models.backbone.memory_format", lambda device: torch.channels_last)
        yield


@pytest.fixture(scope="module")
def trained(random_backbone, prepared_work, tmp_path_factory):
    """``trained(name, *precision)``: the run folder of three steps of an experiment; each is made once."""
    folder = tmp_path_factory.mktemp("gpu_path")

    @functools.cache
    def train(name: str, *precision: str) -> Path:
        runs = folder / f"{name}-{len(precision)}"
        words = [
            f"experiment={name}", f"name={name}", f"model.path={random_backbone}", f"paths.work={folder / 'work'}",
            f"paths.runs={runs}", "trainer.accelerator=cpu", "trainer.max_steps=3", "trainer.val_check_interval=3",
            "trainer.log_every_n_steps=1", "data.batch_size=2", "logger=none", *TRAININGS[name], *precision,
        ]  # fmt: skip
        prepared_work(folder / "work", words)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HARMONY_RUN_DIR", "")
            fit.main(compose("fit", words))
        (run,) = (runs / name).iterdir()
        return run

    return train


@pytest.fixture
def typed(random_backbone, tmp_path, monkeypatch, capsys):
    """``typed(command, *words)``: the lines that a command printed, typed in a folder with a photograph, an object in
    it and its mask.
    """
    rng = np.random.default_rng(0)
    write_image(tmp_path / "b.png", rng.integers(0, 256, (48, 70, 3), dtype=np.uint8))
    mask = np.zeros((48, 70), bool)
    mask[15:35, 20:45] = True
    write_image(tmp_path / "m.png", mask)
    monkeypatch.chdir(tmp_path)

    def run(command, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [command.__name__, *words])
        try:
            command.main()
        except SystemExit as left:
            assert not left.code, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return run, [f"model.path={random_backbone}", "model.dtype=bfloat16"]


def losses(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "train/loss"]


def test_the_networks_are_those_of_a_gpu(random_backbone):
    """Guards this file: were they not, nothing here would be tested."""
    backbone = instantiate(compose("fit", ["experiment=color", f"model.path={random_backbone}", *GPU]).model)
    weight = backbone.unet.conv_in.weight
    assert weight.dtype == torch.bfloat16 and backbone.vae.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("name", TRAININGS)
def test_every_task_trains(name, trained):
    """Guards the way of each training: cache, steps, validation, grid, figures, export."""
    run = trained(name, *(GPU if name != "judge" else GPU[1:]))
    assert len(losses(run)) == 3 and np.isfinite(losses(run)).all()
    assert np.isfinite([*json.loads((run / "metrics.json").read_text()).values()]).all()
    files = [*(run / "export").rglob("*.safetensors")]
    assert files and all(value.isfinite().all() for file in files for value in load_file(file).values())


def test_it_trains_as_in_float32(trained):
    """Guards the numbers: the losses of the first steps are those of float32, as far as bfloat16 reaches."""
    assert losses(trained("color", *GPU)) == pytest.approx(losses(trained("color")), rel=0.02)


def test_a_controlnet_is_evaluated(trained, typed):
    command, backbone = typed
    run = trained("color", *GPU)
    words = ["dataset=studio", f"controlnet={run}", f"paths.work={run.parents[2] / 'work'}", "limit=2", "steps=2"]
    folder = Path(command(evaluate, *words, "logger=none", *backbone)[-2]).parent
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures and np.isfinite([*figures.values()]).all()


def test_every_method_harmonizes(trained, typed):
    """Guards the way of each method through the backbone, the judge's among them; all that is not hole stays."""
    command, backbone = typed
    joint = trained("joint", *GPU) / "export"
    nets = [f"controlnet={joint / 'color'}", f"structure={joint / 'structure'}", "prompt=a cat", "guidance=2"]
    judge = trained("judge", *GPU[1:])
    methods = {
        "exact": nets,
        "near": [*nets, "solver=unipc", "guided=0.5", "encoder_every=2"],
        "exemplar": ["method=paint_by_example", f"painter={trained('paint_by_example', *GPU)}"],
        "prior": ["method=zero_shot", f"evaluator={judge}", "rounds=2", "prompts=a cat: warm -> cold"],
    }
    for name, words in methods.items():
        out = command(harmonize, "composite=b.png", "mask=m.png", "steps=2", f"output={name}", *words, *backbone)
        made, composite, hole = (read_image(Path(name) / f"{f}.png") for f in ("harmonized", "composite", "hole"))
        inside = hole[..., 0] > 0
        assert np.array_equal(made[~inside], composite[~inside]), out
        if name == "prior":  # the judge, hardly trained here, may choose the composite itself
            assert len(list((Path(name) / "rounds").glob("*.png"))) > 1
        else:
            assert (made != composite)[inside].any(), out


@pytest.mark.parametrize("inner", [0, 1])
def test_a_photograph_is_edited(trained, typed, inner):
    """Guards inversion, its file, attention maps and masks, with a word that was learned on this path."""
    command, backbone = typed
    learnt = trained("textual_inversion", *GPU) / "export"
    prompts = ["source=a red mushroom on snow", "target=a <mug> mushroom on snow", f"words={learnt}"]
    words = ["image=b.png", *prompts, "steps=2", f"inner={inner}", "local=true", *backbone]
    made = [command(edit, *words, f"output={name}") and read_image(Path(name) / "edit.png") for name in ("a", "b")]
    assert np.array_equal(*made), "the second finds the inversion in its file"
    assert len([*Path("work").rglob("*.safetensors")]) == 1


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*/*.safetensors"))  # not those at the top, which are the same
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def test_an_export_is_what_was_trained(trained, typed):
    """Guards the weights: whatever precision a run samples in, its export holds what was trained."""
    command, _ = typed
    for name, options in (("color", ["half=true"]), ("paint_by_example", ["tower=false"])):
        run = trained(name, *GPU)
        own = tensors(run / "export")
        command(export, str(run), "output=whole")
        whole = tensors(Path("whole"))
        assert whole.keys() == own.keys() and all(torch.equal(whole[key], own[key]) for key in own)
        command(export, str(run), f"output={name}", *options)
        assert all(torch.equal(value.half(), own[key].half()) for key, value in tensors(Path(name)).items())
        shutil.rmtree("whole")
