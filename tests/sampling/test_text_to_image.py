"""Text to image on a backbone that was made for inpainting, and on one that was not."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from harmony.models.backbone import Backbone
from harmony.sampling.guidance import Settings
from harmony.sampling.text_to_image import full_hole_condition, text_to_image

PROMPTS = ["a red mushroom on snow", "a blue car on grass", "a red car on snow"]
SETTINGS = Settings(steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


def pictures(
    backbone: Backbone, prompts: list[str], indices: list[int], settings=SETTINGS, seed: int = 5
) -> np.ndarray:
    """B x R x R x 3, in integers that can be subtracted."""
    seeds = [(seed, i) for i in indices]
    return np.stack(text_to_image(backbone, backbone.prompt(prompts), settings, seeds)).astype(int)


def test_a_picture_depends_on_seed_index_and_prompt(backbone):
    """Guards reproducibility: neither the batch nor its order matters; seed, index, prompt and guidance do."""
    several = pictures(backbone, PROMPTS, [4, 5, 6])
    assert several.shape == (3, 32, 32, 3) and several.min() >= 0 and several.max() <= 255
    assert np.array_equal(several, pictures(backbone, PROMPTS, [4, 5, 6]))
    (alone,) = pictures(backbone, PROMPTS[2:], [6])
    assert np.abs(several[2] - alone).max() <= 1, "a level of rounding for another batch"
    others = [
        pictures(backbone, PROMPTS[2:], [4]),
        pictures(backbone, PROMPTS[:1], [6]),
        pictures(backbone, PROMPTS[2:], [6], seed=6),
        pictures(backbone, PROMPTS[2:], [6], Settings(steps=3, guidance=9.0)),
    ]
    assert all(np.abs(other[0] - alone).max() > 5 for other in others)


def test_a_backbone_without_a_mask(backbone):
    """Guards plain text-to-image UNets, as of Stable Diffusion 1.4: nothing is known, no channels; they sample too."""
    torch.manual_seed(0)
    config = {**backbone.unet.config, "in_channels": backbone.channels}
    plain = backbone.with_unet(UNet2DConditionModel.from_config(config).requires_grad_(False).eval())
    assert full_hole_condition(plain).shape == (1, 0, 8, 8) and full_hole_condition(plain, 3).shape == (3, 0, 8, 8)
    asked = []
    plain.unet.conv_in.register_forward_pre_hook(lambda module, args: asked.append(args[0].shape))
    first, second = pictures(plain, PROMPTS[:1] * 2, [0, 1])
    assert asked == [(4, 4, 8, 8)] * 3, "four channels, both halves of the guidance in one call"
    assert first.shape == (32, 32, 3) and (first != second).any()


def test_an_inpainting_backbone_is_asked_to_fill_everything(backbone):
    """Guards the nine channels: hole everywhere, then the latent of mid-grey, the same at every step."""
    asked = []
    hook = backbone.unet.conv_in.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    pictures(backbone, PROMPTS[:1], [0])
    hook.remove()
    grey = backbone.latent(backbone.moments(torch.zeros(1, 3, 32, 32)))
    assert len(asked) == 3 and all((u[:, 4] == 1).all() for u in asked)
    assert all(torch.allclose(u[:, 5:], grey.expand(2, -1, -1, -1), atol=1e-6) for u in asked)
