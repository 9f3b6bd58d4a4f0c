"""Color profiles: kept with the pixels, converted where two meet, never dropped without a word."""

import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from harmony.pixels.color_profiles import Photograph, read_in_space, read_photograph
from harmony.pixels.images import list_formats, write_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOR = np.full((4, 5, 3), (200, 100, 50), np.uint8)


def linear_gray_profile() -> bytes:
    """A profile of gray values that are proportional to light."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white, b"kTRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, 256, 0)}
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    return head + bytes(12) + b"acsp" + bytes(28) + white + bytes(48) + table + data


@pytest.fixture
def profiles(swapped_profile):
    """Name -> profile."""
    gray = linear_gray_profile()
    return {"none": None, "srgb": SRGB, "swapped": swapped_profile, "gray": gray, "damaged": b"damaged" * 40} | {
        "no ASCII": SRGB.replace(b"RGB ", b"R\xf7B "),
        "no curves": SRGB.replace(b"rTRC", b"none"),
    }


def scanner_profile() -> bytes:
    """A profile of a scanner: a table of what its colors look like, and none of the way back."""
    numbers = lambda *values: struct.pack(f">{len(values)}i", *(round(65536 * v) for v in values))  # noqa: E731
    steps = [(r, g, b) for r in (0, 1) for g in (0, 1) for b in (0, 1)]
    colors = b"".join(bytes([round(255 * (0.3 * r + 0.6 * g + 0.1 * b)), 128, 128]) for r, g, b in steps)
    table = b"mft1\0\0\0\0" + bytes([3, 3, 2, 0]) + numbers(*np.eye(3).ravel())
    table += bytes(range(256)) * 3 + colors + bytes(range(256)) * 3
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 8) + b"Scanner\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + numbers(0.9642, 1, 0.8249),
        b"A2B0": table,
    }
    head, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        head += struct.pack(">4sII", tag, start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    lead = struct.pack(
        ">I4sI4s4s4s6H4s",
        start + len(data),
        b"lcms",
        0x02400000,
        b"scnr",
        b"RGB ",
        b"Lab ",
        *[2020, 1, 1, 0, 0, 0],
        b"acsp",
    )
    lead += bytes(28) + numbers(0.9642, 1, 0.8249)
    return lead + bytes(128 - len(lead)) + head + data


def save(path, pixels, profile, mode=None):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, icc_profile=profile)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_photograph_keeps_its_profile_and_its_pixels(tmp_path, suffix, mode, swapped_profile):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOR).convert(mode).save(path, icc_profile=swapped_profile, lossless=True)
    photograph = read_photograph(path)
    assert np.array_equal(photograph.pixels, COLOR)
    assert photograph.profile == swapped_profile and not photograph.notes


def test_no_profile_is_none(tmp_path):
    photograph = read_photograph(save(tmp_path / "a.png", COLOR, None))
    assert photograph.profile is None and not photograph.notes


@pytest.mark.parametrize("source, target", [("swapped", "none"), ("none", "swapped")])
def test_a_cut_out_comes_into_the_space_of_its_photograph(tmp_path, profiles, source, target):
    """Guards against two color spaces in one picture."""
    cut_out = read_in_space(save(tmp_path / "a.png", COLOR, profiles[source]), profiles[target])
    assert np.abs(cut_out.pixels.astype(int) - (50, 100, 200)).max() <= 2
    assert cut_out.profile == profiles[target]
    (note,) = cut_out.notes
    assert note.startswith(f"{tmp_path / 'a.png'}: colors converted from s") and "\n" not in note


@pytest.mark.parametrize("source, target", [("srgb", "none"), ("none", "srgb"), ("swapped", "swapped")])
def test_equal_spaces_convert_nothing(tmp_path, profiles, source, target):
    cut_out = read_in_space(save(tmp_path / "a.png", COLOR, profiles[source]), profiles[target])
    assert np.array_equal(cut_out.pixels, COLOR) and cut_out.profile == profiles[target] and not cut_out.notes


def test_profiles_that_rgb_cannot_carry_are_converted(tmp_path):
    """A gray of half the light is 188 in sRGB."""
    photograph = read_photograph(save(tmp_path / "a.png", np.full((4, 5), 128, np.uint8), linear_gray_profile()))
    assert photograph.profile is None and np.abs(photograph.pixels.astype(int) - 188).max() <= 1
    assert photograph.pixels.shape == (4, 5, 3)
    (note,) = photograph.notes
    assert "a.png: colors converted from an unnamed color profile to sRGB" in note


@pytest.mark.parametrize(
    "name, mode", [("damaged", "RGB"), ("no ASCII", "RGB"), ("no curves", "RGB"), ("swapped", "CMYK"), ("gray", "RGB")]
)
def test_profiles_that_do_not_fit_are_named(tmp_path, profiles, name, mode):
    photograph = read_photograph(save(tmp_path / "a.tif", COLOR, profiles[name], mode))
    assert photograph.profile is None and np.array_equal(photograph.pixels, COLOR)
    assert photograph.notes == (
        f"the color profile of {tmp_path / 'a.tif'} cannot be used: its colors are taken as sRGB",
    )


def test_a_photograph_of_pixels_alone_is_srgb():
    assert Photograph(COLOR).profile is None


def test_a_telephones_photograph_is_read(tmp_path):
    """Guards HEIC: its color profile and EXIF; it says itself how it is turned, EXIF must not turn it again."""
    list_formats()
    exif = Image.Exif()
    exif[0x0110], exif[0x0112] = "a telephone", 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 200
    Image.fromarray(pixels).save(tmp_path / "a.heic", exif=exif, icc_profile=SRGB, quality=95)
    photograph = read_photograph(tmp_path / "a.heic")
    assert photograph.profile == SRGB and np.abs(photograph.pixels.astype(int) - pixels).mean() < 3
    found = Image.Exif()
    found.load(photograph.exif)
    assert found[0x0110] == "a telephone" and found.get(0x0112, 1) == 1


@pytest.mark.parametrize("name", ["a.png", "a.tif", "gray.png", "gray.tif"])
def test_sixteen_bits_are_told(tmp_path, name):
    """Guards against a depth that vanishes without a word: the values are right, and a note says it."""
    deep = np.arange(40 * 50 * 3, dtype=np.uint16).reshape(40, 50, 3) * 10
    deep = deep[..., 0] if "gray" in name else deep
    cv2.imwrite(str(tmp_path / name), deep)
    photograph = read_photograph(tmp_path / name)
    expected = np.dstack([deep] * 3) if "gray" in name else deep[..., ::-1]
    assert np.abs(photograph.pixels - expected / 257).max() < 1.01
    assert len(photograph.notes) == 1 and "more than 8 bits a channel" in photograph.notes[0]
    cv2.imwrite(str(tmp_path / name), (deep >> 8).astype(np.uint8))
    assert not read_photograph(tmp_path / name).notes


def test_a_profile_without_a_way_back_is_not_kept(tmp_path):
    """Guards the end of a run: results could not be brought into the space of such a photograph."""
    photograph = read_photograph(save(tmp_path / "a.png", COLOR, scanner_profile()))
    assert photograph.profile is None and "cannot be used" in photograph.notes[0]
    assert np.array_equal(photograph.pixels, COLOR)


def test_the_thumbnail_is_not_kept(tmp_path):
    """Guards privacy: EXIF's little picture still shows what an edit has removed."""
    thumbnail, place = b"\xff\xd8 the thumbnail \xff\xd9", 8 + 2 + 12 + 4
    first = struct.pack("<HHHI4sI", 1, 0x0110, 2, 4, b"cam\0", place)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, place + 30, 0x0202, 4, 1, len(thumbnail), 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + thumbnail
    Image.fromarray(COLOR).save(tmp_path / "a.jpg", exif=exif)
    assert thumbnail in Image.open(tmp_path / "a.jpg").info["exif"], "the file is as meant"
    kept = read_photograph(tmp_path / "a.jpg").exif
    found = Image.Exif()
    found.load(kept)
    assert thumbnail not in kept and found[0x0110] == "cam"
    write_image(tmp_path / "b.jpg", COLOR, exif=None)
