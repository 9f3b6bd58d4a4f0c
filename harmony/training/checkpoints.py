"""Reads the checkpoints of a training as plain data: their weights, or the average of these, and what they are of.

A run keeps two: ``last``, to go on from, and ``best``, with the best value of a validation figure so far. Facts of a
checkpoint are ``kind``, ``step`` and, where it was validated, ``figure`` and ``value``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from harmony.core.errors import UserError
from harmony.models.weights import check_tensors
from harmony.training.run_folder import RunFolder, select

KINDS = ("last", "best")
Facts = dict[str, str | int | float]


def checkpoint_name(kind: str) -> str:
    """Where a run folder has its checkpoint of a kind."""
    return f"checkpoints/{kind}.ckpt"


def list_trained(module: nn.Module) -> list[nn.Parameter]:
    """The trained weights of a module, in the order in which their average is kept."""
    return [p for p in module.parameters() if p.requires_grad]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain data. UserError for a damaged one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = [*content["state_dict"].values(), *read_average(content, path)]
        if not all(isinstance(tensor, Tensor) for tensor in tensors) or "global_step" not in content:
            raise TypeError
    except UserError:
        raise
    except Exception as error:  # pickle, zip and torch each have their own
        kind = type(error).__name__
        raise UserError(
            f"cannot read {path} ({kind}): restore it from a copy, or remove it and continue the run"
        ) from None
    return content


def read_average(content: Mapping[str, Any], path: Path) -> list[Tensor]:
    """The moving average of the trained weights; empty where the run keeps none."""
    return select(content, "callbacks.WeightAverage.shadow_params", list, str(path)) or []


def read_facts(kind: str, content: Mapping[str, Any], path: Path) -> Facts:
    """What the checkpoint of a kind is of. The last one is written before its validation, and so has no figure."""
    facts = {"kind": kind, "step": select(content, "global_step", int, str(path))}
    state = select(content, "callbacks.BestCheckpoint", dict, str(path)) if kind == "best" else None
    figure, value = (
        select(state, name, of, str(path)) for name, of in (("monitor", str), ("best_model_score", Tensor))
    )
    return facts if figure is None or value is None else facts | {"figure": figure, "value": value.mean().item()}


def describe(facts: Mapping[str, Any]) -> str:
    """What a checkpoint is of, for people: ``best, step 250, validation/loss 0.01234``."""
    figure = f", {facts['figure']} {facts['value']:.4g}" if facts.get("figure") else ""
    return f"{facts['kind']}, step {facts['step']}{figure}"


def restore(module: nn.Module, content: Mapping[str, Any], path: Path, what: str) -> None:
    """Give a module the weights of a checkpoint, the average of the trained ones where there is one.

    UserError for weights that are not finite or not those of ``module``, which depends on ``what``.
    """
    weights, average, trained = content["state_dict"], read_average(content, path), list_trained(module)
    check_tensors(weights | {f"{n} of the average": tensor for n, tensor in enumerate(average)}, str(path))
    try:
        module.load_state_dict(weights)
        if average and [tensor.shape for tensor in average] != [p.shape for p in trained]:
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"{path} does not fit {what}: restore that of the training, it has changed since") from None
    with torch.no_grad():
        for parameter, tensor in zip(trained, average, strict=False):
            parameter.copy_(tensor)


def restore_best(folder: Path, task: LightningModule) -> Facts:
    """Give the task of a training that is over the weights of its best checkpoint; the facts of that checkpoint.

    UserError where the training was too short to have one.
    """
    path = folder / checkpoint_name("best")
    if not path.exists():
        raise UserError(
            f"checkpoint=best: no validation was due until step {task.trainer.global_step} "
            f"(trainer.val_check_interval); the same command with resume={folder} checkpoint=last exports the last"
        )
    content = read_checkpoint(path)
    task.on_load_checkpoint(content)
    restore(task, content, path, "the networks of this run")
    return read_facts("best", content, path)


def find_checkpoint(run: RunFolder, kind: str) -> Path:
    """The file of a run's checkpoint. UserError where it has none."""
    path = run.find_file(checkpoint_name(kind))
    if path is None and kind == "best":
        raise UserError(
            f"{run.path} has no best checkpoint: it has not logged the figure of callbacks.best.monitor, or is older "
            "than this option; give checkpoint=last"
        )
    if path is None:
        raise UserError(f"{run.path} has no checkpoint: continue it with the command of its training")
    return path
