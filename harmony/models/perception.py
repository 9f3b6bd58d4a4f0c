"""Networks that compare two pictures as people do: LPIPS, DINO's view of an object, and of a picture's structure.

Each has a ``name``, its column in tables, and a ``protocol``, its line below them. Called with outputs and truths,
lists of uint8 H x W x 3, and the objects' masks, bool H x W, it returns a figure for each pair.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.metrics.frechet import clean_resize
from harmony.metrics.similarity import crop_to_box
from harmony.models.weights import check_tensors, load_network
from harmony.pixels.images import to_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which DINO normalizes values in 0..1
SIDE = 224  # px: what DINO and DINOv2 are shown
KEYS = ("k_proj", "key")  # names of an attention's key projection, in transformers from version 5 on and before


class PairMetric(Protocol):
    """A figure of an output against its truth."""

    name: str
    protocol: str

    def __call__(
        self, outputs: Sequence[np.ndarray], truths: Sequence[np.ndarray], masks: Sequence[np.ndarray]
    ) -> list[float]: ...


class Lpips:
    """Distance of features of a classifier (Zhang 2018), whole pictures at their own size; 0 = the same.

    ``net``: alex, vgg or squeeze. torchmetrics holds LPIPS' own weights; those of the classifier come from torchvision.
    """

    name = "lpips"

    def __init__(self, net: str, device: str | torch.device = "cpu"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.net = LearnedPerceptualImagePatchSimilarity(net).to(device).eval()
        check_tensors(self.net.state_dict(), f"metrics.lpips={net}")
        self.device, self.protocol = device, f"lpips: {net}, torchmetrics, whole pictures at their own size"

    @torch.no_grad()
    def __call__(self, outputs: Sequence[np.ndarray], truths: Sequence[np.ndarray], masks: Any = None) -> list[float]:
        pairs = ([to_model(y)[None].to(self.device) for y in pair] for pair in zip(outputs, truths, strict=True))
        return [float(self.net(*pair)) for pair in pairs]


class Dino:
    """A DINO or DINOv2 of transformers, by hub id or folder: embeddings and keys of pictures."""

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        from transformers import AutoConfig, AutoModel

        self.path, self.device = path, device
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        is_vit = config.model_type == "vit"  # DINO's weights have no pooling layer
        options = {"add_pooling_layer": False} if is_vit else {}
        self.model = load_network(AutoModel, path, **options).eval().to(device)
        projections = [module for name, module in self.model.named_modules() if name.endswith(KEYS)]
        if not projections:
            raise ValueError("a vision transformer is needed")
        self.keys: list[torch.Tensor] = []
        projections[-1].register_forward_hook(lambda module, inputs, result: self.keys.append(result))

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings N x D, and keys N x T x D of the last layer, heads side by side; N x 3 x H x W in 0..255."""
        self.keys.clear()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        pixels = ((pixels / 255 - mean) / std).to(self.device, self.model.dtype)
        state = self.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return state[:, 0].float().cpu(), self.keys.pop().float().cpu()


class DinoI(Dino):
    """Cosine of the embeddings of an object and of the true one, each cut out by the mask's box; 1 = the same."""

    name = "dino_i"

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        super().__init__(path, device)
        self.protocol = f"dino_i: class token of {path}, the mask's box resized to {SIDE} x {SIDE} (bicubic)"

    def __call__(
        self, outputs: Sequence[np.ndarray], truths: Sequence[np.ndarray], masks: Sequence[np.ndarray]
    ) -> list[float]:
        a, b = (
            [
                self.look(clean_resize([crop_to_box(image, mask)], SIDE))[0]
                for image, mask in zip(images, masks, strict=True)
            ]
            for images in (outputs, truths)
        )
        return F.cosine_similarity(torch.cat(a), torch.cat(b)).tolist()


class StructureDistance(Dino):
    """1000 times the mean squared difference of the keys' self-similarities (Tumanyan 2022; PIE-Bench, Ju 2023)."""

    name = "structure"

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        super().__init__(path, device)
        self.protocol = f"structure: x 1000, keys of {path}, whole pictures with a shorter side of {SIDE}"

    def __call__(self, outputs: Sequence[np.ndarray], truths: Sequence[np.ndarray], masks: Any = None) -> list[float]:
        pairs = zip(outputs, truths, strict=True)
        return [1000 * float(F.mse_loss(*map(self.compute_similarities, pair))) for pair in pairs]

    def compute_similarities(self, image: np.ndarray) -> torch.Tensor:
        """Cosines of all pairs of a picture's tokens, T x T."""
        height, width = (round(length * SIDE / min(image.shape[:2])) for length in image.shape[:2])
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        keys = F.normalize(self.look(pixels)[1][0], dim=-1)
        return keys @ keys.T


METRICS = {"lpips": Lpips, "dino_i": DinoI, "structure": StructureDistance}


def load_metrics(
    weights: Mapping[str, str | None], device: str | torch.device = "cpu"
) -> tuple[list[PairMetric], list[str]]:
    """The metrics whose weights are named (None: not asked for), and a line for each whose weights cannot be had.

    UserError for a name that is no metric.
    """
    metrics, notes = [], []
    for name, source in weights.items():
        if name not in METRICS:
            raise UserError(f"metrics.{name}: no such metric; choose among {', '.join(METRICS)}")
        if source is None:
            continue
        try:
            metrics.append(METRICS[name](str(source), device))
        except (OSError, ValueError, RuntimeError, UserError) as error:  # no connection, no such id, another network
            notes.append(f"{name}: left out, {source} cannot be loaded ({str(error).splitlines()[0]})")
    return metrics, notes
