"""Harmonization of whole photographs: geometry, the untouched background, what the model may see."""

import numpy as np
import pytest
import torch

from harmony.core.errors import UserError
from harmony.methods.inpainting import Branch, Inpainting, load_branch
from harmony.methods.insert import Detailed, cut, find_shadow_region, insert
from harmony.methods.method import Composite, make_seeds
from harmony.models.backbone import Backbone
from harmony.models.controlnet import export_controlnet
from harmony.pixels.images import to_model
from harmony.pixels.masks import dilate, to_latent
from harmony.sampling.guidance import Settings

FAST = Settings(steps=2, guidance=2.0)
WEIGHTS = {"color": 0.7, "structure": 0.3, "raw": 0.7}


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def color(backbone, awake):
    return Branch("color", awake(backbone, 1), 1.0, {"blur": 1.25, "normalize": True})  # it darkens the surroundings


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rectangle(width: int, height: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def harmonize(backbone, background, foreground, mask, prompt, branches, settings=FAST, region=None, feather=0, seed=0):
    """One insertion by words and ControlNets."""
    insertion = cut(backbone.resolution, background, foreground, mask, region, caption=prompt)
    return insert(Inpainting(backbone, branches, settings), [insertion], seed, feather)[0]


SCENES = {  # width, height, box of the object
    "portrait": (37, 61, (9, 20, 25, 41)),
    "landscape": (101, 43, (60, 11, 83, 30)),
    "native": (32, 32, (10, 10, 20, 20)),
    "smaller than the backbone": (19, 17, (5, 4, 12, 11)),
    "touches the border": (53, 47, (0, 20, 12, 47)),
    "in the corner": (53, 47, (40, 30, 53, 47)),
    "as wide as the picture": (90, 40, (0, 10, 90, 30)),
    "all but a border of one pixel": (41, 33, (1, 1, 40, 32)),
    "a border of one pixel at the right": (41, 33, (0, 0, 40, 33)),
    "everything": (40, 30, (0, 0, 40, 30)),
    "far larger than the backbone": (300, 200, (100, 50, 171, 133)),
}


@pytest.mark.parametrize("name", SCENES)
def test_outside_the_hole_nothing_changes(backbone, color, name):
    width, height, box = SCENES[name]
    background, foreground = picture(width, height), picture(width, height, 1)
    mask = rectangle(width, height, *box)
    result = harmonize(backbone, background, foreground, mask, "a red mushroom", [color], FAST)
    assert result.image.shape == background.shape and result.image.dtype == np.uint8
    assert result.output.shape == (32, 32, 3)
    assert np.array_equal(result.image[~result.hole], background[~result.hole])
    assert np.array_equal(result.composite, np.where(mask[..., None], foreground, background))
    assert (result.hole & mask).sum() == mask.sum()  # M_e contains M
    x0, y0, x1, y1 = result.crop.clip(width, height)
    rim = dilate(mask, int(np.ceil(result.crop.side / 32)))  # 16 px at 512
    assert np.array_equal(result.hole, rim & rectangle(width, height, x0, y0, x1, y1))
    assert (result.image != background)[mask].mean() > 0.5
    x0, y0, x1, y1 = box
    assert result.crop.x0 <= x0 and result.crop.y0 <= y0
    assert x1 <= result.crop.x0 + result.crop.side and y1 <= result.crop.y0 + result.crop.side


def test_seed_decides(backbone, color):
    inputs = (backbone, picture(45, 37), picture(45, 37, 1), rectangle(45, 37, 10, 10, 30, 30), "a blue car", [color])
    first, again, other = (harmonize(*inputs, FAST, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.output, again.output)
    assert not np.array_equal(first.output, other.output)


def test_region_and_feather(backbone, color):
    background, foreground = picture(64, 48), picture(64, 48, 1)
    mask, region = rectangle(64, 48, 20, 10, 40, 30), rectangle(64, 48, 10, 30, 45, 44)
    inputs = (backbone, background, foreground, mask, "a blue car", [color], FAST)
    result = harmonize(*inputs, region=region)
    assert result.hole[region].all()
    assert (result.image != background)[region & ~mask].mean() > 0.1
    assert np.array_equal(result.image[~result.hole], background[~result.hole])
    soft = harmonize(*inputs, feather=6)
    hard = harmonize(*inputs)
    assert np.array_equal(soft.image[~soft.hole], background[~soft.hole])
    near, far = (np.abs(v.image.astype(int) - background)[v.hole].mean() for v in (soft, hard))
    assert near < far


def test_the_model_sees_the_instance_but_not_what_the_hole_covers(backbone, color):
    background, foreground, mask = picture(32, 32), picture(32, 32, 1), rectangle(32, 32, 6, 6, 26, 26)

    def raw(background, foreground, branches):
        return harmonize(backbone, background, foreground, mask, "a blue car", branches, FAST).output

    before = raw(background, foreground, [color])
    covered = np.where(mask[..., None], 255 - background, background)
    assert np.array_equal(raw(covered, foreground, [color]), before)
    other = np.where(mask[..., None], 255 - foreground, foreground)
    assert not np.array_equal(raw(background, other, [color]), before)
    assert np.array_equal(raw(background, other, []), raw(background, foreground, []))  # only the hints carry it
    outside = np.where(mask[..., None], foreground, 255 - foreground)
    assert np.array_equal(raw(background, outside, [color]), before)


def test_the_hole_is_mid_grey_for_the_model(backbone, monkeypatch):
    """Guards the masked image: 0 in [-1, 1] under the hole, not black, and the picture itself elsewhere."""
    seen, moments = [], Backbone.moments
    monkeypatch.setattr(Backbone, "moments", lambda self, x: (seen.append(x), moments(self, x))[1])
    image, mask = picture(32, 32), rectangle(32, 32, 8, 8, 20, 20)
    Inpainting(backbone, [], FAST).fill([Composite(image, image, mask, mask, "x")], [(0, 0)])
    (x,) = seen
    assert (x[0][:, mask] == 0).all() and torch.allclose(x[0][:, ~mask], to_model(image)[:, ~mask])


def test_weights_fade_a_branch_out(backbone, color):
    inputs = (backbone, picture(32, 32), picture(32, 32, 1), rectangle(32, 32, 6, 6, 26, 26), "a blue car")
    plain = harmonize(*inputs, [], FAST).output
    assert np.array_equal(harmonize(*inputs, [Branch("color", color.net, 0.0)], FAST).output, plain)
    assert not np.array_equal(harmonize(*inputs, [color], FAST).output, plain)


def test_an_image_does_not_depend_on_its_neighbours(backbone, color):
    images = [picture(32, 32, seed) for seed in range(3)]
    masks = [rectangle(32, 32, 8, 8, 20 + i, 22) for i in range(3)]
    holes, prompts = [dilate(m, 1) for m in masks], ["a red mushroom", "a blue car", "snow"]

    composites = [Composite(x, x, *rest) for x, *rest in zip(images, masks, holes, prompts, strict=True)]

    def run(order, batch):
        method = Inpainting(backbone, [color], Settings(2, 2.0, batch=batch))
        return dict(zip(order, method.fill([composites[i] for i in order], make_seeds(0, order)), strict=True))

    together, alone = run([0, 1, 2], 16), run([2, 0, 1], 1)
    for i in range(3):
        assert np.abs(together[i].astype(int) - alone[i]).max() <= 1  # rounding of batched products, no more
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask": np.zeros((40, 50), bool)}, "mask is empty"),
        ({"mask": np.ones((41, 50), bool)}, "mask is 50 x 41 but the background is 50 x 40"),
        ({"foreground": picture(51, 40)}, "foreground is 51 x 40 .* box="),
        ({"region": np.ones((4, 5), bool)}, "region is 5 x 4"),
    ],
)
def test_what_does_not_fit_is_said(backbone, change, words):
    inputs = {"background": picture(50, 40), "foreground": picture(50, 40), "mask": rectangle(50, 40, 9, 9, 20, 20)}
    with pytest.raises(UserError, match=words):
        harmonize(backbone, prompt="", branches=[], settings=FAST, **inputs | change)


