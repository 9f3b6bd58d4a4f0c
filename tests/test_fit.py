"""``python -m harmony.fit`` from end to end: the run folder, resuming after a kill, two processes, NaN, bad input."""

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from omegaconf import OmegaConf
from PIL import Image

import harmony.fit
from harmony.cli.compose import compose
from harmony.data import preparation
from harmony.data.manifest import manifest_hash
from harmony.data.stamps import write_stamps
from harmony.fit import is_validation_missing, main
from harmony.models.controlnet import load_controlnet
from harmony.training.callbacks import read_last_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8


@pytest.fixture(scope="module")
def work(prepared_work, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "work"
    prepared_work(folder, [])
    return folder


@pytest.fixture(scope="module")
def command(random_backbone, work):
    """Overrides of a run of 8 steps that writes below ``runs``."""

    def overrides(runs: Path, *more: str) -> list[str]:
        return [
            "experiment=color", f"model.path={random_backbone}", f"paths.work={work}", f"paths.runs={runs}",
            "name=color", "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1",
            "checkpoint_every=1", "data.batch_size=2", "callbacks.speed.every=1", "+callbacks.samples.count=2",
            "callbacks.samples.steps=2", "evaluate.limit=2", "evaluate.steps=2", "logger=none", *more,
        ]  # fmt: skip

    return overrides


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> tuple[Path, list[str]]:
    """An unbroken run with W&B, in this process: its folder and what it printed."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setenv("HARMONY_RUN_DIR", "")
        patch.setenv("WANDB_DIR", str(runs.parent))
        main(compose("fit", command(runs, "logger=wandb")))
    (folder,) = (runs / "color").iterdir()
    return folder, out.getvalue().splitlines()


def losses(folder: Path) -> dict[int, str]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "train/loss"]
    assert len({row["step"] for row in rows}) == len(rows), "each step once"
    return {int(row["step"]): row["value"] for row in rows}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state["state_dict"]


def same_run(folder: Path, other: Path, steps: int = STEPS) -> None:
    """The same loss at every step to the last digit, the same final weights to the last bit."""
    assert losses(folder) == losses(other) and sorted(losses(folder)) == list(range(1, steps + 1))
    ours, theirs = weights(folder), weights(other)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    figures = [json.loads((f / "metrics.json").read_text()) for f in (folder, other)]
    assert figures[0]["test/pasted/color_de"] == figures[1]["test/pasted/color_de"]


def test_the_run_folder_holds_everything(finished, random_backbone, work, wandb_records):
    """Guards the run folder: each file, flat metrics under their names, provenance that identifies data and weights."""
    folder, _ = finished
    config = OmegaConf.load(folder / "config.yaml")
    assert "${" not in (folder / "config.yaml").read_text() and config.trainer.max_steps == STEPS
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(isinstance(value, float) for value in metrics.values())
    measured = {name.removeprefix("baseline/") for name in metrics if name.startswith("baseline/")}
    names = ("fid", "kid", "psnr", "mse", "fpsnr", "fmse", "bg_drift", "edge_f1", "color_de", "seam")
    assert measured >= {f"test/{kind}/{name}" for kind in ("raw", "pasted") for name in names} and measured <= set(
        metrics
    )
    assert metrics["test/pasted/bg_drift"] == metrics["baseline/test/pasted/bg_drift"] == 0
    assert metrics["test/raw/bg_drift"] > 0 and metrics["train/loss"] > 0
    assert metrics["test/raw/mse"] != metrics["baseline/test/raw/mse"], "the trained ControlNet changes the output"
    assert len(losses(folder)) == STEPS and list((folder / "grids").glob("samples_*.png"))
    assert {"last.ckpt", f"step={STEPS}.ckpt"} == {path.name for path in (folder / "checkpoints").iterdir()}
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["manifest"] == manifest_hash(work / "studio" / "manifest.jsonl") and facts["seed"] == 0
    assert facts["wall_time_s"] > 0 and facts["versions"]["torch"] and facts["device"].startswith("cpu")
    assert {len(facts["backbone"][part]) for part in ("vae", "unet", "text_encoder")} == {64}
    artifacts = [r.artifact for r in wandb_records(folder) if r.WhichOneof("record_type") == "artifact"]
    files = {(a.name, a.use_after_commit): {c.path: Path(c.local_path) for c in a.manifest.contents} for a in artifacts}
    assert files[("studio-manifest", True)].keys() == {"manifest.jsonl"}
    caches = files[("studio-latents", True)]
    assert [json.loads(path.read_text())["description"]["crop"] for path in caches.values()] == ["jitter", "center"]
    names = {"config.json", "diffusion_pytorch_model.safetensors", "hint.json"}
    assert files[(f"color-{random_backbone.name}-model", False)].keys() == names
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_a_run_without_a_step_left_keeps_its_figures(finished):
    """Guards a run that was killed after its last step: the figures of its training are those of metrics.csv."""
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    last = read_last_metrics(folder / "metrics.csv")
    names = [n for n in metrics if n.startswith("train/") and n != "train/images_per_second"]  # measured once more
    assert "train/loss" in names and [last[name] for name in names] == pytest.approx([metrics[n] for n in names], 1e-4)
    assert read_last_metrics(folder / "nothing.csv") == {}


def test_the_export_is_what_was_trained(finished):
    """Guards the hand-over: the exported ControlNet has the weights of the last checkpoint and knows its hint."""
    folder, _ = finished
    exported, trained = load_controlnet(folder).state_dict(), weights(folder)
    assert {f"net.{name}" for name in exported} == set(trained)
    assert all(torch.equal(tensor, trained[f"net.{name}"]) for name, tensor in exported.items())
    hint = json.loads((folder / "export" / "controlnet" / "hint.json").read_text())
    assert hint["branch"] == "color" and hint["parameters"] == {"blur": 1.25, "normalize": True}


def test_it_ends_with_a_table_and_absolute_paths(finished):
    """Guards the closing lines: before and after, the protocol of fid, and where things are."""
    folder, lines = finished
    lines = [line for line in lines if line]
    assert lines[-3:-1] == [str(folder), str(folder / "report.html")] and Path(lines[-1]).parent == folder / "grids"
    assert Path(lines[-1]).exists()
    assert any(line.startswith("| test/pasted/color_de |") for line in lines)
    assert "n = 2" in lines[-4] and "fid and kid on backbone-clip features, clip on backbone-clip" in lines[-4]


def test_it_leaves_a_page_to_look_at(finished):
    """Guards report.html: the pictures of the evaluation, its table and that of the training, options, W&B's copy."""
    folder, _ = finished
    text = (folder / "report.html").read_text()
    content = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    assert content["count"] == len(content["rows"]) == 2 and content["title"] == f"color {folder.name}"
    for row in content["rows"]:
        assert [picture["title"] for picture in row["pictures"]] == ["input", "hint", "baseline", "output", "truth"]
        sources = [base64.b64decode(picture["source"].partition(",")[2]) for picture in row["pictures"]]
        seen, _, before, after, truth = (np.array(Image.open(io.BytesIO(source)).convert("RGB")) for source in sources)
        outside = seen.any(2)  # the hole is black
        assert all(np.array_equal(y[outside], truth[outside]) for y in (before, after)), "what is pasted back"
    (head, *_), note, (_, *figures) = content["blocks"]
    assert head == ["metric", "before", "after", "change"] and note.startswith("n = 2; fid and kid on backbone-clip")
    assert "train/loss" in {name for name, _ in figures}
    assert not any(name.removeprefix("baseline/").startswith("test/") for name, _ in figures), "those are above"
    assert content["config"] == (folder / "config.yaml").read_text()
    (copy,) = folder.glob("wandb/offline-run-*/files/media/html/*.html")
    assert copy.read_text() == text


def test_interrupted_it_goes_on_exactly(finished, command, tmp_path, monkeypatch):
    """Guards exact resume: Ctrl-C in step 4, then the same command: the same losses and weights as the unbroken run."""

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    original = harmony.fit.list_callbacks
    monkeypatch.setattr(harmony.fit, "list_callbacks", lambda node: [Interrupt(), *original(node)])
    runs = tmp_path / "runs"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        main(compose("fit", command(runs)))
    signal.signal(signal.SIGINT, handler)
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    (folder,) = (runs / "color").iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not (folder / "metrics.json").exists()
    monkeypatch.setattr(harmony.fit, "list_callbacks", original)
    main(compose("fit", command(runs)))
    assert list((runs / "color").iterdir()) == [folder], "the same folder goes on"
    same_run(folder, finished[0])


@pytest.fixture
def environment(tmp_path):
    """Environment of a command in which whoever imports fiftyone dies."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "fiftyone.py").write_text(
        "import os\nprint('fiftyone was imported', flush=True)\nos._exit(99)\n"
    )
    path = os.pathsep.join([str(tmp_path / "trap"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(overrides: list[str], environment: dict, folder: Path, **more) -> subprocess.Popen:
    """The real command, in another folder than the checkout."""
    options = more | {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "harmony.fit", *overrides], env=environment, cwd=folder, **options)


def test_killed_it_goes_on_exactly(finished, command, tmp_path, environment):
    """Guards SIGKILL: the real command dies after step 3; the same command ends with the unbroken run's numbers."""
    runs = tmp_path / "runs"
    first = start(command(runs), environment, tmp_path)
    for line in first.stdout:
        if line.startswith(f"step 3/{STEPS}"):
            first.kill()
            break
    first.wait()
    assert first.returncode == -signal.SIGKILL
    (folder,) = (runs / "color").iterdir()
    assert 2 <= torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < STEPS
    second = start(command(runs), environment, tmp_path)
    lines = second.communicate()[0].splitlines()
    assert second.returncode == 0, "\n".join(lines[-30:])
    assert list((runs / "color").iterdir()) == [folder]
    assert lines[-3] == str(folder) and not any(line.startswith(f"step 1/{STEPS}") for line in lines)
    same_run(folder, finished[0])


def test_two_processes_train_as_one(command, work, tmp_path, environment):
    """Guards DDP: two processes with 2 samples each, killed after step 2 and started again, end with the caches, the
    gradients, the validation loss, the weights and the figures of one process with 4 that nothing happened to.

    The environment kills whoever imports fiftyone, rank 1 included.
    """
    runs, fresh = tmp_path / "two", tmp_path / "work"
    shutil.copytree(work, fresh, ignore=shutil.ignore_patterns("cache"))
    more = ["trainer.max_steps=4", "trainer.val_check_interval=4", "callbacks.samples=null"]
    words = command(runs, "trainer=ddp2", f"paths.work={fresh}", *more)
    first = start(words, environment, tmp_path, start_new_session=True)
    seen = []
    for line in first.stdout:
        seen.append(line)
        if line.startswith("step 2/4"):
            os.killpg(first.pid, signal.SIGKILL)
            break
    first.wait()
    assert first.returncode == -signal.SIGKILL, "".join(seen[-30:])
    made = sorted(line.split(",")[0].strip() for line in seen if line.startswith("latents: shard"))
    assert made == ["latents: shard 1/2", "latents: shard 2/2"]
    second = start(words, environment, tmp_path)
    out = second.communicate()[0]
    assert second.returncode == 0 and "fiftyone" not in out and "step 1/4" not in out, out[-3000:]
    main(compose("fit", command(tmp_path / "one", "data.batch_size=4", *more)))
    one, two = (next((tmp_path / name / "color").iterdir()) for name in ("one", "two"))
    cached = [
        {p.name: p.read_bytes() for p in sorted((folder / "studio" / "cache").rglob("*.safetensors"))}
        for folder in (work, fresh)
    ]
    assert cached[0] == cached[1] and cached[0]
    for name in ("train/zero_conv_grad", "validation/loss"):
        figures = []
        for folder in (one, two):
            with open(folder / "metrics.csv", newline="") as file:
                figures.append([float(r["value"]) for r in csv.DictReader(file) if r["name"] == name])
        assert figures[0] and figures[0] == pytest.approx(figures[1], rel=1e-4), name
    best = [read_checkpoint(folder, "best") for folder in (one, two)]
    values = [float(checkpoint["callbacks"]["BestCheckpoint"]["best_model_score"]) for checkpoint in best]
    assert [checkpoint["global_step"] for checkpoint in best] == [4, 4]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    ours, theirs = weights(one), weights(two)
    assert set(ours) == set(theirs)
    # AdamW divides a gradient by its own size, and so the rounding of one that is nearly zero: single weights may
    # differ, more of them on one processor than on another. The last convolutions began at zero, and so their norm is
    # the length of their way.
    last = [name for name in ours if name.startswith(("net.controlnet_down_blocks", "net.controlnet_mid_block"))]
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in last])
    assert apart.norm() < 0.05 * torch.cat([ours[name].flatten() for name in last]).norm()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-3
    measured = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert set(measured[0]) == set(measured[1])
    for name in ("psnr", "fpsnr", "color_de", "bg_drift"):
        figure = f"test/pasted/{name}"
        assert measured[0][figure] == pytest.approx(measured[1][figure], rel=1e-3), name


