"""Distances between two sets of images: Frechet distance (FID) and kernel distance (KID) of their features.

A feature extractor is a callable on float N x 3 x H x W in [0, 255] that returns N x D, with two attributes: ``size``,
the side of the images that it expects, and ``protocol``, the name that is reported beside every distance. It also works
as clean-fid's ``custom_feat_extractor``.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.resize import make_resizer

from harmony.pixels.images import to_clip

# --- statistics and distances


class Gaussian(Protocol):
    """Mean D and covariance D x D of features."""

    mean: torch.Tensor
    cov: torch.Tensor


class Statistics:
    """Running sums n, sum x and sum x x^T of features in float64, the same for every batch size."""

    def __init__(self, dim: int, device: str | torch.device = "cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> "Statistics":
        """Add N x D features."""
        x = features.detach().to(self.sum)
        self.n += len(x)
        self.sum += x.sum(dim=0)
        self.outer += x.T @ x
        return self

    @property
    def mean(self) -> torch.Tensor:
        """Mean, D."""
        return self.sum / self.n

    @property
    def cov(self) -> torch.Tensor:
        """Unbiased covariance, D x D; needs at least two samples (ValueError)."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {int(self.n)}")
        return (self.outer - torch.outer(self.sum, self.mean)) / (self.n - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), never negative (Heusel 2017, eq. 6).

    The trace of the root comes from the eigenvalues of the symmetric product C_a^(1/2) C_b C_a^(1/2), which are real
    and not negative however singular the covariances are.
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.cov.to(root) @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean.to(a.mean)).square().sum()
    return float((shift + a.cov.trace() + b.cov.trace() - 2 * trace_root).clamp(min=0))


def kid(x: torch.Tensor, y: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """Kernel distance of features N x D and M x D: unbiased MMD^2 with k(u, v) = (u.v / D + 1)^3.

    Binkowski 2018. The mean over random subsets of ``subset_size`` samples, or over all samples if there are
    fewer. An unbiased estimate may be negative. Raises ValueError with fewer than two images.
    """
    m = min(len(x), len(y), subset_size)
    if m < 2:
        raise ValueError("a kernel distance needs at least 2 images on each side")
    if m == len(x) == len(y):
        subsets = 1  # every subset would be the same
    generator = torch.Generator().manual_seed(seed)
    subset_indices = (
        [torch.randperm(len(f), generator=generator)[:m].to(f.device) for f in (x, y)] for _ in range(subsets)
    )
    return float(np.mean([_mmd2(x[i].double(), y[j].double()) for i, j in subset_indices]))


def _mmd2(x: torch.Tensor, y: torch.Tensor) -> float:
    m, dim = x.shape

    def kernel(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u @ v.T / dim + 1) ** 3

    def mean_off_diagonal(k: torch.Tensor) -> torch.Tensor:
        return (k.sum() - k.trace()) / (m * (m - 1))

    return float(mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean())


# --- features


def clean_resize(images: Iterable[np.ndarray], size: int) -> torch.Tensor:
    """uint8 H x W x 3 images to float N x 3 x size x size in [0, 255] by clean-fid's resizer (bicubic, not rounded)."""
    resizer = make_resizer("PIL", False, "bicubic", (size, size))
    return torch.from_numpy(np.stack([resizer(image) for image in images])).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def extract(
    images: Iterable[np.ndarray], extractor: Callable[[torch.Tensor], torch.Tensor], size: int, batch: int = 32
) -> torch.Tensor:
    """Features N x D (float32, CPU) of uint8 images, resized to ``size``, ``batch`` images at a time."""
    return torch.cat([extractor(clean_resize(group, size)).float().cpu() for group in _batches(images, batch)])


def _batches(items: Iterable, size: int) -> Iterable[tuple]:
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


def normalize_clip(images: torch.Tensor, size: int) -> torch.Tensor:
    """Float N x 3 x H x W in [0, 255] to the input of a CLIP image tower of side ``size``."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return to_clip(images / 255)
