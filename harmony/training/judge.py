"""Training the judge of composites: real photographs against the same with their object under another light."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from harmony.metrics.classification import classification_metrics
from harmony.models.judge import NATURAL_CLASS, Judge, judge_net, save_judge, stack_inputs
from harmony.pixels.images import from_model, grid, write_image
from harmony.training.schedule import adamw
from harmony.training.task import Task

SHOWN = 8  # pairs on the grid


def calibrated(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that makes the likelihood of ``labels`` largest (Guo 2017); logits N x 2."""
    found = minimize_scalar(lambda log: float(F.cross_entropy(logits / math.exp(log), labels)), bounds=(-4, 4))
    return math.exp(found.x)


class JudgeTask(Task):
    """Tell real photographs from those whose object has another light; cross-entropy.

    ``arch``, ``options``: timm's network. AdamW with ``lr``, ``warmup`` and, with ``decay``, linear to 0 at the end.
    Each validation calibrates anew on the validation split and measures on the test split.
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

    def configure_optimizers(self):
        h = self.hparams
        return adamw(self.parameters(), self.trainer, h.lr, h.weight_decay, h.warmup, h.decay)

    def logits(self, batch: dict) -> torch.Tensor:
        """2B x 2 of B pairs."""
        return self.net(stack_inputs(batch["image"].flatten(0, 1), batch["mask"].flatten(0, 1)))

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = F.cross_entropy(self.logits(batch), batch["label"].flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def on_validation_epoch_start(self):
        self.seen: dict[int, list] = {}

    def validation_step(self, batch: dict, index: int, dataloader_idx: int = 0) -> None:
        found = self.logits(batch).float().cpu(), batch["label"].flatten().cpu()
        self.seen.setdefault(dataloader_idx, []).append(found)

    def on_validation_epoch_end(self):
        """Calibrate on the validation split, measure on both, and draw what the judge thinks of a few pairs."""
        splits = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in self.seen.values()]
        temperature, figures = calibrated(*splits[0]), {}
        for split, (logits, labels) in zip(("validation", "test"), splits, strict=False):
            natural = (logits / temperature).softmax(1)[:, NATURAL_CLASS]
            figures |= {
                f"{split}/{name}": value
                for name, value in classification_metrics(natural.double().numpy(), labels.double().numpy()).items()
            }
        self.log_dict(figures)
        if self.trainer.is_global_zero:
            said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"step {self.global_step}: {said}, temperature {temperature:.2f}", flush=True)
            self.draw(natural)

    def draw(self, natural: torch.Tensor) -> None:
        """Pairs of the test split, the relit one above, each with its probability of being natural."""
        composites = self.trainer.datamodule.sets["test"]
        chosen = range(0, len(composites), max(1, len(composites) // SHOWN))[:SHOWN]
        pairs = [composites[i, i]["image"] for i in chosen]
        titles = [f"{natural[2 * i]:.2f} / {natural[2 * i + 1]:.2f}" for i in chosen]
        folder = Path(self.trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [[from_model(pair[label]) for pair in pairs] for label in (0, 1)]
        write_image(folder / f"samples_{self.global_step:06d}.png", grid(rows, titles))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the judge, calibrated on the validation split, which ``harmonize`` and ``evaluate`` read."""
        h, data = self.hparams, self.trainer.datamodule
        outputs = [(self.logits(batch), batch["label"].flatten()) for batch in data.val_dataloader()[0]]
        temperature = calibrated(*map(torch.cat, zip(*outputs, strict=True)))
        save_judge(Judge(self.net, data.hparams.side, temperature), folder, arch=h.arch, options=h.options or {})