BARS = {  # thickness of a bar of 400 px, side of its square, the rim
    200: (480, 15),  # ceil of 16 px at 512
    32: (480, 15),
    30: (480, 15),
    20: (480, 10),
    8: (480, 4),
    6: (480, 4),  # a quarter of the usual one
}


@pytest.mark.parametrize("thickness", BARS)
def test_the_rim_is_no_thicker_than_the_object(thickness):
    """Guards against holes many times as large as a thin object; the others are those of ever."""
    side, rim = BARS[thickness]
    background, mask = picture(480, 480), rectangle(480, 480, 40, 100, 440, 100 + thickness)
    insertion = cut(256, background, background, mask)
    assert insertion.crop.side == side and np.array_equal(insertion.hole, dilate(mask, rim))
    assert cut(256, background, background, mask, radius=0).hole.sum() == mask.sum()


def test_a_thin_object_of_two_pixels_keeps_a_hole_in_the_latents():
    for top in range(200, 232):  # wherever it lies among the latents
        mask = rectangle(480, 480, 40, top, 440, top + 2)
        hole = cut(480, picture(480, 480), picture(480, 480), mask).square.hole
        assert to_latent(torch.from_numpy(hole)[None, None].float(), 8).any()


def test_an_object_that_vanishes_is_said(backbone):
    thin = rectangle(400, 400, 201, 0, 202, 400)  # one column in 400 falls between the backbone's 32
    with pytest.raises(UserError, match="too small: 0.2 px thick at the backbone's 32 px; .* larger backbone"):
        harmonize(backbone, picture(400, 400), picture(400, 400), thin, "", [], FAST)


def test_nan_is_not_painted(backbone, awake):
    net = awake(backbone)
    torch.nn.init.constant_(net.controlnet_mid_block.bias, float("nan"))
    inputs = (backbone, picture(32, 32), picture(32, 32), rectangle(32, 32, 9, 9, 20, 20), "")
    with pytest.raises(UserError, match="NaN"):
        harmonize(*inputs, [Branch("color", net)], FAST)


