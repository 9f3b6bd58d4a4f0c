"""Color profiles (ICC) of photographs: kept as they are; a cut-out is converted to the photograph's color space."""

from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from harmony.pixels.images import open_image, to_rgb

NO_RGB = ("CMYK", "LAB")  # modes whose pixels an RGB profile cannot describe


@dataclass(frozen=True)
class Photograph:
    """The pixels of a picture, uint8 H x W x 3, and their color profile; None means sRGB.

    ``notes``: lines for the user on what happened to its colors.
    """

    pixels: np.ndarray
    profile: bytes | None = None
    notes: tuple[str, ...] = ()


def read_photograph(path: str | Path) -> Photograph:
    """Read a picture and keep its color profile, which must be one of RGB.

    A picture with a profile of another kind (CMYK, gray) is converted to sRGB; an unreadable profile is left out. Both
    give a note. UserError as in ``read_image``.
    """
    image = open_image(path)
    profile = image.info.get("icc_profile")
    if not profile:
        return Photograph(to_rgb(image, path))
    try:
        note = f"{path}: colors converted from {describe(profile)} to sRGB"
        if open_profile(profile).profile.xcolor_space.strip() == "RGB" and image.mode not in NO_RGB:
            convert_colors(Image.new("RGB", (1, 1)), profile, None)  # fails where the profile is damaged
            return Photograph(to_rgb(image, path), profile)
        picture = convert_colors(image.convert("L") if image.mode == "LA" else image, profile, None)
    except (OSError, ValueError, ImageCms.PyCMSError):
        note = f"the color profile of {path} cannot be used: its colors are taken as sRGB"
        return Photograph(to_rgb(image, path), notes=(note,))
    return Photograph(np.array(picture), notes=(note,))


def read_in_space(path: str | Path, profile: bytes | None) -> Photograph:
    """Read a picture with its colors converted to the space of ``profile``, that of the photograph it goes into."""
    photograph = read_photograph(path)
    if photograph.profile == profile or "sRGB" in describe(photograph.profile) and "sRGB" in describe(profile):
        return replace(photograph, profile=profile)
    names = f"{describe(photograph.profile)} to {describe(profile)}"
    try:
        picture = convert_colors(Image.fromarray(photograph.pixels), photograph.profile, profile)
    except ImageCms.PyCMSError:
        note = f"{path}: colors could not be converted from {names} and are taken as they are"
        return Photograph(photograph.pixels, profile, (*photograph.notes, note))
    note = f"{path}: colors converted from {names}"
    return Photograph(np.array(picture), profile, (*photograph.notes, note))


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
