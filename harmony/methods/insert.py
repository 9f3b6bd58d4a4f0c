"""Harmonization: one instance into one photograph, at the kit's resolution, pasted back bit for bit.

The picture is cropped to a square around the hole, worked on at the kit's resolution, and put back; pixels outside the
hole equal the input exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.models.backbone import Kit, placed
from harmony.models.controlnet import load_controlnet, read_hint
from harmony.pixels.composites import carried, copy_paste, paste_back
from harmony.pixels.hints import hint
from harmony.pixels.images import Crop, crop_resize, from_model, paste_crop, square_around, to_hint, to_model
from harmony.pixels.masks import TEST_RADIUS, bounding_box, box_mask, dilate, scaled, to_latent
from harmony.sampling.ddim import noise_for
from harmony.sampling.guidance import Settings, inpaint

CONTEXT = 1.6  # side of the working square relative to the hole's longer side


@dataclass(frozen=True)
class Branch:
    """A trained ControlNet with its operator: ``name`` is color, structure or raw; ``weight`` its lambda."""

    name: str
    net: torch.nn.Module
    weight: float = 1.0
    parameters: dict | None = None


def load_branch(path: str, kit: Kit, weights: dict[str, float], operator: str | None = None) -> Branch:
    """The ControlNet in ``path`` with its operator from ``hint.json``; ``weights`` holds a lambda for each operator.

    ``operator`` names that of a ControlNet of other origin. UserError where it is unknown, or the net is made for a
    kit of another architecture.
    """
    net, facts = placed(load_controlnet(path, kit.dtype), kit.device), read_hint(path)
    name = facts.get("branch", operator)
    if name not in weights:
        raise UserError(f"{path} does not say which hint it wants (hint.json): add branch={'|'.join(weights)}")
    for key in ("block_out_channels", "cross_attention_dim", "layers_per_block"):
        theirs, ours = net.config[key], kit.unet.config[key]
        if list(np.atleast_1d(theirs)) != list(np.atleast_1d(ours)):
            made_for = facts.get("kit", "another kit")
            raise UserError(f"{path}, trained on {made_for}, does not fit kit {kit.name} ({key}): give its model.path")
    return Branch(name, net, weights[name], facts.get("parameters"))


def asked_settings(asked: Mapping) -> Settings:
    """The settings of a command's configuration."""
    near = {name: asked[name] for name in ("solver", "guided", "encoder_every", "graphs", "compile")}
    return Settings(asked["steps"], asked["guidance"], asked["seed"], **near)


