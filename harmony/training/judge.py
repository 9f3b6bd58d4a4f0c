"""Trains the judge of composites: real photographs against the same ones with their object in another light."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from harmony.metrics.classification import classification_metrics
from harmony.models.judge import NATURAL_CLASS, Judge, judge_net, save_judge, stack_inputs
from harmony.pixels.images import from_model, grid, write_image
from harmony.training.schedule import make_adamw
from harmony.training.task import Task

PAIR_COUNT = 8  # pairs on the grid


def calibrate(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Find the temperature that maximizes the likelihood of ``labels`` (Guo 2017); logits N x 2."""
    result = minimize_scalar(lambda log: float(F.cross_entropy(logits / math.exp(log), labels)), bounds=(-4, 4))
    return math.exp(result.x)


class JudgeTask(Task):
    """Learns to tell real photographs from those whose object has another light, by cross-entropy.

    ``arch``, ``options``: timm's network. AdamW has ``lr``, ``warmup`` and, with ``decay``, a linear decay to 0. Each
    validation calibrates on the validation split and measures on the validation and test splits.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        options: dict | None = None,
        lr: float = 1e-3,
        warmup: int = 100,
        decay: bool = True,
        weight_decay: float = 0.05,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = judge_net(arch, options)

    def configure_optimizers(self) -> dict[str, Any]:
        h = self.hparams
        return make_adamw(self.parameters(), self.trainer, h.lr, h.weight_decay, h.warmup, h.decay)

    def compute_logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits 2B x 2 of B pairs."""
        return self.net(stack_inputs(batch["image"].flatten(0, 1), batch["mask"].flatten(0, 1)))

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = F.cross_entropy(self.compute_logits(batch), batch["label"].flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.outputs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # of each split: logits and labels

    def validation_step(self, batch: dict[str, torch.Tensor], index: int, dataloader_idx: int = 0) -> None:
        output = self.compute_logits(batch).float().cpu(), batch["label"].flatten().cpu()
        self.outputs.setdefault(dataloader_idx, []).append(output)

    def on_validation_epoch_end(self) -> None:
        """Calibrate on the validation split, measure both splits, and draw a few pairs with their probabilities."""
        splits = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in self.outputs.values()]
        temperature, figures = calibrate(*splits[0]), {}
        for split, (logits, labels) in zip(("validation", "test"), splits, strict=False):
            natural = (logits / temperature).softmax(1)[:, NATURAL_CLASS]
            figures |= {
                f"{split}/{name}": value
                for name, value in classification_metrics(natural.double().numpy(), labels.double().numpy()).items()
            }
        self.log_dict(figures)
        if self.trainer.is_global_zero:
            summary = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"step {self.global_step}: {summary}, temperature {temperature:.2f}", flush=True)
            self.draw(natural)

    def draw(self, natural: torch.Tensor) -> None:
        """Write a grid of test pairs, the one in another light above, with their probabilities of being natural."""
        composites = self.trainer.datamodule.sets["test"]
        indices = range(0, len(composites), max(1, len(composites) // PAIR_COUNT))[:PAIR_COUNT]
        pairs = [composites[i, i]["image"] for i in indices]
        titles = [f"{natural[2 * i]:.2f} / {natural[2 * i + 1]:.2f}" for i in indices]
        rows = [[from_model(pair[label]) for pair in pairs] for label in (0, 1)]
        write_image(self.grid_file("samples"), grid(rows, titles))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the judge, calibrated on the validation split, for ``harmonize`` and ``evaluate``."""
        h, data = self.hparams, self.trainer.datamodule
        outputs = [(self.compute_logits(batch), batch["label"].flatten()) for batch in data.val_dataloader()[0]]
        temperature = calibrate(*map(torch.cat, zip(*outputs, strict=True)))
        save_judge(Judge(self.net, data.hparams.side, temperature), folder, arch=h.arch, options=h.options or {})
