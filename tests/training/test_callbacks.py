"""What watches a training: checkpoints that are whole, a guard against NaN, a CSV that goes on, grids that repeat."""

import csv
import errno
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from harmony.core.errors import UserError
from harmony.models.backbone import Backbone
from harmony.pixels.images import read_image
from harmony.training.callbacks import (
    AtomicCheckpoints,
    MetricsCSV,
    NaNGuard,
    SampleGrid,
    Throughput,
    WeightAverage,
    list_callbacks,
)
from harmony.training.control import ControlTask


def fit(folder, task, data, steps, *callbacks, resume=None, **options):
    run = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=list(callbacks), default_root_dir=str(folder),
        plugins=[AtomicCheckpoints()], enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    run.fit(task, data, ckpt_path=resume)
    return run


def checkpoints(folder) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "step={step}", save_last=True, every_n_train_steps=1, auto_insert_metric_name=False)


@pytest.fixture
def task(random_backbone):
    return ControlTask(Backbone(str(random_backbone)), lr=1e-3, warmup=0)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, failure):
    """Guards atomicity: a full disk in the middle of a checkpoint is one line, and the previous file is intact."""
    io, path = AtomicCheckpoints(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.arange(3)}}, path)
    before = path.read_bytes()

    def half(content, file):
        file.write_bytes(before[:100])
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match="cannot write (checkpoint|into) .*/checkpoints") as full:
        io.save_checkpoint({"state_dict": {"a": torch.arange(9)}}, path)
    assert "\n" not in str(full.value)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.arange(3))


