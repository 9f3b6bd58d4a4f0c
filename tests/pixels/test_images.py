"""Images: files good and bad, square crops and their way back, value ranges, grids."""

import os
import struct
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from harmony.core.errors import UserError
from harmony.pixels import images
from harmony.pixels.images import Crop


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1).astype(np.uint8)


# --- files


def test_png_round_trip_is_exact_and_leaves_nothing_else(tmp_path):
    picture = noise(7, 9)
    images.write_image(tmp_path / "a.png", picture)
    assert np.array_equal(images.read_image(tmp_path / "a.png"), picture)
    assert os.listdir(tmp_path) == ["a.png"]


def test_jpeg_is_close(tmp_path):
    images.write_image(tmp_path / "a.jpg", smooth(32, 48))
    assert np.abs(images.read_image(tmp_path / "a.jpg").astype(int) - smooth(32, 48)).max() < 12


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images.write_image(path, noise(4, 4))
    before = path.read_bytes()

    def full_disk(self, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="disk full"):
        images.write_image(path, noise(4, 4, seed=1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_exif_orientation_is_applied(tmp_path):
    picture = smooth(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(images.read_image(tmp_path / "a.png"), np.rot90(picture, -1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(smooth(5, 6)).convert(mode).save(path)
    read = images.read_image(path)
    assert read.shape == (5, 6, 3) and read.dtype == np.uint8


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 128, 255]


def truncated(path):
    images.write_image(path, noise(64, 64))
    path.write_bytes(path.read_bytes()[:2000])


def not_a_number(path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.write_text("no picture"), "cannot be decoded"),
        (lambda path: path.mkdir(), "cannot be decoded"),
        (truncated, "cannot be decoded"),
        (not_a_number, "floating-point"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_bad_files_are_named_in_one_line(tmp_path, spoil, reason, suffix):
    path = tmp_path / f"bad.{suffix}"
    spoil(path)
    with pytest.raises(UserError, match=reason) as caught:
        images.read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"])
def test_the_formats_of_photographs_are_read(tmp_path, suffix):
    path = tmp_path / "a"  # the bytes decide, not the name
    Image.fromarray(smooth(32, 48)).save(path, format=suffix)
    assert np.abs(images.read_image(path).astype(int) - smooth(32, 48)).mean() < 12


@pytest.mark.parametrize("suffix", ["EPS", "PPM", "PCX", "ICNS", "PDF"])
def test_other_formats_never_reach_their_decoder(tmp_path, suffix):
    """Guards against Pillow's rare decoders; that of EPS would run Ghostscript on a foreign file."""
    path = tmp_path / "a.png"
    Image.fromarray(smooth(32, 32)).save(path, format=suffix)
    with pytest.raises(UserError, match="cannot be decoded .it is none of JPEG.*; save it as PNG or JPEG"):
        images.read_image(path)


@pytest.mark.parametrize("read", [images.read_image, images.sha256])
@pytest.mark.parametrize("kind", ["a pipe or device", "a folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, read, kind):
    path = tmp_path / "a.png"
    path.mkdir() if kind == "a folder" else os.mkfifo(path)
    with pytest.raises(UserError, match=f"a.png is {kind}"):
        read(path)
    with pytest.raises(UserError, match="/dev/zero is a pipe or device"):
        read("/dev/zero")


def test_a_path_that_can_be_none_is_one_line(tmp_path):
    for path, reason in (("a\0b.png", "cannot be opened"), ("a" * 5000, "cannot be opened"), ("", "does not exist")):
        with pytest.raises(UserError, match=reason):
            images.read_image(path)


def test_every_error_of_the_decoder_is_one_line(tmp_path, monkeypatch):
    images.write_image(tmp_path / "a.png", noise(4, 4))
    for error in (KeyError(7), IndexError(), ZeroDivisionError("a\nb"), struct.error("unpack requires 4 bytes")):
        monkeypatch.setattr(images.ImageOps, "exif_transpose", Mock(side_effect=error))
        with pytest.raises(UserError, match=r"a.png cannot be decoded \(.+\); replace"):
            images.read_image(tmp_path / "a.png")


def test_lab_becomes_rgb(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((4, 4, 3), (136, 0, 0), np.uint8), mode="LAB").save(path)  # L* = 53 of 100
    assert np.abs(images.read_image(path).astype(int) - 127).max() <= 1


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match="webp"):
        images.write_image(tmp_path / "a.webp", noise(4, 4))


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert images.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
    with pytest.raises(UserError, match="does not exist"):
        images.sha256(tmp_path / "b")


# --- square crops


def test_square_golden_values():
    assert images.square_around((200, 100, 400, 300), 640, 480) == Crop(60, 0, 480)  # center 300
    assert images.square_around((0, 0, 40, 40), 640, 480) == Crop(0, 0, 480)  # pushed inside
    assert images.square_around((10.2, 0, 599.5, 50), 640, 480) == Crop(10, -55, 590)  # overhangs equally
    assert images.square_around((100, 100, 200, 150), 640, 480, context=2) == Crop(50, 25, 200)


@pytest.mark.parametrize("context", [None, 0.5, 1, 1.7, 50])
def test_square_always_holds_the_box(context):
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = rng.integers(1, 60, 2)
        x0, y0 = rng.uniform(0, width), rng.uniform(0, height)
        box = (x0, y0, rng.uniform(x0 + 1e-3, width + 1e-3), rng.uniform(y0 + 1e-3, height + 1e-3))
        crop = images.square_around(box, width, height, context)
        right, bottom = min(box[2], width), min(box[3], height)
        assert crop.x0 <= box[0] and crop.y0 <= box[1]
        assert crop.x0 + crop.side >= right and crop.y0 + crop.side >= bottom
        if crop.side <= min(width, height):
            assert crop.clip(width, height) == (crop.x0, crop.y0, crop.x0 + crop.side, crop.y0 + crop.side)


def test_box_outside_is_refused():
    with pytest.raises(UserError, match="outside"):
        images.square_around((70, 0, 80, 10), 60, 60)
    with pytest.raises(UserError, match="outside"):
        images.square_around((10, 10, 10, 20), 60, 60)


@pytest.mark.parametrize("crop", [Crop(3, 5, 20), Crop(-4, -6, 50), Crop(-60, -3, 90)])
def test_paste_crop_undoes_crop_resize(crop):
    picture = noise(40, 30)
    patch = images.crop_resize(picture, crop, crop.side)
    assert np.array_equal(images.paste_crop(picture, patch, crop), picture)
    marked = images.paste_crop(picture, np.full_like(patch, 7), crop)
    x0, y0, x1, y1 = crop.clip(30, 40)
    outside = np.ones((40, 30), bool)
    outside[y0:y1, x0:x1] = False
    assert (marked[y0:y1, x0:x1] == 7).all() and np.array_equal(marked[outside], picture[outside])


def test_overhang_is_reflected_in_images_and_empty_in_masks():
    picture = noise(20, 20)
    patch = images.crop_resize(picture, Crop(-3, 0, 26), 26)
    assert np.array_equal(patch[:20, :3], picture[:, 3:0:-1])
    wide = images.crop_resize(picture, Crop(-30, 0, 60), 60)
    assert np.array_equal(wide[:20, :30], np.repeat(picture[:, :1], 30, axis=1))
    mask = images.crop_resize(np.ones((20, 20), bool), Crop(-3, 0, 26), 26)
    assert mask.dtype == bool and mask[:20, 3:23].all() and mask.sum() == 400


def test_resizing_keeps_means_and_range():
    picture = smooth(64, 64)
    for side in (16, 48, 96, 200):
        patch = images.crop_resize(picture, Crop(0, 0, 64), side)
        assert patch.shape == (side, side, 3) and patch.dtype == np.uint8
        assert np.abs(patch.mean((0, 1)) - picture.mean((0, 1))).max() < 1
    assert np.array_equal(  # area interpolation: a 2 x 2 block becomes its mean
        images.crop_resize(np.tile(np.array([[0, 200]], np.uint8), (4, 2)), Crop(0, 0, 4), 2), np.full((2, 2), 100)
    )


# --- value ranges


def test_ranges_and_exact_round_trip():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    model = images.to_model(every)
    assert model.shape == (3, 16, 16) and model.min() == -1 and model.max() == 1
    assert np.array_equal(images.from_model(model), every)
    hint = images.to_hint(every)
    assert hint.min() == 0 and hint.max() == 1
    batch = np.stack([noise(4, 6), noise(4, 6, 1)])
    assert images.to_model(batch).shape == (2, 3, 4, 6)
    assert np.array_equal(images.from_model(images.to_model(batch).to(torch.float64)), batch)


def test_from_model_clamps_and_refuses_nan():
    assert images.from_model(torch.full((3, 1, 1), 5.0)).max() == 255
    assert images.from_model(torch.full((3, 1, 1), -5.0)).min() == 0
    with pytest.raises(UserError, match="NaN"):
        images.from_model(torch.full((3, 1, 1), float("nan")))


# --- grids


def test_grid_places_cells_and_titles():
    cells = [[np.full((64, 64, 3), 10 * (3 * i + j), np.uint8) for j in range(3)] for i in range(2)]
    plain = images.grid(cells)
    assert plain.shape == (2 * 130 + 2, 3 * 130 + 2, 3)
    assert (plain[2:130, 132:260] == 10).all() and (plain[132:260, 262:390] == 50).all()
    titled = images.grid(cells, ["input", "a title that is far too long for its column", "output"])
    strip = titled[: titled.shape[0] - plain.shape[0]]
    assert np.array_equal(titled[len(strip) :], plain)
    assert (strip < 128).any() and (strip[:, :2] == 255).all() and (strip[:, 130:132] == 255).all()


def test_heic_without_its_library_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images.list_formats.cache_clear()
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match="HEIF needs pillow-heif.*pip install pillow-heif, or"):
        images.read_image(tmp_path / "a.heic")
    images.list_formats.cache_clear()
