"""Images in files and in memory: reading, writing, square crops, value ranges, picture grids.

In memory an image is uint8 H x W x 3 RGB; a mask is bool H x W. Networks see floats, NCHW (legend in core/row.py).
"""

import hashlib
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from harmony.core.errors import UserError
from harmony.core.files import replace_file

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # others never reach their decoder in Pillow (EPS!)
DEEP = "deep"
HEIF = (".heic", ".heif")  # of telephones, which Pillow reads where pillow-heif is installed
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", *HEIF)  # of pictures' files
WRITERS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
CELL = 128  # px: smallest cell of a grid that one can read
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of values in 0..1; every CLIP image tower normalizes by them
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TITLE = 14  # px: size of the title font


# --- files


def check_file(path: str | Path, what: str = "file") -> None:
    """UserError unless ``path`` is a regular file: a pipe or a device would be waited for without end."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what} {path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path} cannot be opened ({error}); check the path") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise UserError(f"{what} {path} is {kind} and cannot be decoded; give a file")


@cache
def list_formats() -> tuple[str, ...]:
    """The formats that are decoded: FORMATS, and HEIF where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return *FORMATS, "HEIF"


def open_image(path: str | Path, what: str = "image") -> Image.Image:
    """Read and decode the image ``path``, rotated by its EXIF orientation. Raises UserError if that fails.

    ``info[DEEP]`` says that the file has more than 8 bits a channel, of which Pillow keeps the upper 8 in RGB.
    """
    check_file(path, what)
    try:
        with Image.open(path, formats=list_formats()) as file:
            is_deep = file.mode.startswith("I;16") or any(";16" in str(tile.args) for tile in file.tile)
            file.load()
            image = ImageOps.exif_transpose(file)
            image.info[DEEP] = is_deep
            return image
    except UnidentifiedImageError:
        reason, mend = f"it is none of {', '.join(list_formats())}", "save it as PNG or JPEG"
        if Path(path).suffix.lower() in HEIF and "HEIF" not in list_formats():
            reason, mend = "HEIF needs pillow-heif", "pip install pillow-heif, or save it as PNG or JPEG"
    except Exception as error:  # damaged files make Pillow raise almost anything
        reason, mend = " ".join(str(error).split()) or type(error).__name__, "replace the file or fetch it again"
    raise UserError(f"{what} {path} cannot be decoded ({reason}); {mend}")


def read_image(path: str | Path) -> np.ndarray:
    """Image file as uint8 H x W x 3 RGB, upright. Alpha is dropped, 16-bit gray is scaled to 8 bit.

    Raises UserError for a file that is missing, truncated, not an image, or holds floating-point pixels.
    """
    return to_rgb(open_image(path), path)


def to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """The pixels of a decoded image as uint8 H x W x 3 RGB. UserError, which names ``path``, for floats."""
    if image.mode == "F":
        raise UserError(f"image {path} holds floating-point pixels; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit gray at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257 + 0.5).astype(np.uint8))
    return np.array(image.convert("RGB"))


def write_image(path: str | Path, image: np.ndarray, **options) -> None:
    """Write uint8 H x W x 3, uint8 H x W or a bool mask (True = 255) as PNG or JPEG by suffix, atomically."""
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"{path} has suffix '{path.suffix}'; write images as {', '.join(WRITERS)}")
    pixels = image.astype(np.uint8) * 255 if image.dtype == bool else image
    options = {name: value for name, value in options.items() if value is not None}  # JPEG's writer takes no exif=None
    with replace_file(path) as temp_path:
        Image.fromarray(pixels).save(temp_path, **WRITERS[path.suffix.lower()] | options)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises UserError if it is missing or no regular file."""
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- square crops


@dataclass(frozen=True)
class Crop:
    """A square in image pixels: [x0, x0 + side) x [y0, y0 + side). It may extend beyond the image."""

    x0: int
    y0: int
    side: int

    def clip(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Clip to a ``width`` x ``height`` image; returns (x0, y0, x1, y1). Raises ValueError if nothing is left."""
        x0, x1 = max(self.x0, 0), min(self.x0 + self.side, width)
        y0, y1 = max(self.y0, 0), min(self.y0 + self.side, height)
        if x0 >= x1 or y0 >= y1:
            raise ValueError(f"{self} lies outside an image of {width} x {height}")
        return x0, y0, x1, y1


def square_around(box: Sequence[float], width: int, height: int, context: float | None = None) -> Crop:
    """The square around ``box`` = (x0, y0, x1, y1), centered on it as far as the square stays in the image.

    Its side is the image's short side, or with ``context`` c the box's longer side times c, at most the short side. If
    the box is longer than the short side, the square has the box's longer side and extends beyond the image equally on
    both sides. It always contains the part of the box that lies in the image. Raises UserError if no part does.
    """
    x0, x1 = max(math.floor(box[0]), 0), min(math.ceil(box[2]), width)
    y0, y1 = max(math.floor(box[1]), 0), min(math.ceil(box[3]), height)
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"box {tuple(box)} lies outside the {width} x {height} image; give x0, y0, x1, y1 in pixels")
    box_side, image_side = max(x1 - x0, y1 - y0), min(width, height)
    side = image_side if context is None else min(math.ceil(context * box_side), image_side)
    side = max(side, box_side)
    return Crop(_start(x0, x1, side, width), _start(y0, y1, side, height), side)