def test_a_damaged_or_foreign_checkpoint_is_one_line(tmp_path):
    """Guards loading: cut files and files with code in them are refused, never run."""
    io, path = AtomicCheckpoints(), tmp_path / "last.ckpt"
    io.save_checkpoint({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="last.ckpt is damaged"):
        io.load_checkpoint(path)
    torch.save({"a": SimpleNamespace()}, path)
    with pytest.raises(UserError, match="last.ckpt is damaged"):
        io.load_checkpoint(path)


class Poison(Callback):
    """Spoils weights after the second step, whose own loss was finite."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 2:
            module.net.conv_in.weight.data[0] = float("nan")


@pytest.mark.parametrize("rate, poison", [(1e30, []), (1e-3, [Poison()])], ids=["rate", "weights"])
def test_nan_stops_with_the_last_good_checkpoint(task, latent_data, tmp_path, rate, poison):
    """Guards the NaN guard: one line that names a checkpoint, and that checkpoint is finite and goes on."""
    task.lr = rate
    data = latent_data(batch_size=2)
    with pytest.raises(UserError, match="became NaN or infinite by step .*last.ckpt; lower module.lr") as stopped:
        fit(tmp_path, task, data, 30, *poison, NaNGuard(), checkpoints(tmp_path))
    assert "\n" not in str(stopped.value)
    last = tmp_path / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert str(last) in str(stopped.value) and 1 <= state["global_step"] < 5
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values())
    if poison:
        assert state["global_step"] == 1
        again = ControlTask(task.backbone, lr=1e-3, warmup=0)
        assert fit(tmp_path, again, data, 3, NaNGuard(), resume=last, enable_checkpointing=False).global_step == 3


def test_nan_without_a_checkpoint(task, latent_data, tmp_path):
    task.lr = 1e30
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        fit(tmp_path, task, latent_data(), 30, NaNGuard(every=2), enable_checkpointing=False)


def read(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_csv_goes_on(task, latent_data, tmp_path):
    """Guards the run folder's CSV: one line a figure and step, and a resumed run replaces what it does again."""
    data = latent_data()
    run = fit(tmp_path, task, data, 4, MetricsCSV(str(tmp_path)), checkpoints(tmp_path), val_check_interval=2)
    rows = read(tmp_path)
    losses = {int(r["step"]): r["value"] for r in rows if r["name"] == "train/loss"}
    assert sorted(losses) == [1, 2, 3, 4] and all(float(v) > 0 for v in losses.values())
    assert {r["name"] for r in rows} >= {
        "train/loss",
        "train/lr",
        "train/zero_conv_grad",
        "validation/loss",
        "train/loss_t0",
    }
    validated = {r["step"]: r["value"] for r in rows if r["name"] == "validation/loss"}
    assert sorted(validated) == ["2", "4"], "figures stand at the steps at which they were measured"
    assert validated["4"] == f"{float(run.callback_metrics['validation/loss']):.6g}" != validated["2"]
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("5,train/loss,0.1\n6,train/lo")  # what a killed run did after its last checkpoint
    again = ControlTask(task.backbone, lr=1e-3, warmup=0)
    fit(tmp_path, again, data, 6, MetricsCSV(str(tmp_path)), resume=tmp_path / "last.ckpt", enable_checkpointing=False)
    after = {int(r["step"]): r["value"] for r in read(tmp_path) if r["name"] == "train/loss"}
    assert sorted(after) == [1, 2, 3, 4, 5, 6] and after[5] != "0.1"
    assert {step: after[step] for step in losses} == losses
    fit(tmp_path, ControlTask(task.backbone), data, 1, MetricsCSV(str(tmp_path)), enable_checkpointing=False)
    assert {r["step"] for r in read(tmp_path)} == {"1"}, "a run that begins anew begins a new file"


def test_throughput_is_printed(task, latent_data, tmp_path, capsys):
    """Guards the lines a person reads while waiting."""
    fit(tmp_path, task, latent_data(), 4, Throughput(every=2), enable_checkpointing=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert "images a second" in lines[0] and lines[1].endswith(" 0 s left")


def test_grids_show_the_same_pictures_with_the_same_noise(task, latent_data, tmp_path, monkeypatch):
    """Guards the sample grid: drawn once a step, fixed seed, and drawing does not disturb the training."""
    data, drawn = latent_data(), []
    original = SampleGrid.draw

    def draw(self, trainer, module):
        was = self.last_step
        original(self, trainer, module)
        drawn.extend([trainer.global_step] if self.last_step != was else [])
        assert module.net.training

    monkeypatch.setattr(SampleGrid, "draw", draw)

    def train(folder, *callbacks):
        torch.manual_seed(0)  # the hint encoder is new
        new = ControlTask(task.backbone, lr=1e-3, warmup=0)
        fit(folder, new, data, 3, *callbacks, enable_checkpointing=False, accumulate_grad_batches=2)
        return new.net.state_dict()

    options = {"count": 2, "every": 2, "steps": 2, "guidance": 1.5}
    watched = [train(tmp_path / name, SampleGrid(str(tmp_path / name), **options)) for name in "ab"]
    assert drawn == [2, 3, 2, 3]
    for name in ("samples_000002.png", "samples_000003.png"):
        first, second = (read_image(tmp_path / run / "grids" / name) for run in "ab")
        assert np.array_equal(first, second) and first.shape[1] > 5 * 128
    plain = train(tmp_path)
    assert all(torch.equal(plain[name], tensor) for name, tensor in watched[0].items())


def test_callbacks_that_are_switched_off_are_left_out():
    guard = NaNGuard()
    assert list_callbacks({"a": None, "guard": guard}) == [guard]


class Record(Callback):
    """The trained weights after each step, and those that are validated."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(flat(module))

    def on_validation_batch_end(self, trainer, module, *_):
        self.validated.append(flat(module))


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def test_the_average_of_the_weights_is_validated_and_exported(random_backbone, latent_data, tmp_path):
    """Guards ``WeightAverage``: the moving average of the weights after each step; training goes on as without it; a
    run that is stopped ends with the same average to the last bit, also where no step is left.
    """

    def run(folder: str, steps: int, *callbacks, resume=None):
        torch.manual_seed(0)
        module, record = ControlTask(Backbone(str(random_backbone)), lr=1e-3, warmup=0), Record()
        data = latent_data()
        options = {"resume": resume, "val_check_interval": 4}
        fit(tmp_path / folder, module, data, steps, record, *callbacks, checkpoints(tmp_path / folder), **options)
        return flat(module), record

    last, plain = run("plain", 4)
    end, record = run("whole", 4, WeightAverage(0.9))
    assert torch.equal(last, plain.steps[-1]) and all(map(torch.equal, plain.steps, record.steps))
    start = torch.nn.Parameter(record.steps[0].clone())
    average = EMAModel([start], 0.9, use_ema_warmup=True, power=0.75)
    for weights in record.steps:
        average.step([torch.nn.Parameter(weights)])
    average.copy_to([start])
    torch.testing.assert_close(end, start.detach(), atol=1e-6, rtol=1e-4)
    assert not torch.equal(end, last) and torch.equal(record.validated[-1], end)
    run("parts", 2, WeightAverage(0.9))
    assert torch.equal(run("parts", 4, WeightAverage(0.9), resume=tmp_path / "parts" / "last.ckpt")[0], end)
    assert torch.equal(run("parts", 4, WeightAverage(0.9), resume=tmp_path / "parts" / "last.ckpt")[0], end)
    assert torch.equal(run("off", 4, WeightAverage(0.0))[0], last)
