"""The nodes: crop around the object, its hints, paste back, and Reinhard's transfer, by harmony's own functions.

Masks are 1 where the object is, as the MaskEditor paints them; Load Image's alpha is the other way round. What does not
fit is a UserError, which ComfyUI shows at the node.
"""

from dataclasses import dataclass

import torch
from comfy_api.v0_0_2 import ComfyExtension, io

from harmony.apps.comfyui.tensors import match_count, paste, read_masks, read_pictures, to_image, to_mask
from harmony.core.errors import UserError
from harmony.methods.insert import Insertion, cut, find_shadow_region
from harmony.pixels.composites import reinhard
from harmony.pixels.hints import HINTS, hint
from harmony.pixels.masks import TEST_RADIUS

CATEGORY = "harmony"
OBJECT_TIP = "1 where the object is; invert what Load Image gives for a picture with transparency"


@dataclass(frozen=True)
class Crop:
    """The squares of a batch and the image that they were cut out of, with its very values."""

    image: torch.Tensor
    insertions: list[Insertion]


CROP = io.Custom("HARMONY_CROP")


class HarmonyCrop(io.ComfyNode):
    """The square around the object, at the size of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HarmonyCrop",
            display_name="Harmony Crop",
            category=CATEGORY,
            description="Cut out the square around a pasted object, at the model's size, with the hole to fill",
            search_aliases=["inpaint crop", "crop around mask"],
            inputs=[
                io.Image.Input("image", tooltip="the photograph with the object in it (copy and paste)"),
                io.Mask.Input("mask", tooltip=OBJECT_TIP),
                io.Int.Input("size", default=512, min=64, max=2048, step=64, tooltip="side of the square in pixels"),
                io.Float.Input(
                    "rim",
                    default=TEST_RADIUS,
                    min=0,
                    max=64,
                    step=1,
                    tooltip="how far the hole extends beyond the object, in pixels at 512",
                ),
                io.Boolean.Input(
                    "shadow",
                    default=False,
                    tooltip="make room for a shadow around the object's lower third; connect before of Paste Back then",
                ),
            ],
            outputs=[
                io.Image.Output("square"),
                io.Mask.Output("object", tooltip="where the object is in the square"),
                io.Mask.Output("hole", tooltip="what the model may repaint: the object and its rim"),
                CROP.Output("crop", tooltip="for Harmony Paste Back"),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, mask: torch.Tensor, size: int, rim: float, shadow: bool) -> io.NodeOutput:
        pictures = read_pictures(image)
        insertions = []
        for picture, each in zip(pictures, read_masks(mask, pictures), strict=True):
            region = find_shadow_region(each) if shadow else None
            insertions.append(cut(size, picture, picture, each, region, rim))
        squares = [insertion.square for insertion in insertions]
        masks = [to_mask([getattr(square, name) for square in squares]) for name in ("mask", "hole")]
        square = to_image([square.instance for square in squares])
        return io.NodeOutput(square, *masks, Crop(image, insertions))


class HarmonyHint(io.ComfyNode):
    """The picture that a ControlNet of harmony is conditioned on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HarmonyHint",
            display_name="Harmony Hint",
            category=CATEGORY,
            description="What a ControlNet of harmony sees of the object, by the operator that it was trained with",
            search_aliases=["controlnet preprocessor", "canny", "color hint"],
            inputs=[
                io.Image.Input("image", tooltip="the square of Harmony Crop"),
                io.Mask.Input("mask", tooltip="the object in it"),
                io.Combo.Input(
                    "kind",
                    options=list(HINTS),
                    default="color",
                    tooltip="color: the object blurred; structure: its edges; raw: as it is. As in the file's name",
                ),
                io.Float.Input(
                    "blur",
                    default=1.25,
                    min=0,
                    max=64,
                    step=0.05,  # ComfyUI rounds to the decimals of the step
                    tooltip="color: sigma in latent cells of 8 pixels",
                ),
                io.Float.Input(
                    "low", default=100, min=0, max=10_000, step=1, tooltip="structure: Canny's lower threshold"
                ),
                io.Float.Input("high", default=200, min=0, max=10_000, step=1, tooltip="structure: its upper one"),
                io.Boolean.Input(
                    "normalize",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="color: the black around the object does not darken its rim",
                ),
                io.Combo.Input(
                    "edge_source",
                    options=["masked", "full_times_mask"],
                    default="masked",
                    optional=True,
                    advanced=True,
                    tooltip="structure: masked: edges of the object on black; full_times_mask: of the picture, cut off",
                ),
                io.Mask.Input(
                    "hole",
                    optional=True,
                    tooltip="only for a ControlNet that was trained with surroundings: outside it the photograph shows",
                ),
            ],
            outputs=[io.Image.Output("hint")],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        mask: torch.Tensor,
        kind: str,
        blur: float,
        low: float,
        high: float,
        normalize: bool = True,
        edge_source: str = "masked",
        hole: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        parameters = {
            "color": {"blur": blur, "normalize": normalize},
            "structure": {"low": low, "high": high, "edge_source": edge_source},
        }.get(kind, {})
        pictures = read_pictures(image)
        masks = read_masks(mask, pictures)
        holes = masks if hole is None else read_masks(hole, pictures)
        hints = [
            hint(kind, picture, *others, surroundings=hole is not None, **parameters)
            for picture, *others in zip(pictures, masks, pictures, holes, strict=True)
        ]
        return io.NodeOutput(to_image(hints))


