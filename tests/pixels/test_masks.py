"""Masks: files, geometry, the way to the latent grid, and the rules for holes."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from harmony.core.errors import UserError
from harmony.pixels import masks


def disc(side=128, radius=20, center=None):
    y, x = np.mgrid[0:side, 0:side]
    cx, cy = center or (side // 2, side // 2)
    return (x - cx) ** 2 + (y - cy) ** 2 <= radius**2


# --- files


def save(path, values):
    Image.fromarray(values).save(path)
    return path


def test_threshold(tmp_path):
    path = save(tmp_path / "m.png", np.array([[0, 122, 123, 255]], np.uint8))
    assert masks.read_mask(path, (4, 1)).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "L", "RGBA"])
def test_every_mode_gives_the_same_mask(tmp_path, mode):
    Image.fromarray(disc(32, 8).astype(np.uint8) * 255).convert(mode).save(tmp_path / "m.png")
    assert np.array_equal(masks.read_mask(tmp_path / "m.png", (32, 32)), disc(32, 8))


def label_mask(labels, palette):
    """A mask of indices, as PASCAL VOC has them."""
    image = Image.fromarray(labels, mode="P")
    image.putpalette([value for color in palette for value in color])
    return image


VOC = [(0, 0, 0), (128, 0, 0), (0, 64, 0), *[(0, 0, 0)] * 252, (224, 224, 192)]
GRAY = np.array([[0, 122, 123, 255]], np.uint8)
MARKS = {  # a picture of four pixels, and which of them are the object
    "8-bit gray": (Image.fromarray(GRAY), "..xx"),
    "bool": (Image.fromarray(GRAY > 122), "..xx"),
    "16-bit gray": (Image.fromarray(np.array([[257, 122 * 257, 123 * 257, 65535]], np.uint16)), "..xx"),
    "8-bit values in 16 bits": (Image.fromarray(GRAY.astype(np.uint16)), "empty"),
    "gray and alpha": (Image.fromarray(np.array([[[255, 0], [255, 122], [255, 123], [90, 255]]], np.uint8)), "..x."),
    "RGBA": (Image.fromarray(np.dstack([np.full((1, 4, 3), 255, np.uint8), GRAY])), "..xx"),
    "black under alpha": (Image.fromarray(np.dstack([np.zeros((1, 4, 3), np.uint8), GRAY])), "empty"),
    "labels": (label_mask(np.array([[0, 1, 2, 255]], np.uint8), VOC), ".xx."),
    "labels beside void alone": (label_mask(np.array([[0, 255, 255, 255]], np.uint8), VOC), "empty"),
    "labels and a short palette": (label_mask(np.array([[0, 1, 7, 0]], np.uint8), VOC[:2]), ".xx."),
    "labels in gray": (Image.fromarray(np.array([[0, 15, 15, 255]], np.uint8)), "seems to hold labels"),
    "labels in gray RGB": (
        Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).convert("RGB"),
        "seems to hold labels",
    ),
    "labels in a gray palette": (
        label_mask(np.array([[0, 1, 1, 255]], np.uint8), [(v, v, v) for v in range(256)]),
        "seems to hold labels",
    ),
    "gray noise": (Image.fromarray(np.array([[1, 0, 255, 255]], np.uint8)), "..xx"),
    "gray palette": (label_mask(np.array([[0, 122, 123, 255]], np.uint8), [(v, v, v) for v in range(256)]), "..xx"),
    "white first": (label_mask(np.array([[1, 1, 0, 0]], np.uint8), [(255, 255, 255), (0, 0, 0)]), "..xx"),
    "red first": (label_mask(np.array([[1, 1, 0, 0]], np.uint8), [(255, 0, 0), (0, 0, 0)]), "index 0 is not black"),
    "web palette": (Image.fromarray(GRAY).convert("RGB").convert("P"), ".xxx"),
    "RGB": (Image.fromarray(GRAY).convert("RGB"), "..xx"),
    "bright color": (Image.fromarray(np.array([[[0, 0, 0], [0, 0, 0], [0, 255, 0], [255, 255, 0]]], np.uint8)), "..xx"),
    "VOC as RGB": (Image.fromarray(np.array([[VOC[0], VOC[1], VOC[2], VOC[255]]], np.uint8)), "dark colors"),
    "CMYK": (Image.fromarray(GRAY).convert("CMYK"), "..xx"),
    "LAB": (Image.fromarray(np.array([[[0, 0, 0], [127, 0, 0], [140, 0, 0], [255, 0, 0]]], np.uint8), "LAB"), "..xx"),
    "YCbCr": (Image.fromarray(GRAY).convert("RGB").convert("YCbCr"), "..xx"),
    "float": (Image.fromarray(GRAY / np.float32(255)), "no known scale"),
    "32-bit": (Image.fromarray(GRAY.astype(np.int32)), "no known scale"),
}


@pytest.mark.parametrize("name", MARKS)
def test_every_kind_of_mask_is_right_or_refused(tmp_path, name):
    """Guards against holes that are wrong without a word."""
    image, marks = MARKS[name]
    path = tmp_path / "m.tif"
    packed = {"compression": "tiff_lzw"} if image.mode == "YCbCr" else {}  # Pillow 12 cannot read its own raw one
    image.save(path, format="PNG" if image.mode in ("P", "I;16") else "TIFF", **packed)
    if set(marks) <= {".", "x"}:
        assert "".join(".x"[int(v)] for v in masks.read_mask(path, (4, 1))[0]) == marks
    else:
        with pytest.raises(UserError, match=f"m.tif .*{marks}") as error:
            masks.read_mask(path, (4, 1))
        assert "\n" not in str(error.value) and isinstance(error.value, masks.EmptyMaskError) == (marks == "empty")


@pytest.mark.parametrize(
    "image, transparent, marks",
    [
        (Image.fromarray(GRAY), 255, "..x."),
        (Image.fromarray(GRAY > 122), 1, "...."),
        (Image.fromarray(GRAY.astype(np.uint16) * 257), 65535, "..x."),
        (Image.fromarray(GRAY).convert("RGB"), (255, 255, 255), "..x."),
        (label_mask(np.array([[0, 1, 2, 255]], np.uint8), VOC), 2, ".x.."),
    ],
)
def test_a_transparent_value_is_no_object(tmp_path, image, transparent, marks):
    image.save(tmp_path / "m.png", transparency=transparent)
    mask = masks.read_mask(tmp_path / "m.png", (4, 1), empty=True)
    assert "".join(".x"[int(v)] for v in mask[0]) == marks


def test_a_mask_has_its_own_size_where_none_is_asked(tmp_path):
    assert masks.read_mask(save(tmp_path / "m.png", GRAY)).tolist() == [[False, False, True, True]]


def test_another_size_is_refused_with_both_sizes_or_resized_on_request(tmp_path):
    path = save(tmp_path / "m.png", disc(32, 8).astype(np.uint8) * 255)
    with pytest.raises(UserError, match="32 x 32.*64 x 48"):
        masks.read_mask(path, (64, 48))
    mask = masks.read_mask(path, (64, 64), resize=True)
    assert np.array_equal(mask, disc(32, 8).repeat(2, 0).repeat(2, 1))


def test_bad_mask_files(tmp_path):
    with pytest.raises(UserError, match="mask .*absent.png does not exist"):
        masks.read_mask(tmp_path / "absent.png", (4, 4))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="mask .*text.png cannot be decoded"):
        masks.read_mask(tmp_path / "text.png", (4, 4))
    path = save(tmp_path / "empty.png", np.ones((4, 4), np.uint8))
    with pytest.raises(UserError, match="empty.png is empty"):
        masks.read_mask(path, (4, 4))


# --- geometry


def test_dilate_is_a_euclidean_disc():
    point = np.zeros((41, 41), bool)
    point[20, 20] = True
    for radius in (0, 1, 3, 8, 15):
        assert np.array_equal(masks.dilate(point, radius), disc(41, radius))
    assert not masks.dilate(np.zeros((5, 5), bool), 3).any()
    assert masks.dilate(np.ones((5, 5), bool), 3).all()


def test_box_and_its_mask_are_inverse():
    assert masks.bounding_box(masks.box_mask((3, 4, 9, 12), 20, 30)) == (3, 4, 9, 12)
    assert masks.bounding_box(disc(64, 10)) == (22, 22, 43, 43)
    assert masks.box_mask((-5, 2.5, 3.2, 99), 10, 8).sum() == 4 * 6  # outwards to whole pixels, cut at the rim
    with pytest.raises(UserError, match="empty"):
        masks.bounding_box(np.zeros((4, 4), bool))


def test_the_inscribed_radius_is_half_of_the_thickness():
    assert masks.inscribed_radius(masks.box_mask((5, 10, 95, 50), 100, 60)) == 20
    assert abs(masks.inscribed_radius(disc(128, 20)) - 20.5) < 0.6
    assert masks.inscribed_radius(np.ones((30, 50), bool)) == 15, "beyond the picture there is no object"
    ring = disc(128, 50) & ~disc(128, 44)
    assert 3 <= masks.inscribed_radius(ring) <= 4


def test_feather_stays_inside():
    soft = masks.feather(disc(), 8)
    assert (soft[~disc()] == 0).all() and (soft[disc()] > 0).all() and soft[64, 64] == 1
    assert 0 < soft[64, 64 + 18] < soft[64, 64 + 14] < 1
    assert np.array_equal(masks.feather(disc(), 0), disc())
    assert (masks.feather(np.ones((9, 9), bool), 4) == 1).all()  # the image's own border is no rim


# --- latent grid


def test_nearest_takes_every_eighth_pixel():
    mask = torch.from_numpy(np.random.default_rng(0).random((2, 1, 512, 512)) > 0.5).float()
    small = masks.to_latent(mask, 8)
    assert small.shape == (2, 1, 64, 64) and torch.equal(small, mask[..., ::8, ::8])
    for constant in (torch.zeros, torch.ones):
        assert torch.equal(masks.to_latent(constant(1, 1, 64, 64), 4), constant(1, 1, 16, 16))


def test_coverage_is_the_share_of_each_cell():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :2] = 1
    assert masks.coverage(mask, 4).flatten().tolist() == [0.5, 0, 0, 0]


# --- holes


def test_deterministic_rules():
    mask = disc(512, 60)
    assert np.array_equal(masks.hole(mask, "instance"), mask)
    assert np.array_equal(masks.hole(mask, "dilate"), masks.dilate(mask, 16))
    small = disc(64, 10)
    assert np.array_equal(masks.hole(small, "dilate"), masks.dilate(small, 2))  # 16 px at 512


def test_train_rule_mixes_dilations_and_boxes():
    mask, rng = disc(128, 20), np.random.default_rng(0)
    holes = [masks.hole(mask, "train", rng) for _ in range(300)]
    boxes = sum(np.array_equal(hole, masks.box_mask(masks.bounding_box(mask), 128, 128)) for hole in holes)
    assert all((hole | ~mask).all() for hole in holes)
    assert 60 < boxes < 120  # p 0.3
    widest = max(masks.bounding_box(hole)[2] for hole in holes) - masks.bounding_box(mask)[2]
    assert 6 <= widest <= 8  # 32 px at 512


def test_backbone_rule_has_every_kind_of_hole():
    mask, rng = disc(64, 10), np.random.default_rng(0)
    holes = [masks.hole(mask, "backbone", rng) for _ in range(1000)]
    assert all(hole.any() and hole.dtype == bool and hole.shape == mask.shape for hole in holes)
    full = sum(hole.all() for hole in holes)
    exact = sum(np.array_equal(hole, mask) for hole in holes)
    elsewhere = sum(not (hole | ~mask).all() for hole in holes)
    assert 160 < full < 240 and 150 <= exact < 260 and 100 < elsewhere < 160
    assert np.isclose(sum(masks.BACKBONE_MIX.values()), 1)


def test_same_seed_same_hole():
    first, second = (masks.hole(disc(), "backbone", np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, second)


def test_unknown_rule_is_named():
    with pytest.raises(UserError, match="'bigger'.*instance, dilate, train, backbone"):
        masks.hole(disc(), "bigger")


def test_a_shadow_lies_around_the_lower_third():
    """Guards ``shadow_region``: beside and below the object's foot, nothing at its head, nothing farther than asked."""
    mask = np.zeros((60, 60), bool)
    mask[10:40, 20:30] = True
    region = masks.shadow_region(mask, 6)
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    assert (rows.min(), rows.max()) == (24, 45) and (columns.min(), columns.max()) == (14, 35)
    one_row = np.zeros((3, 9), bool)
    one_row[1] = True
    assert masks.shadow_region(one_row, 3).all(), "an object of one row is its own foot"
    assert not masks.shadow_region(mask[:40], 6).any(), "an object that the lower edge cuts off has no foot"


