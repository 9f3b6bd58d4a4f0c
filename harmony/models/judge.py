"""The judge of composites: it scores how natural an object looks in its photograph.

A residual network with four input channels (RGB and mask) and two classes, as the evaluator of Chen 2023. A judge's
folder holds ``judge.safetensors`` and ``judge.json``: architecture, side in pixels, temperature.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.files import write_json, write_tensors
from harmony.core.foreign import read_json
from harmony.models.shipped import JUDGE, find_weights
from harmony.models.weights import fill_network, read_weights
from harmony.pixels.images import resize, sha256, to_model

WEIGHTS, FACTS = "judge.safetensors", "judge.json"
NATURAL_CLASS = 1  # the class of real photographs


def judge_net(arch: str, options: dict | None = None) -> torch.nn.Module:
    """timm's ``arch`` with four input channels and two classes. UserError for a name that timm does not know."""
    import timm

    if not isinstance(arch, str) or not timm.is_model(arch):
        suggestions = timm.list_models(f"*{arch}*")[:3]
        raise UserError(f"arch={arch}: timm has no such model{f', it has {suggestions}' if suggestions else ''}")
    return timm.create_model(arch, in_chans=4, num_classes=2, **(options or {}))


def stack_inputs(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """B x 3 x H x W in [-1, 1] and B x 1 x H x W in [0, 1] -> the network's input, B x 4 x H x W."""
    return torch.cat([images, masks], 1)


@dataclass(frozen=True)
class Judge:
    """A trained judge: its network, the ``side`` of its input, and the ``temperature`` that divides its logits."""

    net: torch.nn.Module
    side: int
    temperature: float = 1.0

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[float]:
        """The probability that each picture uint8 H x W x 3 with its object (bool H x W) is an unchanged photograph."""
        device = next(self.net.parameters()).device
        x = torch.stack([to_model(resize(image, self.side, self.side)) for image in images])
        m = np.stack([resize(mask.astype(np.float32), self.side, self.side) for mask in masks])
        logits = self.net(stack_inputs(x, torch.from_numpy(m)[:, None]).to(device)).float()
        return (logits / self.temperature).softmax(1)[:, NATURAL_CLASS].tolist()


def save_judge(judge: Judge, folder: Path, **facts) -> Path:
    """Write a judge in half precision; ``facts`` are its ``arch`` and ``options``."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.net.state_dict().items()}
    write_tensors(folder / WEIGHTS, state, {"format": "pt"})
    write_json(folder / FACTS, {"side": judge.side, "temperature": judge.temperature, **facts})
    return folder


def judge_hash(name: str | None) -> str:
    """sha256 of a judge's weights; the name of an evaluator without weights."""
    return str(name) if name in (None, "statistic") else sha256(find_weights(JUDGE, name) / WEIGHTS)


def load_judge(path: str | Path, device: torch.device | str = "cpu") -> Judge:
    """Load a frozen judge from a run, a folder or a shipped name. UserError for files that cannot be read."""
    folder = find_weights(JUDGE, path)
    facts = read_json(folder / FACTS)
    try:
        net, side, temperature = judge_net(facts["arch"], facts["options"]), facts["side"], facts["temperature"]
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder / FACTS} describes no judge ({error!r}): restore it from a copy") from None
    if type(side) is not int or not 8 <= side <= 4096:
        raise UserError(f"{folder / FACTS}: side={side}, give a whole number of pixels from 8 to 4096")
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        raise UserError(f"{folder / FACTS}: temperature={temperature}, give a number above 0")
    fill_network(net, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return Judge(net.requires_grad_(False).eval().to(device), side, temperature)


def statistic(image: np.ndarray, mask: np.ndarray) -> float:
    """A score in (0, 1] without a network: how close the object's Lab colors are to those of its photograph.

    It compares mean and standard deviation; a distance of 20 halves it. Colorful objects get low scores.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    (mean, spread), (mean_b, spread_b) = ((lab[m].mean(0), lab[m].std(0)) for m in (mask, ~mask))
    return float(1 / (1 + np.hypot(np.linalg.norm(mean - mean_b), np.linalg.norm(spread - spread_b)) / 20))


@dataclass(frozen=True)
class Evaluator:
    """Scores the naturalness of an image uint8 H x W x 3 with the mask of its object, bool H x W."""

    name: str
    score: Callable[[np.ndarray, np.ndarray], float]

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> float:
        return self.score(image, mask)

    @property
    def fingerprint(self) -> str:
        return judge_hash(self.name)


def load_evaluator(name: str | None, device: torch.device | str = "cpu") -> Evaluator | None:
    """Load an evaluator: ``statistic`` or a trained judge (see ``load_judge``); None for None."""
    if name is None:
        return None
    if name == "statistic":
        return Evaluator(name, statistic)
    judge = load_judge(name, device)
    return Evaluator(str(name), lambda image, mask: judge.score([image], [mask])[0])
