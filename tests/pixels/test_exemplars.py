"""What Paint by Example (Yang 2022) sees of a picture."""

import numpy as np
import pytest

from harmony.pixels.exemplars import (
    CURVE,
    augment,
    bezier,
    control_points,
    cut_out,
    draw_crop,
    draw_hole,
    draw_shape_mask,
    exemplar,
    extend_box,
)
from harmony.pixels.masks import box_mask, dilate


class Largest:
    """Stands for a random generator that always draws the largest number."""

    def integers(self, low, high=None, size=None):
        return (low if high is None else high) - 1


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def boxes(count: int, width: int, height: int):
    draw = rng(7)
    for _ in range(count):
        x0, y0 = draw.integers(0, width - 8), draw.integers(0, height - 8)
        yield int(x0), int(y0), int(draw.integers(x0 + 4, width + 1)), int(draw.integers(y0 + 4, height + 1))


def test_extended_box_moves_each_side_by_at_most_two_fifths_of_its_space():
    """Guards the extension: a side with 57 px to the border moves by 0 to 22 px, one at the border not at all."""
    assert extend_box((57, 0, 100, 80), 160, 80, Largest()) == (57 - 22, 0, 124, 80)
    for i, box in enumerate(boxes(200, 160, 120)):
        x0, y0, x1, y1 = extend_box(box, 160, 120, rng(i))
        assert 0 <= x0 <= box[0] and 0 <= y0 <= box[1] and box[2] <= x1 <= 160 and box[3] <= y1 <= 120
        moved = np.array([box[0] - x0, box[1] - y0, x1 - box[2], y1 - box[3]])
        assert (moved <= 0.4 * np.array([box[0], box[1], 160 - box[2], 120 - box[3]])).all()
    lefts = {extend_box((57, 0, 100, 80), 160, 80, rng(i))[0] for i in range(400)}
    assert lefts == set(range(35, 58))


def test_curves_of_a_box():
    """Guards the curves: control polygon and points of the top curve; the bulge is half of the extension."""
    top, right, bottom, left = control_points((10, 10, 110, 60), (0, 0, 130, 80))
    assert top.tolist() == [[10, 10], [60, 0], [110, 10]]
    assert right.tolist() == [[110, 10], [130, 35], [110, 60]]
    assert bottom[1].tolist() == [60, 80] and left[1].tolist() == [0, 35]
    assert np.allclose(bezier(top, np.array([0.05, 0.5, 0.9])), [[15, 9.05], [60, 5], [100, 8.2]])
    assert len(CURVE) == 18 and CURVE[0] == 0.05 and CURVE[-1] == 0.9


def test_shapes_stay_near_the_extended_box():
    """Guards the shapes: inside the extended box grown by the jitter, with the center; the box itself without both."""
    for i, box in enumerate(boxes(100, 512, 400)):
        if min(box[2] - box[0], box[3] - box[1]) < 40:
            continue
        extended = extend_box(box, 512, 400, rng(i))
        mask = draw_shape_mask(box, extended, 512, 400, rng(i))
        assert not (mask & ~dilate(box_mask(extended, 512, 400), 8)).any(), "5 px along each axis: 7.1 over the corner"
        assert mask[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2]
    plain = draw_shape_mask((40, 40, 240, 140), (40, 40, 240, 140), 512, 400, rng(), jitter=0)
    box = box_mask((40, 40, 240, 140), 512, 400)
    assert (plain & box).sum() > 0.97 * box.sum() and not (plain & ~dilate(box, 1)).any()


def test_half_of_the_masks_are_shapes():
    """Guards the share of arbitrary shapes, and that the others are the extended box."""
    box, extended = (40, 40, 90, 90), (30, 30, 100, 100)
    whole = box_mask(extended, 128, 128)
    masks = [draw_hole(box, extended, 128, 128, rng(i)) for i in range(400)]
    shaped = sum((mask != whole).any() for mask in masks)
    assert 160 < shaped < 240
    assert all((draw_hole(box, extended, 128, 128, rng(i), shape_share=0) == whole).all() for i in range(20))


def test_crop_of_a_wide_picture():
    """Guards the crop: the largest left edge is 160, and the shrink at most 60 % of the smallest margin there."""
    crop = draw_crop((200, 100, 400, 300), 640, 480, Largest())
    shrink = int(0.6 * min(200 - 160, 160 + 480 - 400, 100, 180))
    assert (crop.x0, crop.y0, crop.side) == (160 + shrink, shrink, 480 - 2 * shrink)

    class Left(Largest):
        calls = 0

        def integers(self, low, high=None):
            self.calls += 1
            return 100 if self.calls == 1 else super().integers(low, high)

    crop = draw_crop((200, 100, 400, 300), 640, 480, Left())
    assert (crop.x0, crop.y0, crop.side) == (160, 60, 360)


@pytest.mark.parametrize("size", [(160, 120), (120, 160), (300, 90)])
def test_the_crop_holds_the_extended_box(size):
    """Guards the crop in landscape and portrait: a square inside the picture, or None where no square holds it."""
    width, height = size
    crops = 0
    for i, box in enumerate(boxes(200, width, height)):
        crop = draw_crop(box, width, height, rng(i))
        if crop is None:  # longer than the short side, or at an end of the long one
            long = 0 if width > height else 1
            ends = box[long] == 0 or box[long + 2] == max(width, height)
            assert ends or box[long + 2] - box[long] >= min(width, height) - 1
            continue
        crops += 1
        assert crop.x0 <= box[0] and crop.y0 <= box[1]
        assert box[2] <= crop.x0 + crop.side and box[3] <= crop.y0 + crop.side
        assert crop.clip(width, height) == (crop.x0, crop.y0, crop.x0 + crop.side, crop.y0 + crop.side)
    assert crops > 60
    assert draw_crop((3, 3, 9, 9), 64, 64, rng()) is None, "a square picture is not cropped"


def test_the_exemplar_is_the_padded_box():
    """Guards the padding: at most 10 px at 512 around the box, clipped at the border, deterministic."""
    image = rng().integers(0, 256, (512, 512, 3), dtype=np.uint8)
    mask = box_mask((100, 50, 230, 200), 512, 512)
    part = cut_out(image, mask)
    assert (part == image[40:210, 90:240]).all() and exemplar(part).shape == (224, 224, 3)
    assert (cut_out(image, mask, pad=0) == image[50:200, 100:230]).all()
    corner = cut_out(image, box_mask((0, 0, 140, 140), 512, 512))
    assert (corner == image[:150, :150]).all() and (exemplar(corner, 150) == corner).all()


def test_the_augmentation_varies_and_repeats():
    """Guards the share of pictures left alone or only mirrored, and that the same draw gives the same picture."""
    image = rng().integers(0, 256, (224, 224, 3), dtype=np.uint8)
    views = [augment(image, rng(i)) for i in range(400)]
    same = sum((v == image).all() for v in views) / 400
    mirrored = sum((v == image[:, ::-1]).all() for v in views) / 400
    for share in (same, mirrored):
        assert abs(share - 0.5 * 0.5 * 0.7 * 0.7) < 0.05
    assert all((augment(image, rng(i)) == views[i]).all() for i in range(20))
    assert all(v.shape == image.shape and v.dtype == np.uint8 for v in views)