# what makes clean latents B x C x h x w: (which items, noise, hole B x 1 x h x w, scaled masked latent)
Draw = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def filled(
    kit: Kit,
    images: Sequence[np.ndarray],
    holes: Sequence[np.ndarray],
    draw: Draw,
    settings: Settings = Settings(),
    indices: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Raw model outputs, uint8 R x R x 3, before any paste-back, whatever the method: ``draw`` makes the latents.

    ``images`` uint8 R x R x 3 give the background (what lies in the hole is not seen), ``holes`` are bool R x R; R is
    the kit's resolution. Noise of item i depends on (seed, indices[i]) only.
    """
    indices = list(range(len(images))) if indices is None else indices
    shape = (kit.channels, kit.resolution // kit.factor, kit.resolution // kit.factor)
    outputs = []
    for i in range(0, len(images), settings.batch):
        part = slice(i, i + settings.batch)
        x = torch.stack([to_model(v) for v in images[part]]).to(kit.device)
        open_ = torch.from_numpy(np.stack(holes[part])[:, None]).float().to(kit.device)
        masked = kit.latent(kit.moments(x * (1 - open_)))
        noise = noise_for(settings.seed, indices[part], shape, kit.device)
        z = draw(part, noise, to_latent(open_, kit.factor), masked)
        outputs += [from_model(y) for y in kit.decode(z).float()]
    return outputs


@torch.no_grad()
def fill(
    kit: Kit,
    images: Sequence[np.ndarray],
    instances: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    holes: Sequence[np.ndarray],
    prompts: Sequence[str],
    branches: Sequence[Branch] = (),
    settings: Settings = Settings(),
    indices: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """``filled`` by words and ControlNets. ``instances`` uint8 R x R x 3 with ``masks`` bool R x R give the hints;
    ``holes`` contain the masks.
    """
    empty = kit.prompt([""])

    def draw(part: slice, noise: torch.Tensor, hole: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        controls = [(b.net, hints(b, instances[part], masks[part]).to(kit.device), b.weight) for b in branches]
        text = kit.prompt(list(prompts[part]))
        return inpaint(kit, noise, hole, masked, text, empty, settings, controls)

    return filled(kit, images, holes, draw, settings, indices)


def hints(branch: Branch, instances: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> torch.Tensor:
    """B x 3 x R x R in [0, 1] by the branch's operator."""
    pairs = zip(instances, masks, strict=True)
    return torch.stack([to_hint(hint(branch.name, image, mask, **(branch.parameters or {}))) for image, mask in pairs])


@dataclass(frozen=True)
class Result:
    """``image``: the photograph with the instance in it, bit-exact outside ``hole``; ``raw``: the model's square;
    ``composite``: plain copy and paste; ``crop``: where the square lies; ``rounds``: those of zero-shot harmonization.
    """

    image: np.ndarray
    raw: np.ndarray
    composite: np.ndarray
    hole: np.ndarray
    crop: Crop
    rounds: Sequence = ()


@dataclass(frozen=True)
class Composite:
    """One object to go into one picture, at a method's resolution R: ``background``, ``instance`` uint8 R x R x 3;
    ``mask``, ``hole`` bool R x R, the hole containing the mask.
    """

    background: np.ndarray
    instance: np.ndarray
    mask: np.ndarray
    hole: np.ndarray


@dataclass(frozen=True)
class Insertion:
    """A ``square`` cut out of a photograph, and the way back into it.

    ``background``, ``composite`` (plain copy and paste) uint8 H x W x 3; ``hole`` bool H x W; the square lies at
    ``crop``.
    """

    square: Composite
    background: np.ndarray
    composite: np.ndarray
    hole: np.ndarray
    crop: Crop

    def paste(self, raw: np.ndarray, feather: float = 0, detail: bool = False) -> Result:
        """The photograph with ``raw`` (uint8 R x R x 3) in the hole; ``feather`` in pixels blends inwards.

        ``detail``: what a method changed of the composite is done to the composite in its full size, instead of
        enlarging what it made.
        """
        pixels = raw
        if detail:
            whole = crop_resize(self.composite, self.crop, self.crop.side)
            pixels = carried(self.square.instance, raw, self.square.mask, whole)
        image = paste_back(paste_crop(self.background, pixels, self.crop), self.background, self.hole, feather)
        return Result(image, raw, self.composite, self.hole, self.crop)


def cut(
    side: int,
    background: np.ndarray,
    foreground: np.ndarray,
    mask: np.ndarray,
    region: np.ndarray | None = None,
    radius: float = TEST_RADIUS,
) -> Insertion:
    """The square of ``side`` pixels in which the masked object of ``foreground`` goes into ``background``.

    ``background``, ``foreground`` uint8 H x W x 3 and ``mask`` bool H x W share one size (see ``composites.place`` for
    a cut-out of another size). The hole is the mask dilated by ``radius`` (px at 512 of the working square), joined by
    the optional ``region`` in which a method may also repaint (for a shadow). UserError for an empty mask or sizes that
    differ.
    """
    check_sizes(background, foreground=foreground, mask=mask, region=region)
    height, width = background.shape[:2]
    composite = copy_paste(background, foreground, mask)
    crop = working_square(mask, region)
    image, instance, small = (crop_resize(a, crop, side) for a in (background, composite, mask))
    if not small.any():
        raise UserError(f"the object is too small: it vanishes at the kit's {side} px; enlarge it or take a larger kit")
    opened = dilate(mask, math.ceil(scaled(radius, (crop.side,))))  # the rule at the photograph's resolution
    if region is not None:
        opened |= region
    opened &= box_mask(crop.inside(width, height), width, height)
    square = Composite(image, instance, small, crop_resize(opened, crop, side))
    return Insertion(square, background, composite, opened, crop)


def fill_composites(
    kit: Kit, composites: Sequence[Composite], prompts: Sequence[str], branches: Sequence[Branch], settings: Settings
) -> list[np.ndarray]:
    """``fill`` for composites of different photographs: each has the noise that it has alone, whatever stands beside
    it.
    """
    columns = zip(*((c.background, c.instance, c.mask, c.hole) for c in composites), strict=True)
    return fill(kit, *map(list, columns), prompts, branches, settings, [0] * len(composites))


def harmonize(
    kit: Kit,
    background: np.ndarray,
    foreground: np.ndarray,
    mask: np.ndarray,
    prompt: str,
    branches: Sequence[Branch],
    settings: Settings = Settings(),
    region: np.ndarray | None = None,
    feather: float = 0,
) -> Result:
    """Put the masked object of ``foreground`` into ``background`` by words and ControlNets; arguments as of ``cut``."""
    insertion = cut(kit.resolution, background, foreground, mask, region)
    return insertion.paste(*fill_composites(kit, [insertion.square], [prompt], branches, settings), feather)


def working_square(mask: np.ndarray, region: np.ndarray | None = None) -> Crop:
    """The square of the photograph that the model works on."""
    height, width = mask.shape
    return square_around(bounding_box(mask if region is None else mask | region), width, height, context=CONTEXT)


def check_sizes(background: np.ndarray, **others: np.ndarray | None) -> None:
    """UserError unless ``others`` (pictures and masks by name, None left out) are as large as the background."""
    height, width = background.shape[:2]
    for name, array in others.items():
        if array is not None and array.shape[:2] != (height, width):
            sizes = f"{array.shape[1]} x {array.shape[0]} but the background is {width} x {height}"
            raise UserError(f"{name} is {sizes}: give box=x0,y0,x1,y1 or resize it")
