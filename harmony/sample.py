"""F0. One manifest row and one training batch: the two things every floor agrees on.

Legend of shapes
    B  batch            H, W  pixels             h, w  latent cells (H / factor, W / factor)
    C  latent channels  T     tokens of a prompt  D    width of the text states

Value ranges
    image  uint8 H x W x 3 RGB on disk and in NumPy, float B x 3 x H x W in [-1, 1] ("model range") in front of a
    network hint   float B x 3 x H x W in [0, 1] ("hint range"), 0 outside the instance
    mask   {0, 1}; 1 = hole, 0 = keep. M is the instance, M_e (the hole) contains M
"""

from dataclasses import dataclass, field
from typing import TypedDict

import torch

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One instance in one photograph: a line of ``manifest.jsonl``. Paths are relative to the manifest's folder.

    ``box`` is (x0, y0, x1, y1) in pixels of the stored image, x1 and y1 exclusive. ``sha256`` is that of the image
    file. ``extras`` holds what only some datasets have: ``plate``, ``relit``, ``shadow`` (paths), ``relit_caption``,
    ``source`` (``studio``), ``caption_source`` (``given`` or the name of the captioner).
    """

    id: str
    image: str
    mask: str
    box: tuple[float, float, float, float]
    label: str
    caption: str
    split: str
    width: int
    height: int
    sha256: str
    extras: dict[str, str] = field(default_factory=dict)


class Batch(TypedDict):
    """What a training step sees; everything comes from the latent cache."""

    moments: torch.Tensor  # B x 2C x h x w, mean and log-variance of q(z | x)
    masked_moments: torch.Tensor  # B x 2C x h x w, the same of the masked image x_m
    hole: torch.Tensor  # B x 1 x h x w in {0, 1}, M_e resized by nearest
    weight: torch.Tensor  # B x 1 x h x w in [0, 1], share of each latent cell that the instance M covers
    hint_color: torch.Tensor  # B x 3 x H x W in [0, 1]; hint_structure, hint_raw: whatever the training sees
    tokens: torch.Tensor  # B x T, int64 ids of the caption
    index: torch.Tensor  # B, int64 position in the dataset: seeds the noise
