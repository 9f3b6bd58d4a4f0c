"""The interface of all tasks beside their training steps, for ``fit`` and the callbacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from harmony.core.errors import UserError
from harmony.methods.method import Method
from harmony.sampling.guidance import Settings


class Task(lightning.LightningModule):
    """A LightningModule that checks its data, can be measured as a method, and exports its result.

    ``fixed_baseline``: training does not change the baseline. Tasks without baseline and result measure themselves in
    their validation.
    """

    fixed_baseline: bool = True

    def check(self, data: lightning.LightningDataModule) -> None:
        """UserError unless ``data`` has what the task needs; called before any data is prepared."""

    def baseline(self, settings: Settings) -> Method:
        """The method that the result is compared with."""
        raise NotImplementedError

    def result(self, settings: Settings) -> Method:
        """The method with the trained networks."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write the trained networks into ``folder``; those of backbone parts go into the backbone folder instead."""
        raise NotImplementedError

    def grid_file(self, name: str, suffix: str = ".png") -> Path:
        """The file of a picture of the present step, in ``grids`` of the run folder."""
        folder = Path(self.trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}_{self.global_step:06d}{suffix}"

    @property
    def home(self) -> torch.device:
        """The device of the networks that the task works with."""
        return self.device


def refuse_other_weights(checkpoint: Mapping[str, Any], hashes: Mapping[str, str], what: str) -> None:
    """UserError unless ``checkpoint`` was trained on frozen parts with these ``hashes`` (part -> sha256)."""
    stored_hashes = checkpoint.get("backbone") or checkpoint["kit"]  # the key of version 0.1
    if any(hashes.get(part) != stored_hash for part, stored_hash in stored_hashes.items()):
        raise UserError(
            f"this run was trained on another state of {what}: put it back, or start again with resume=false"
        )
