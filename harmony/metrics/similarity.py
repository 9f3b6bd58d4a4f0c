"""Similarity in CLIP's embedding space: of outputs with instances (CLIP-I) and with captions (CLIP-T)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from harmony.pixels.masks import bounding_box


class Clip(Protocol):
    """A CLIP model: its ``name``, and its embeddings N x P of pictures (uint8 H x W x 3) and of texts.

    ``models/clip.py`` implements it.
    """

    name: str

    def images(self, images: list[np.ndarray]) -> torch.Tensor: ...

    def texts(self, texts: list[str]) -> torch.Tensor: ...


def embeddings(images: Sequence[np.ndarray], clip: Clip, batch: int = 32) -> torch.Tensor:
    """Embeddings N x P of images, of unit length and on the CPU."""
    parts = [clip.images(list(images[i : i + batch])).float().cpu() for i in range(0, len(images), batch)]
    return F.normalize(torch.cat(parts), dim=1)


def crop_to_box(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut the bounding box of ``mask`` out of an image."""
    x0, y0, x1, y1 = bounding_box(mask)
    return image[y0:y1, x0:x1]


def cosines(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Cosines in [-1, 1] of paired features N x P: CLIP-I of pictures, CLIP-T of pictures and captions.

    Not multiplied by 100. ValueError for shapes that differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"features are compared in pairs, but have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return F.cosine_similarity(a.double(), b.double(), dim=-1).tolist()