class Spoil(Callback):
    """Adds noise to the weights after step 5, so that what is validated later is worse."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 5:
            for parameter in module.net.parameters():
                parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def read_checkpoint(folder: Path, kind: str) -> dict:
    return torch.load(folder / "checkpoints" / f"{kind}.ckpt", weights_only=True)


def list_average(checkpoint: dict) -> list[torch.Tensor]:
    return checkpoint["callbacks"]["WeightAverage"]["shadow_params"]


@pytest.fixture
def spoiled(command, tmp_path, monkeypatch, capsys):
    """``spoiled(word, ...)``: the folder and the lines of a run whose best validation is not its last one."""

    def run(word: str, *more: str) -> tuple[Path, list[str]]:
        original = harmony.fit.list_callbacks
        with monkeypatch.context() as patch:
            patch.setattr(harmony.fit, "list_callbacks", lambda node: [Spoil(), *original(node)])
            words = [f"checkpoint={word}", "trainer.val_check_interval=2", "callbacks.samples=null", *more]
            main(compose("fit", command(tmp_path / "spoiled", *words)))
        return max((tmp_path / "spoiled" / "color").iterdir()), capsys.readouterr().out.splitlines()

    return run


def read_losses(folder: Path) -> dict[int, float]:
    """Step -> validation loss."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "validation/loss"]
    return {int(row["step"]): float(row["value"]) for row in rows}


