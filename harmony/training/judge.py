"""F4. Training the judge of composites: real photographs against the same with their object under another light."""

from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from harmony.models.judge import NATURAL, Judge, judge_net, save_judge, seen
from harmony.training.schedule import constant, linear_decay, total_steps

BINS = 10  # of the calibration error


def calibrated(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that makes the likelihood of ``labels`` largest (Guo et al., 2017); logits N x 2."""
    log = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.LBFGS([log], lr=0.1, max_iter=100)

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(logits.detach() / log.exp(), labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(log.exp())


def calibration_error(natural: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error in [0, 1]: by how much the frequency of ``labels`` misses the probabilities, N."""
    bins = (natural * BINS).long().clamp(max=BINS - 1)
    missed = [
        (labels[bins == b].float().mean() - natural[bins == b].mean()).abs() * (bins == b).sum() for b in bins.unique()
    ]
    return float(torch.stack(missed).sum() / len(labels))


def judged(natural: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """``auc``, ``accuracy`` and ``ece`` of probabilities N against labels N (1 = as it was taken)."""
    return {
        "auc": float(roc_auc_score(labels, natural)),
        "accuracy": float(((natural > 0.5).long() == labels).float().mean()),
        "ece": calibration_error(natural, labels),
    }


class JudgeTask(lightning.LightningModule):
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
        self.temperature = 1.0

    def configure_optimizers(self):
        h = self.hparams
        optimiser = torch.optim.AdamW(self.parameters(), lr=h.lr, weight_decay=h.weight_decay)
        factor = linear_decay(total_steps(self.trainer), h.warmup) if h.decay else constant(h.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def logits(self, batch: dict) -> torch.Tensor:
        return self.net(seen(batch["image"], batch["mask"]))

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = F.cross_entropy(self.logits(batch), batch["label"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def on_validation_epoch_start(self):
        self.seen: dict[int, list] = {}

    def validation_step(self, batch: dict, index: int, dataloader_idx: int = 0) -> None:
        self.seen.setdefault(dataloader_idx, []).append((self.logits(batch).float().cpu(), batch["label"].cpu()))

    def on_validation_epoch_end(self):
        """Calibrate on the validation split, measure on both."""
        splits = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in self.seen.values()]
        with torch.enable_grad():
            self.temperature = calibrated(*splits[0])
        figures = {}
        for split, (logits, labels) in zip(("validation", "test"), splits, strict=False):
            natural = (logits / self.temperature).softmax(1)[:, NATURAL]
            figures |= {f"{split}/{name}": value for name, value in judged(natural, labels).items()}
        self.log_dict(figures)
        said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"step {self.global_step}: {said}, temperature {self.temperature:.2f}", flush=True)

    def export(self, folder: Path, hints: dict[str, dict]) -> None:
        """Write the judge, which ``harmonize`` and ``evaluate`` read."""
        h = self.hparams
        judge = Judge(self.net.eval(), self.trainer.datamodule.hparams.side, self.temperature)
        save_judge(judge, folder, arch=h.arch, options=h.options or {})
