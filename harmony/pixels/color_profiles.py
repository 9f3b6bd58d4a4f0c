"""Color profiles (ICC) and EXIF of photographs are kept; a cut-out is converted to the photograph's color space.

Models know sRGB alone: what they see of a photograph in another space is converted to it, and their answer back.
"""

from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from harmony.pixels.images import DEEP, open_image, to_rgb

NO_RGB = ("CMYK", "LAB")  # modes whose pixels an RGB profile cannot describe


@dataclass(frozen=True)
class Photograph:
    """The pixels of a picture, uint8 H x W x 3, upright, and their color profile; None means sRGB.

    ``notes``: lines for the user on what happened to its colors. ``exif``: what the file says of camera, time and
    place, without the orientation.
    """

    pixels: np.ndarray
    profile: bytes | None = None
    notes: tuple[str, ...] = ()
    exif: bytes | None = None


def read_photograph(path: str | Path) -> Photograph:
    """Read a picture and keep its color profile, which must be one of RGB.

    A picture with a profile of another kind (CMYK, gray) is converted to sRGB; an unreadable profile is left out, and
    of more than 8 bits a channel 8 are kept. Each gives a note. UserError as in ``read_image``.
    """
    image = open_image(path)
    profile, exif = image.info.get("icc_profile"), read_exif(image)
    notes = (f"{path}: more than 8 bits a channel, of which results have 8",) if image.info[DEEP] else ()
    if not profile:
        return Photograph(to_rgb(image, path), notes=notes, exif=exif)
    try:
        note = f"{path}: colors converted from {describe(profile)} to sRGB"
        if open_profile(profile).profile.xcolor_space.strip() == "RGB" and image.mode not in NO_RGB:
            check_profile(profile)
            return Photograph(to_rgb(image, path), profile, notes, exif)
        picture = convert_colors(image.convert("L") if image.mode == "LA" else image, profile, None)
    except (OSError, ValueError, ImageCms.PyCMSError):
        note = f"the color profile of {path} cannot be used: its colors are taken as sRGB"
        return Photograph(to_rgb(image, path), notes=(*notes, note), exif=exif)
    return Photograph(np.array(picture), notes=(*notes, note), exif=exif)


def check_profile(profile: bytes) -> None:
    """Raises OSError, ValueError or PyCMSError unless colors go from ``profile`` to sRGB and back."""
    for pair in ((profile, None), (None, profile)):
        convert_colors(Image.new("RGB", (1, 1)), *pair)


def read_exif(image: Image.Image) -> bytes | None:
    """The EXIF of an image for another file: without the thumbnail, which shows what was there before."""
    if not image.info.get("exif"):
        return None
    exif = image.getexif()
    return exif.tobytes() if len(exif) else None


def read_in_space(path: str | Path, profile: bytes | None) -> Photograph:
    """Read a picture with its colors converted to the space of ``profile``, that of the photograph it goes into."""
    photograph = read_photograph(path)
    if photograph.profile == profile or (is_srgb(photograph.profile) and is_srgb(profile)):
        return replace(photograph, profile=profile)
    names = f"{describe(photograph.profile)} to {describe(profile)}"
    try:
        picture = convert_colors(Image.fromarray(photograph.pixels), photograph.profile, profile)
    except ImageCms.PyCMSError:
        note = f"{path}: colors could not be converted from {names} and are taken as they are"
        return Photograph(photograph.pixels, profile, (*photograph.notes, note))
    note = f"{path}: colors converted from {names}"
    return Photograph(np.array(picture), profile, (*photograph.notes, note))


def is_srgb(profile: bytes | None) -> bool:
    """Whether a profile calls itself sRGB."""
    return profile is None or "sRGB" in describe(profile)


def to_srgb(pixels: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Pixels of ``profile``, uint8 H x W x 3, in sRGB; colors beyond it become its most saturated ones."""
    return pixels if is_srgb(profile) else np.array(convert_colors(Image.fromarray(pixels), profile, None))


def from_srgb(pixels: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Pixels of sRGB, uint8 H x W x 3, in the space of ``profile``."""
    return pixels if is_srgb(profile) else np.array(convert_colors(Image.fromarray(pixels), None, profile))


def convert_colors(image: Image.Image, source: bytes | None, target: bytes | None) -> Image.Image:
    """Convert an image between color profiles (None: sRGB) to RGB. Raises PyCMSError where they do not fit."""
    profiles = open_profile(source), open_profile(target)
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.profileToProfile(image, *profiles, renderingIntent=intent, outputMode="RGB", flags=flags)


def open_profile(profile: bytes | None) -> ImageCms.ImageCmsProfile:
    """The profile for Pillow; sRGB for None. Raises OSError for damaged bytes."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB") if profile is None else BytesIO(profile))


def describe(profile: bytes | None) -> str:
    """The name that a profile gives itself, in one line."""
    return " ".join((open_profile(profile).profile.profile_description or "an unnamed color profile").split())
