"""What a task offers beside its training steps, so that ``fit`` and the callbacks may ask any of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from harmony.core.errors import UserError
from harmony.methods.method import Method
from harmony.sampling.guidance import Settings


class Task(lightning.LightningModule):
    """A LightningModule that checks its data, is measured as a method, and exports what it trained.

    ``fixed_baseline``: the baseline does not change with training. Tasks without baseline and result measure themselves
    while they train.
    """

    fixed_baseline: bool = True

    def check(self, data: lightning.LightningDataModule) -> None:
        """UserError unless ``data`` gives what the task needs; called before anything is prepared."""

    def baseline(self, settings: Settings) -> Method:
        """What the result is measured against."""
        raise NotImplementedError

    def result(self, settings: Settings) -> Method:
        """What has been trained, as a method."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write what was trained into ``folder``; parts of a backbone have written themselves already."""

    @property
    def home(self) -> torch.device:
        """Where the networks that it works with lie."""
        return self.device


def refuse_other_weights(checkpoint: Mapping[str, Any], frozen: Mapping[str, str], what: str) -> None:
    """UserError where ``checkpoint`` goes with other frozen weights than ``frozen``, sha256 of each part, says."""
    known = checkpoint.get("backbone") or checkpoint["kit"]  # as version 0.1 called it
    if any(frozen.get(part) != state for part, state in known.items()):
        raise UserError(
            f"this run was trained on another state of {what}: put it back, or begin anew with resume=false"
        )
