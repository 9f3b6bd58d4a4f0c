"""What watches a training: checkpoints that are whole, a guard against NaN, a CSV that goes on, grids that repeat."""

import csv
import errno
import shutil
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
    BestCheckpoint,
    MetricsCSV,
    NaNGuard,
    SampleGrid,
    Throughput,
    WeightAverage,
    list_callbacks,
    read_last_metrics,
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
    assert read_last_metrics(tmp_path / "metrics.csv")["train/loss"] == 0.1
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


def test_the_average_counts_each_step_once(random_backbone, latent_data, tmp_path):
    """Guards ``WeightAverage`` with accumulated batches: a batch without a step does not count, and a run that goes on
    has the average of the unbroken one.
    """

    def run(folder: str, steps: int, resume=None):
        torch.manual_seed(0)
        module, average = ControlTask(Backbone(str(random_backbone)), lr=1e-3, warmup=0), WeightAverage(0.9)
        options = {"resume": resume, "accumulate_grad_batches": 2, "limit_val_batches": 0}
        fit(tmp_path / folder, module, latent_data(), steps, average, checkpoints(tmp_path / folder), **options)
        return flat(module), average.average.optimization_step

    end, count = run("whole", 4)
    assert count == 4
    run("parts", 2)
    again, count = run("parts", 4, resume=tmp_path / "parts" / "last.ckpt")
    assert count == 4 and torch.equal(again, end)


class Scored(ControlTask):
    """Its validation loss after each step is given, and better than all of them when it is checked at the start."""

    scores, figure = {}, "validation/loss"

    def validation_step(self, batch, index):
        self.log(self.figure, self.scores.get(self.global_step, -9.0), batch_size=len(batch["noise"]))


@pytest.fixture
def score(random_backbone, latent_data):
    """``score(folder, scores, ...)``: train as many steps as there are scores, and validate after each of them."""

    def run(folder, scores, resume=False, figure="validation/loss", required=False, mode="min", every=1, **options):
        torch.manual_seed(0)
        task, best = Scored(Backbone(str(random_backbone)), lr=1e-3, warmup=0), BestCheckpoint(folder, FIGURE, mode)
        task.scores, task.figure, best.is_required = dict(enumerate(scores, 1)), figure, required
        resume = folder / "last.ckpt" if resume else None
        options = {"val_check_interval": every, "accumulate_grad_batches": every} | options
        trainer = fit(folder, task, latent_data(), len(scores), checkpoints(folder), best, resume=resume, **options)
        return trainer, best

    return run


FIGURE = "validation/loss"
NAN = float("nan")


def read_best(folder) -> tuple[int, float]:
    """(step, value) of the best checkpoint."""
    content = torch.load(folder / "best.ckpt", weights_only=True)
    return content["global_step"], round(float(content["callbacks"]["BestCheckpoint"]["best_model_score"]), 4)


@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ([3, 1, 2, 5], "min", (2, 1)),
        ([3, 1, 2, 5], "max", (4, 5)),
        ([4, 3, 2, 1], "min", (4, 1)),
        ([1, 1, 1, 1], "min", (1, 1)),
        ([NAN, 2, NAN, 3], "min", (2, 2)),
        ([NAN, 2, float("inf"), 3], "max", (4, 3)),
    ],
)
def test_the_best_checkpoint_is_one_file(score, tmp_path, scores, mode, best):
    """Guards ``BestCheckpoint``: the weights after the best validation, in one file beside those to go on from."""
    score(tmp_path, scores, mode=mode)
    assert read_best(tmp_path) == best
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "step=4.ckpt"}
    shutil.copy(tmp_path / "best.ckpt", tmp_path / "before.ckpt")
    score(tmp_path / "again", scores[: best[0]], mode=mode)  # a run that ends in this very step
    ours, theirs = (torch.load(tmp_path / f, weights_only=True)["state_dict"] for f in ("best.ckpt", "again/last.ckpt"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_goes_on_keeps_its_best(score, tmp_path):
    """Guards resume: the last checkpoint was written before the best validation, whose value only the best one knows;
    the run folder was moved meanwhile; batches are accumulated.
    """
    score(tmp_path / "a", [3, 1], every=2)
    last = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2 and float(last["callbacks"]["BestCheckpoint"]["best_model_score"]) == 3
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        score(folder, [3, 1, 2, 4], resume=True, every=2)
        assert read_best(folder) == (2, 1)
        score(folder, [3, 1, 2, 4, 0.5], resume=True, every=2)
        assert read_best(folder) == (5, 0.5)
    (tmp_path / "a" / "best.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot read .*best.ckpt .*remove it and continue"):
        score(tmp_path / "a", [3, 1, 2, 4, 0.5, 7], resume=True, every=2)


def test_a_training_without_the_figure_has_no_best(score, tmp_path, recwarn):
    """Guards the other tasks: nothing is kept and nothing said, and what was asked for and cannot be is one line."""
    score(tmp_path, [1, 2], figure="validation/auc")
    score(tmp_path / "off", [1, 2], limit_val_batches=0)
    score(tmp_path / "fast", [1, 2], fast_dev_run=2)
    assert not list(tmp_path.rglob("best.ckpt")) and not [w for w in recwarn if "ModelCheckpoint" in str(w.message)]
    with pytest.raises(UserError, match="logs no validation/loss but validation/auc: .*callbacks.best.monitor") as line:
        score(tmp_path, [1, 2], figure="validation/auc", required=True)
    assert "\n" not in str(line.value)