def test_a_branch_is_loaded_with_its_operator_and_weight(backbone, color, tmp_path):
    export_controlnet(color.net, tmp_path, "structure", {"low": 50, "high": 90, "edge_source": "masked"}, backbone)
    branch = load_branch(str(tmp_path), backbone, WEIGHTS, operator="color")  # hint.json wins
    backbone = Backbone(backbone.path)
    assert (branch.name, branch.weight, branch.parameters["low"]) == ("structure", 0.3, 50)
    (tmp_path / "controlnet" / "hint.json").unlink()
    branch = load_branch(str(tmp_path), backbone, WEIGHTS, operator="color")
    assert (branch.name, branch.weight, branch.parameters) == ("color", 0.7, None)
    with pytest.raises(UserError, match="branch=color|structure|raw"):
        load_branch(str(tmp_path), backbone, WEIGHTS)
    assert load_branch(str(tmp_path), backbone, operator="color").net is branch.net, "loaded once"


def test_a_controlnet_of_another_backbone_is_refused(backbone, color, tmp_path):
    export_controlnet(color.net, tmp_path, "color", {}, backbone)
    other = Backbone(backbone.path)
    other.unet.register_to_config(cross_attention_dim=64)
    with pytest.raises(UserError, match="does not fit backbone"):
        load_branch(str(tmp_path), other, WEIGHTS)


def test_a_larger_photograph_keeps_its_detail(backbone, color):
    """Guards detail=: the light alone comes from the method where the square is larger than it, as asked elsewhere."""
    method = Inpainting(backbone, [color], FAST)
    background, foreground = picture(150, 120), picture(150, 120, 1)
    mask = rectangle(150, 120, 50, 40, 90, 80)
    large = cut(backbone.resolution, background, foreground, mask, caption="a car")
    (auto,), (full,), (none,) = (insert(method, [large], detail=detail) for detail in ("auto", "full", "none"))
    assert np.array_equal(auto.image, full.image) and not np.array_equal(auto.image, none.image)
    assert np.array_equal(auto.image[~mask], background[~mask]), "the rim of the hole stays"
    gray, truth = (image[mask].astype(float).mean(1) for image in (auto.image, foreground))
    assert np.corrcoef(gray, truth)[0, 1] > 0.9 and not np.array_equal(auto.image[mask], foreground[mask])
    small = cut(backbone.resolution, picture(20, 20), picture(20, 20, 1), rectangle(20, 20, 6, 6, 14, 14), caption="x")
    (auto,), (none,) = (insert(method, [small], detail=detail) for detail in ("auto", "none"))
    assert np.array_equal(auto.image, none.image)
    together = insert(method, [large, small])
    assert np.array_equal(together[0].image, full.image) and np.array_equal(together[1].image, none.image)


def test_what_is_painted_anew_has_no_light_to_take(backbone):
    words = Inpainting(backbone, [], FAST)
    insertion = cut(backbone.resolution, picture(90, 90), picture(90, 90, 1), rectangle(90, 90, 30, 30, 60, 60))
    assert np.array_equal(insert(words, [insertion])[0].image, insert(words, [insertion], detail="none")[0].image)
    for refuse in (lambda: insert(words, [insertion], detail="full"), lambda: Detailed(words)):
        with pytest.raises(UserError, match="paints the object anew"):
            refuse()


def test_a_comparison_at_the_backbones_size_keeps_detail_too(backbone, color):
    """Guards ``Detailed``: the composite outside the hole, its own detail inside, another fingerprint."""
    method = Inpainting(backbone, [color], FAST)
    background, instance = picture(32, 32), picture(32, 32, 1)
    mask = rectangle(32, 32, 10, 10, 22, 22)
    composite = Composite(background, instance, mask, dilate(mask, 3), "a car")
    (image,) = Detailed(method).fill([composite], [(0, 0)])
    assert np.array_equal(image[~composite.hole], background[~composite.hole])
    gray, truth = (picture_[mask].astype(float).mean(1) for picture_ in (image, instance))
    assert np.corrcoef(gray, truth)[0, 1] > 0.9
    assert Detailed(method).fingerprint != method.fingerprint


def test_a_shadow_darkens_and_fades(backbone, color):
    """Guards ``region``: beside the object the photograph keeps its detail, nothing gets brighter, and at the rim of
    the region nothing changes.
    """
    method = Inpainting(backbone, [color], FAST)
    background, foreground = picture(150, 120), picture(150, 120, 1)
    mask = rectangle(150, 120, 50, 40, 90, 80)
    region = find_shadow_region(mask)
    insertion = cut(backbone.resolution, background, foreground, mask, region, caption="a car")
    image = insert(method, [insertion])[0].image.astype(int)
    rest = region & ~mask
    assert (image[rest] <= background[rest]).all() and (image[rest] < background[rest]).any()
    rim = rest & dilate(~(region | mask), 1)
    assert np.abs(image - background)[rim].mean() < 0.5 * np.abs(image - background)[rest].mean()
    alone = insert(method, [cut(backbone.resolution, background, foreground, mask, caption="a car")])[0].image
    assert np.array_equal(alone[rest], background[rest])