@pytest.mark.parametrize("word", ["best", "last"])
def test_the_checkpoint_that_is_asked_for_is_exported(spoiled, word):
    """Guards ``checkpoint=``: the weights of that step are exported and evaluated, a line and the provenance say which;
    the other one comes from the same command on the finished run, or from export.
    """
    folder, lines = spoiled(word)
    losses = read_losses(folder)
    steps = {"best": min(losses, key=losses.get), "last": STEPS}
    assert sorted(losses) == [2, 4, 6, 8] and steps["best"] < 5 and losses[STEPS] > losses[steps["best"]]
    facts = json.loads((folder / "provenance.json").read_text())["checkpoint"]
    value = facts.pop("value")
    assert facts == {"kind": word, "step": steps[word], "figure": "validation/loss"}
    assert value == pytest.approx(losses[steps[word]], rel=1e-5)
    assert f"exported checkpoint: {word}, step {steps[word]}, validation/loss {value:.4g}" in lines
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["validation/loss"] == pytest.approx(value, rel=1e-5)
    for other in ("best", "last"):
        stored, exported = read_checkpoint(folder, other), load_controlnet(folder).state_dict()
        assert stored["global_step"] == steps[other]
        same = [torch.equal(tensor, stored["state_dict"][f"net.{name}"]) for name, tensor in exported.items()]
        assert all(same) == (other == word)
    other = {"best": "last", "last": "best"}[word]
    again, lines = spoiled(other, f"resume={folder}")
    assert again == folder and any(
        line.startswith(f"exported checkpoint: {other}, step {steps[other]}") for line in lines
    )
    stored, exported = read_checkpoint(folder, other)["state_dict"], load_controlnet(folder).state_dict()
    assert all(torch.equal(tensor, stored[f"net.{name}"]) for name, tensor in exported.items())
    measured = json.loads((folder / "metrics.json").read_text())
    assert measured["test/raw/mse"] != metrics["test/raw/mse"]