@pytest.mark.parametrize("shape", [(40, 60), (7, 5)])
def test_a_shape_moves_within_the_picture(shape):
    """Guards ``move_mask``: the same shape, whole, at half its size at least, anywhere; never empty."""
    mask = np.zeros(shape, bool)
    mask[1:5, 1:4] = True
    mask[1, 1] = False
    shapes = [masks.move_mask(mask, np.random.default_rng(seed)) for seed in range(200)]
    boxes = np.array([masks.bounding_box(m) for m in shapes])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 1 and (sides <= (3, 4)).all() and (sides == (3, 4)).all(1).any()
    assert boxes[:, :2].min() == 0 and (boxes[:, 2:].max(0) == (shape[1], shape[0])).all()
    assert all(m.shape == shape and m.dtype == bool for m in shapes)
    whole = [m[y0:y1, x0:x1] for m, (x0, y0, x1, y1) in zip(shapes, boxes, strict=True) if (x1 - x0, y1 - y0) == (3, 4)]
    assert all(np.array_equal(m, mask[1:5, 1:4]) for m in whole)


def test_what_was_changed_is_told_from_what_jpeg_does():
    """Guards pairs without masks: a change of light is found, with what stays dark inside; JPEG's errors are not."""
    rng, mask = np.random.default_rng(0), np.zeros((256, 256), bool)
    mask[60:180, 80:200] = True
    photograph = np.repeat(np.clip(rng.normal(120, 20, (256, 256, 1)), 0, 255).astype(np.uint8), 3, axis=2)
    photograph[95:145, 115:165] = 0
    composite = np.where(mask[..., None], (0.7 * photograph).astype(np.uint8), photograph)
    for picture, truth in ((photograph, ~mask & mask), (composite, mask)):
        file = BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=75)
        change = masks.find_change(np.asarray(Image.open(file)), photograph)
        assert (change & truth).sum() >= 0.9 * (change | truth).sum()