def _start(low: int, high: int, side: int, length: int) -> int:
    """First pixel of an interval of ``side`` on an axis of ``length``, centered on [low, high), then moved inside."""
    if side >= length:
        return (length - side) // 2
    return min(max((low + high - side) // 2, 0), length - side)


def crop_resize(array: np.ndarray, crop: Crop, side: int) -> np.ndarray:
    """Cut ``crop`` out of an image (uint8) or a mask (bool) and resize it to ``side`` x ``side``; the type stays.

    Images: area interpolation to shrink, cubic to enlarge (cv2 saturates). Outside the image the crop is filled by
    reflection, or by the rim's pixels where it extends as far as the image is wide. Masks: nearest, False outside.
    """
    height, width = array.shape[:2]
    x0, y0, x1, y1 = crop.clip(width, height)
    part = array[y0:y1, x0:x1]
    margins = (y0 - crop.y0, crop.y0 + crop.side - y1, x0 - crop.x0, crop.x0 + crop.side - x1)
    if array.dtype == bool:
        canvas = cv2.copyMakeBorder(part.astype(np.uint8), *margins, cv2.BORDER_CONSTANT, value=0)
        return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_NEAREST).astype(bool)
    reflects = max(margins[:2]) < y1 - y0 and max(margins[2:]) < x1 - x0
    canvas = cv2.copyMakeBorder(part, *margins, cv2.BORDER_REFLECT_101 if reflects else cv2.BORDER_REPLICATE)
    return resize(canvas, side, side)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize an image (or a float plane): area interpolation to shrink, cubic to enlarge, else a copy."""
    if image.shape[:2] == (height, width):
        return image.copy()
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def limit_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height in pixels, shrunk in proportion so that the longer of them is at most ``side``."""
    scale = min(1, side / max(width, height))
    return max(1, round(scale * width)), max(1, round(scale * height))


def paste_crop(image: np.ndarray, patch: np.ndarray, crop: Crop) -> np.ndarray:
    """The inverse of ``crop_resize``: a copy of ``image`` with ``patch`` (uint8, square) resized back into ``crop``."""
    x0, y0, x1, y1 = crop.clip(image.shape[1], image.shape[0])
    square = resize(patch, crop.side, crop.side)
    result = image.copy()
    result[y0:y1, x0:x1] = square[y0 - crop.y0 : y1 - crop.y0, x0 - crop.x0 : x1 - crop.x0]
    return result


# --- value ranges


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (B x) H x W x 3 to float (B x) 3 x H x W, values 0..255."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3))).float()


def to_model(image: np.ndarray) -> torch.Tensor:
    """uint8 (B x) H x W x 3 to float (B x) 3 x H x W in [-1, 1], model range."""
    return _to_tensor(image) / 127.5 - 1


def to_hint(image: np.ndarray) -> torch.Tensor:
    """uint8 (B x) H x W x 3 to float (B x) 3 x H x W in [0, 1], hint range."""
    return _to_tensor(image) / 255


def from_model(tensor: torch.Tensor) -> np.ndarray:
    """Float (B x) 3 x H x W in model range to uint8 (B x) H x W x 3: clamped, rounded. Raises UserError for NaN."""
    values = tensor.detach().float().cpu()
    if values.isnan().any():
        raise UserError("a generated image holds NaN; run with float32 or bfloat16 and check the weights")
    pixels = ((values + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return np.ascontiguousarray(np.moveaxis(pixels.numpy(), -3, -1))


def to_clip(pictures: torch.Tensor) -> torch.Tensor:
    """B x 3 x S x S in [0, 1] (hint range) to the input of a CLIP image tower of side S."""
    mean, std = (pictures.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pictures - mean) / std


# --- picture grids


def grid(
    rows: list[list[np.ndarray]], titles: list[str] | None = None, pad: int = 2, scale: int | None = None
) -> np.ndarray:
    """Arrange rows of uint8 images in one picture with white frames and column titles; uint8 H x W x 3.

    ``scale`` is how often each pixel is repeated; by default just often enough for cells of at least 128 px. Every cell
    has the size of the largest image. Rows may have different lengths.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("a grid needs at least one image")
    if scale is None:
        scale = max(1, math.ceil(CELL / min(min(image.shape[:2]) for image in images)))
    cell_height = scale * max(image.shape[0] for image in images)
    cell_width = scale * max(image.shape[1] for image in images)
    columns = max(len(row) for row in rows)
    title_height = TITLE + 6 if titles else 0
    canvas = Image.new(
        "RGB", (columns * (cell_width + pad) + pad, title_height + len(rows) * (cell_height + pad) + pad), "white"
    )
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            cell = image.repeat(scale, axis=0).repeat(scale, axis=1)
            canvas.paste(
                Image.fromarray(cell), (pad + j * (cell_width + pad), title_height + pad + i * (cell_height + pad))
            )
    for j, title in enumerate(titles or []):
        _draw_title(canvas, title, pad + j * (cell_width + pad), cell_width)
    return np.array(canvas)


def _draw_title(canvas: Image.Image, text: str, x: int, width: int) -> None:
    """Draw ``text`` centered above the column that starts at ``x``; a text that is too long is cut and ends in dots."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TITLE)
    line = text
    while draw.textlength(line, font=font) > width and len(line) > 3:
        line = line.removesuffix("...")[:-1] + "..."
    draw.text((x + width / 2, 2), line, fill="black", font=font, anchor="ma")