def test_the_best_average_is_exported(spoiled):
    """Guards the average beside ``checkpoint=best``: what was validated is the average of that step, so is what is
    exported.
    """
    folder, _ = spoiled("best", "callbacks.average.decay=0.9", "evaluate=null")
    best, exported = read_checkpoint(folder, "best"), load_controlnet(folder)
    losses = read_losses(folder)
    assert best["global_step"] == min(losses, key=losses.get) < 5
    assert all(map(torch.equal, exported.parameters(), list_average(best)))
    assert not torch.equal(exported.conv_in.weight, best["state_dict"]["net.conv_in.weight"])
    folder, _ = spoiled("last", "callbacks.average.decay=0.9", "evaluate=null")
    assert all(map(torch.equal, load_controlnet(folder).parameters(), list_average(read_checkpoint(folder, "last"))))


def test_a_training_without_a_best_checkpoint_says_so(command, tmp_path, monkeypatch, capsys):
    """Guards ``checkpoint=best`` of a training that ends before its first validation: one line, and what it says
    exports the last.
    """
    words = command(tmp_path / "runs", "evaluate=null", "callbacks.samples=null", "trainer.max_steps=1")
    assert type_in(monkeypatch, [*words, "checkpoint=best"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    (folder,) = (tmp_path / "runs" / "color").iterdir()
    assert "no validation was due until step 1" in line and line.endswith(
        f"resume={folder} checkpoint=last exports the last"
    )
    assert not (folder / "export").exists() and not (folder / "metrics.json").exists()
    assert type_in(monkeypatch, [*words, f"resume={folder}", "checkpoint=last"]) == 0
    assert "exported checkpoint: last, step 1" in capsys.readouterr().out.splitlines()
    assert load_controlnet(folder) and (folder / "metrics.json").exists()


def test_the_clock_ends_a_run(command, tmp_path, monkeypatch, capsys):
    """Guards ``trainer.max_time`` without a number of steps: the rate decays to the end, the last step is validated."""
    monkeypatch.setenv("HARMONY_RUN_DIR", "")
    words = ["trainer.max_steps=-1", "trainer.max_time=00:00:00:03", "trainer.val_check_interval=1000", "evaluate=null"]
    main(compose("fit", command(tmp_path / "runs", *words)))
    (folder,) = (tmp_path / "runs" / "color").iterdir()
    last = max(losses(folder))
    assert float(json.loads((folder / "metrics.json").read_text())["validation/loss"]) > 0
    (schedule,) = read_checkpoint(folder, "last")["lr_schedulers"]
    assert schedule["last_epoch"] == last and max(schedule["_last_lr"]) < 0.1 * max(schedule["base_lrs"])
    assert re.search(r"step 2: loss .* a second, \d s left", capsys.readouterr().out)


@pytest.mark.parametrize("elapsed, validated, due, missing", [
    (10.1, 7, False, False), (10.1, 5, False, True), (10.1, None, False, True),
    (3.0, 5, True, False), (3.0, None, True, True), (3.0, None, False, False),
])  # fmt: skip
def test_the_end_is_validated_once_by_all(tmp_path, elapsed, validated, due, missing):
    """Guards the end by the clock, a resume behind it, and processes whose clocks differ: the first one decides."""
    (tmp_path / "metrics.csv").write_text(f"step,name,value\n{validated},validation/loss,1\n" if validated else "")
    timer, decisions = Timer({"seconds": 10}), []
    timer.time_elapsed = lambda stage="train": elapsed
    trainer = SimpleNamespace(
        limit_val_batches=1.0, fast_dev_run=False, callbacks=[timer], global_step=7, accumulate_grad_batches=1,
        val_check_batch=7 if due else 10, callback_metrics={"x": 1} if validated else {},
        strategy=SimpleNamespace(broadcast=lambda value: decisions.append(value) or value),
    )  # fmt: skip
    assert is_validation_missing(trainer, tmp_path) == missing and decisions == [missing]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_lose_one_and_go_on(command, tmp_path, environment):
    """Guards training over machines: two launchers that meet on loopback train together. One is killed with all its
    processes, the other ends instead of waiting for ever; the same commands then end with the numbers of two processes
    of one machine that nothing happened to.
    """
    steps = 120  # so that the kill comes long before the end
    runs, environment = tmp_path / "runs", environment | {"GLOO_SOCKET_IFNAME": "lo"}
    alike = ["data.batch_size=1", f"trainer.max_steps={steps}"]
    nodes = ["trainer.num_nodes=2", "trainer.strategy=ddp", *alike]
    unbroken = start(command(tmp_path / "unbroken", "trainer=ddp2", *alike), environment, tmp_path)
    assert unbroken.wait(300) == 0

    def launch() -> list[subprocess.Popen]:
        meet, options = (
            f"127.0.0.1:{free_port()}",
            {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        began = []
        for rank in range(2):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            launcher += [
                "--node-rank",
                str(rank),
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                meet,
                "--max-restarts",
                "0",
            ]
            words = [*launcher, "-m", "harmony.fit", *command(runs, *nodes)]
            began.append(subprocess.Popen(words, env=environment, cwd=tmp_path, start_new_session=True, **options))
        return began

    first, second = launch()
    seen = []
    for line in first.stdout:
        seen.append(line)
        if f"step 3/{steps}" in line:
            for process in (*psutil.Process(second.pid).children(recursive=True), second):
                process.kill()  # the launcher's group need not hold its workers
            break
    else:
        pytest.fail("".join(seen[-40:]))
    rest = first.communicate(timeout=300)[0]
    assert first.returncode != 0, rest[-2000:]
    (folder,) = (runs / "color").iterdir()
    assert not (folder / "metrics.json").exists()
    pair = launch()
    said = [node.communicate(timeout=300)[0] for node in pair]
    assert [node.returncode for node in pair] == [0, 0], "\n".join(text[-2000:] for text in said)
    assert list((runs / "color").iterdir()) == [folder] and f"step 1/{steps}" not in said[0] + said[1]
    same_run(folder, next((tmp_path / "unbroken" / "color").iterdir()), steps)


def type_in(monkeypatch, overrides: list[str]) -> int:
    """The command as typed, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["harmony.fit", *overrides])
    try:
        main()
    except SystemExit as left:
        return left.code
    return 0


def test_a_refused_training_leaves_no_folder(tmp_path, monkeypatch, capsys, random_backbone):
    """Guards ``runs/``: what is refused late, when the run folder is there, leaves nothing, not even W&B's files."""
    (tmp_path / "pictures").mkdir()
    words = [f"model.path={random_backbone}", f"paths.runs={tmp_path / 'runs'}", "trainer.accelerator=cpu"]
    words += ["experiment=textual_inversion", "token=<mug>", "init=car", f"dataset.dir={tmp_path / 'pictures'}"]
    assert type_in(monkeypatch, words) == 2
    assert "no pictures" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_nan_stops_with_one_line(command, tmp_path, monkeypatch, capsys):
    """Guards the NaN guard from the outside: exit code 2, one line, the checkpoint it names loads and is finite."""
    more = [
        "module.lr=1e30",
        "module.zero_init_lr=1e30",
        "evaluate=null",
        "callbacks.samples=null",
        "trainer.max_steps=40",
    ]
    assert type_in(monkeypatch, command(tmp_path / "runs", *more)) == 2
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if line.startswith("harmony: error:"))
    assert "became NaN or infinite" in line and "lower module.lr" in line and "Traceback" not in err
    (folder,) = (tmp_path / "runs" / "color").iterdir()
    assert str(folder / "checkpoints" / "last.ckpt") in line
    assert all(torch.isfinite(v).all() for v in weights(folder).values())


@pytest.mark.parametrize(
    ("words", "gpu", "precision", "frozen"),
    [
        (["model=sd2"], True, "bf16-mixed", "bfloat16"),
        (["model=sd2"], False, "32-true", "float32"),
        (["model=sd2", "trainer.accelerator=cpu"], True, "32-true", "float32"),
        (["model=sd2", "trainer.precision=32-true"], True, "32-true", "float32"),
        (["model=sd2", "trainer=ddp8"], True, "bf16-mixed", "bfloat16"),
        (["model=sd2", "model.dtype=float32"], True, "32-true", "float32"),
        (["model=tiny"], True, "32-true", "float32"),
        (["model.dtype=bfloat16"], False, "bf16-mixed", "bfloat16"),
        (["model=sd2", "experiment=joint"], True, "bf16-mixed", "bfloat16"),
        (["model=sd1", "experiment=paint_by_example"], True, "bf16-mixed", "bfloat16"),
        (["model=sd2", "experiment=judge"], True, "32-true", None),
        (["model.dtype=bfloat16", "experiment=backbone_inpaint"], True, "32-true", None),
    ],
)
def test_precision_is_one_decision(words, gpu, precision, frozen, monkeypatch):
    """Guards null and auto: at full size a GPU trains in bf16 with bfloat16 networks, all else as it is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = compose("fit", ["experiment=color", "name=a", *words])
    facts = {"precision": precision} | ({"frozen_networks": frozen} if frozen else {})
    assert harmony.fit.settle_precision(cfg) == facts and cfg.trainer.precision == precision
    if frozen:
        assert {cfg.model.dtype, cfg.module.backbone.dtype, cfg.data.backbone.dtype} == {frozen}


def test_a_run_in_bfloat16_says_so(command, tmp_path, capsys):
    """Guards the line and the provenance of a run that was told of its networks alone."""
    more = ["model.dtype=bfloat16", "evaluate=null", "callbacks.samples=null", "trainer.max_steps=2"]
    main(compose("fit", command(tmp_path / "runs", *more)))
    assert "precision bf16-mixed, frozen networks bfloat16" in capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "runs" / "color").iterdir()
    facts = json.loads((folder / "provenance.json").read_text())
    assert (facts["precision"], facts["frozen_networks"]) == ("bf16-mixed", "bfloat16")
    assert all(v.dtype == torch.float32 for v in weights(folder).values() if v.is_floating_point())


def test_a_run_on_another_backbone_does_not_go_on(command, tmp_path, monkeypatch, capsys, random_backbone):
    """Guards resumption: the backbone under the same name has changed since, so the checkpoint does not fit any
    more.
    """
    backbone = tmp_path / "backbone"
    shutil.copytree(random_backbone, backbone)
    more = [f"model.path={backbone}", "evaluate=null", "callbacks.samples=null", "trainer.max_steps=1"]
    assert type_in(monkeypatch, command(tmp_path / "runs", *more)) == 0
    (folder,) = (tmp_path / "runs" / "color").iterdir()
    (folder / "metrics.json").unlink()  # as if it had been stopped
    config = json.loads((backbone / "unet" / "config.json").read_text())
    (backbone / "unet" / "config.json").write_text(json.dumps(config | {"_note": "another"}))
    assert type_in(monkeypatch, command(tmp_path / "runs", *more)) == 2
    assert "trained on another state of backbone" in capsys.readouterr().err
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert type_in(monkeypatch, command(tmp_path / "runs", *more)) == 2
    assert "last.ckpt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["module.branch=colour", "data.branch=color"], "module.branch=colour: choose one of color"),
        (["checkpoint=best", "callbacks.best=null"], "checkpoint=best needs callbacks.best"),
        (["checkpoint=best", "trainer.limit_val_batches=0"], "checkpoint=best needs callbacks.best and trainer.limit"),
        (["data.branch=structure"], "data.branch=['structure'] must have color"),
        (["experiment=textual_inversion", "token=<|endoftext|>", "init=car"], "knows this word already"),
        (["experiment=textual_inversion", "token=<b>", "init=zzzzqq"], "give a plain word that is a single one"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_preparation(words, said, tmp_path, monkeypatch, capsys):
    """Guards hours of preparation: the task is built first."""
    monkeypatch.setattr(harmony.fit, "ensure", lambda *given: pytest.fail("prepared"))
    folders = [f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}"]
    first = ["dataset.dir=."] if words[0].startswith("experiment") else ["experiment=color"]
    assert type_in(monkeypatch, [*first, "model.path=tiny", "logger=none", *folders, *words]) == 2
    assert said in capsys.readouterr().err


def test_ensure_prepares_once(work, tmp_path, monkeypatch):
    """Guards the hand-over: the same recipe is not prepared again, another one is, in a process of its own."""
    recipe = json.loads((work / "studio" / "recipe.json").read_text())
    asked = []

    class Elsewhere:
        """Stands for the other process."""

        def __init__(self, workers, mp_context, **more):
            assert mp_context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, recipe, backbone, work):
            asked.append((function, recipe["name"]))
            folder = Path(work) / recipe["name"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.jsonl").write_text("{}\n")
            (folder / "recipe.json").write_text(json.dumps(recipe))
            write_stamps(folder, [])
            return type("Future", (), {"result": lambda self: folder / "manifest.jsonl"})()

    monkeypatch.setattr(preparation, "ProcessPoolExecutor", Elsewhere)
    assert preparation.ensure(recipe, "tiny", str(work)) == work / "studio" / "manifest.jsonl" and not asked
    other = recipe | {"select": recipe["select"] | {"max_samples": 3}}
    for _ in range(2):
        assert preparation.ensure(other, "tiny", str(tmp_path)).exists()
    assert asked == [(preparation.prepare, "studio")]
    preparation.ensure(recipe, "tiny", str(tmp_path))
    assert len(asked) == 2, "a changed recipe is prepared anew"


def test_of_several_that_ask_at_once_one_prepares(work, tmp_path, monkeypatch):
    """Guards torchrun on a fresh machine: the ranks begin together, and each asks for the dataset."""
    recipe, asked = json.loads((work / "studio" / "recipe.json").read_text()), []

    def slow(recipe, backbone, work):
        asked.append(recipe["name"])
        folder = Path(work) / recipe["name"]
        time.sleep(0.5)
        (folder / "manifest.jsonl").write_text("{}\n")
        (folder / "recipe.json").write_text(json.dumps(recipe))
        write_stamps(folder, [])
        return folder / "manifest.jsonl"

    monkeypatch.setattr(preparation, "ProcessPoolExecutor", lambda workers, **more: ThreadPoolExecutor(workers))
    monkeypatch.setattr(preparation, "prepare", slow)
    with ThreadPoolExecutor(3) as ranks:
        found = [ranks.submit(preparation.ensure, recipe, "tiny", str(tmp_path)) for _ in range(3)]
    assert asked == ["studio"] and {f.result() for f in found} == {tmp_path / "studio" / "manifest.jsonl"}
