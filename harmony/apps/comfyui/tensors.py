"""Tensors of ComfyUI and pictures of harmony: IMAGE is float B x H x W x C in [0, 1], MASK float B x H x W."""

from collections.abc import Sequence

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.pixels.masks import OBJECT


def take_colors(image: torch.Tensor) -> torch.Tensor:
    """The colors of an IMAGE, float B x H x W x 3: of a gray one three times the same, of one with alpha without it."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise UserError(f"an image is B x H x W x 3 (or gray, or with alpha) but this is {describe_shape(image)}")
    if not image.numel():
        raise UserError(f"the image is {describe_shape(image)}, an empty batch: give at least one picture")
    if image.isnan().any():
        raise UserError("the image holds NaN: load the model in float32 or bfloat16, or use another VAE")
    return image[..., :3].expand(-1, -1, -1, 3)


def read_pictures(image: torch.Tensor) -> list[np.ndarray]:
    """The pictures of an IMAGE, uint8 H x W x 3 each."""
    values = (take_colors(image).float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(values.cpu().numpy())


def read_masks(mask: torch.Tensor, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks of a MASK, bool H x W each and one for each picture, which may share one. UserError for others."""
    if not mask.numel():
        raise UserError(f"the mask is {describe_shape(mask)}, an empty batch: give at least one")
    masks = list((mask.reshape(-1, *mask.shape[-2:]).float() * 255).round().gt(OBJECT).cpu().numpy())
    height, width = pictures[0].shape[:2]
    if masks[0].shape != (height, width):
        raise UserError(
            f"the mask is {masks[0].shape[1]} x {masks[0].shape[0]} but the image is {width} x {height}: connect one "
            "of its size (Load Image gives one of 64 x 64 for a picture without transparency: paint one there)"
        )
    empty = [i for i, each in enumerate(masks) if not each.any()]
    if empty:
        raise UserError(f"mask {empty[0] + 1} of {len(masks)} is empty: it must be white where the object is")
    return match_count(masks, len(pictures), "masks")


def match_count(items: Sequence, count: int, what: str) -> list:
    """As many items as there are images: all of them, or one again and again. UserError for another number."""
    if len(items) not in (1, count):
        raise UserError(f"{len(items)} {what} for {count} images: connect one, or one for each image")
    return list(items) * (count if len(items) == 1 else 1)


def to_image(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures uint8 H x W x 3 as IMAGE, with the values that Load Image gives."""
    return torch.from_numpy(np.stack(pictures)).float() / 255


def to_mask(masks: Sequence[np.ndarray]) -> torch.Tensor:
    """Masks bool H x W as MASK, 1 inside."""
    return torch.from_numpy(np.stack(masks)).float()


def paste(image: torch.Tensor, pictures: Sequence[np.ndarray], holes: Sequence[np.ndarray]) -> torch.Tensor:
    """An IMAGE with the pictures in the holes; outside them, and in its alpha, each value stays the very same."""
    inside = torch.from_numpy(np.stack(holes)).to(image.device)[..., None]
    colors = torch.where(inside, to_image(pictures).to(image), take_colors(image))
    return torch.cat([colors, image[..., 3:].expand(len(colors), -1, -1, -1)], dim=-1)


def describe_shape(tensor: torch.Tensor) -> str:
    """The shape of a tensor in words."""
    return " x ".join(map(str, tensor.shape))