class HarmonyPasteBack(io.ComfyNode):
    """The photograph with what a model painted in the hole, and nothing else changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HarmonyPasteBack",
            display_name="Harmony Paste Back",
            category=CATEGORY,
            description="Paste the model's square into the hole of the photograph; all values outside it stay the same",
            search_aliases=["inpaint stitch", "uncrop"],
            inputs=[
                CROP.Input("crop", tooltip="of Harmony Crop"),
                io.Image.Input("image", tooltip="the square that the model painted"),
                io.Float.Input(
                    "feather", default=0, min=0, max=64, step=1, tooltip="pixels over which the rim blends, inwards"
                ),
                io.Image.Input(
                    "before",
                    optional=True,
                    tooltip="the square through the same VAE: the photograph then keeps its own detail and takes the "
                    "change of light from before to image alone",
                ),
            ],
            outputs=[io.Image.Output("photograph")],
        )

    @classmethod
    def execute(
        cls, crop: Crop, image: torch.Tensor, feather: float, before: torch.Tensor | None = None
    ) -> io.NodeOutput:
        outputs = read_squares(image)
        insertions = match_count(crop.insertions, len(outputs), "crops")
        befores = [None] if before is None else read_squares(before, outputs[0].shape)
        befores = match_count(befores, len(outputs), "squares before")
        results = [
            insertion.paste(output, feather, each)
            for insertion, output, each in zip(insertions, outputs, befores, strict=True)
        ]
        photographs = crop.image.expand(len(outputs), -1, -1, -1)
        return io.NodeOutput(paste(photographs, [r.image for r in results], [r.hole for r in results]))


class HarmonyReinhard(io.ComfyNode):
    """The object with the colors of what is around it, without a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HarmonyReinhard",
            display_name="Harmony Reinhard",
            category=CATEGORY,
            description="Give the object mean and deviation of the photograph's colors (Reinhard 2001); no model",
            search_aliases=["color match", "color transfer", "harmonize"],
            inputs=[
                io.Image.Input("image", tooltip="the photograph with the object in it (copy and paste)"),
                io.Mask.Input("mask", tooltip=OBJECT_TIP),
            ],
            outputs=[io.Image.Output("photograph")],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, mask: torch.Tensor) -> io.NodeOutput:
        pictures = read_pictures(image)
        masks = read_masks(mask, pictures)
        results = [reinhard(picture, each, picture) for picture, each in zip(pictures, masks, strict=True)]
        return io.NodeOutput(paste(image, results, masks))


def read_squares(image: torch.Tensor, shape: tuple[int, ...] | None = None) -> list:
    """The squares of an IMAGE, uint8 R x R x 3 each. UserError for others, and for those of another ``shape``."""
    pictures = read_pictures(image)
    height, width = pictures[0].shape[:2]
    if height != width or (shape is not None and pictures[0].shape != shape):
        raise UserError(f"the image is {width} x {height}: connect what the model made of the square of Harmony Crop")
    return pictures


class Harmony(ComfyExtension):
    """All nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [HarmonyCrop, HarmonyHint, HarmonyPasteBack, HarmonyReinhard]
