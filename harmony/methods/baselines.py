"""Baselines without a network: copy and paste, Reinhard's color transfer, Poisson blending."""

from collections.abc import Sequence

import numpy as np

from harmony.methods.method import Composite, Method, Seed, fingerprint
from harmony.models.backbone import Backbone
from harmony.pixels.composites import copy_paste, match_histogram, poisson, reinhard


class Baseline(Method):
    """A method that composes background, instance and mask at their own size, without a network."""

    resolution = None

    def __init__(self, backbone: Backbone | None = None):
        pass  # every method is built on a backbone; this one does not need it

    @property
    def fingerprint(self) -> str:
        return fingerprint(type(self).__name__)

    def describe(self) -> str:
        return type(self).__doc__.splitlines()[0]

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        return [self.compose(c.background, c.instance, c.mask) for c in composites]

    @staticmethod
    def compose(background: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The composite, uint8 R x R x 3."""
        raise NotImplementedError


class CopyPaste(Baseline):
    """Copy and paste: the instance as it is."""

    compose = staticmethod(copy_paste)


class Reinhard(Baseline):
    """Reinhard's color transfer (Reinhard 2001): the instance with mean and deviation of the background."""

    @staticmethod
    def compose(background: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return copy_paste(background, reinhard(instance, mask, background), mask)


class Histogram(Baseline):
    """Histogram matching: the instance with the distribution of the background's colors, channel by channel."""

    @staticmethod
    def compose(background: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return match_histogram(instance, mask, background)


class Poisson(Baseline):
    """Poisson blending (Perez 2003): the instance's gradients between the background's rim."""

    @property
    def fingerprint(self) -> str:
        return fingerprint("Poisson", "exact")  # stored outputs of an approximate solver are not taken for these

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        # a naive composite shows the background around the instance, which says nothing about the step at its rim
        return [poisson(c.background, c.instance, c.mask, c.naive_composite is None) for c in composites]
