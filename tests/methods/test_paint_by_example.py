"""Sampling by an exemplar, against diffusers' deprecated pipeline."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.paint_by_example import PaintByExamplePipeline
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

from harmony.methods.method import Composite, make_seeds
from harmony.methods.paint_by_example import PaintByExample, paint
from harmony.models.backbone import Backbone
from harmony.models.paint_by_example import Painter, build_encoder, build_painting_unet, join_condition
from harmony.pixels.images import to_clip, to_hint, to_model
from harmony.pixels.masks import to_latent
from harmony.sampling.guidance import GuidedModel, Schedule, Settings


@pytest.fixture(scope="module")
def painter(random_backbone):
    backbone = Backbone(str(random_backbone))
    torch.manual_seed(0)
    encoder = build_encoder(backbone.image_encoder, backbone.unet.config.cross_attention_dim)
    unet = build_painting_unet(backbone.unet).requires_grad_(False).eval()
    return Painter(backbone.with_unet(unet), encoder.requires_grad_(False).eval())


def squares(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def holes():
    hole = np.zeros((2, 32, 32), bool)
    hole[0, 8:20, 4:24] = hole[1, 12:31, 12:31] = True
    return list(hole)


def test_it_agrees_with_the_pipeline(painter, holes):
    """Guards equality: same weights, noise, mask; latents of PaintByExamplePipeline within 1e-5 of their size."""
    backbone = painter.backbone
    theirs = PaintByExampleImageEncoder(painter.encoder.config).eval()
    theirs.load_state_dict(painter.encoder.state_dict())
    vae = copy.deepcopy(backbone.vae)  # the pipeline draws from the posterior, we take its mean: leave it no width
    vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30
    scheduler = DDIMScheduler.from_config(backbone.scheduler.config)
    pipeline = PaintByExamplePipeline(vae, theirs, backbone.unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pictures = torch.stack([to_hint(e) for e in squares(2, 32, 1)])
    image = torch.stack([to_model(x) for x in squares(2, 32)])
    mask = torch.from_numpy(np.stack(holes)[:, None]).float()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = pipeline(
        example_image=to_clip(pictures), image=image, mask_image=mask, num_inference_steps=5, guidance_scale=4.0,
        latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    masked = backbone.latent(backbone.moments(image * (1 - mask)))
    ours = paint(painter, noise, to_latent(mask, backbone.factor), masked, painter.encoder(pictures), Schedule(5, 4.0))
    apart = (ours - torch.as_tensor(expected)).abs().max()
    assert apart <= 1e-5 * ours.abs().max()  # random weights make latents of up to 17, and rounding grows with them


def test_guidance_is_linear(painter):
    """Guards guidance: w = 1 is the conditional output, 0 that of the vector, and in between it is linear."""
    backbone, encoder = painter.backbone, painter.encoder
    z, masked = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    known = join_condition(torch.ones(1, 1, 8, 8), masked)
    context = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))

    def eps(w, context=context):
        return GuidedModel(backbone, known, context, encoder.uncond_vector, Schedule(guidance=w))(z, 500)

    assert torch.allclose(eps(0.0), eps(1.0, encoder.uncond_vector), atol=1e-6)
    assert torch.allclose(eps(3.0), eps(0.0) + 3 * (eps(1.0) - eps(0.0)), atol=1e-4)


def test_what_lies_in_the_hole_is_not_seen(painter, holes):
    """Guards the boundary: pixels in the hole do not matter, those outside, exemplar and seed do."""
    images, exemplars = squares(2, 32), squares(2, 32, 1)
    filled = [np.where(h[..., None], 0, x).astype(np.uint8) for x, h in zip(images, holes, strict=True)]

    method = PaintByExample(painter, Settings(2, 3.0))

    def composites(images, exemplars):
        return [Composite(x, x, h, h, exemplar=e) for x, h, e in zip(images, holes, exemplars, strict=True)]

    def made(images=images, exemplars=exemplars, seed=0):
        return np.stack(method.fill(composites(images, exemplars), make_seeds(seed, [0, 1])))

    first = made()
    assert first.shape == (2, 32, 32, 3) and first.dtype == np.uint8
    grey = [np.where(h[..., None], 128, x).astype(np.uint8) for x, h in zip(images, holes, strict=True)]
    assert np.array_equal(made(filled), made(grey))
    for other in (made(squares(2, 32, 5)), made(exemplars=squares(2, 32, 6)), made(seed=1)):
        assert not np.array_equal(first, other)
    alone = method.fill(composites(images, exemplars)[1:], make_seeds(0, [1]))[0]
    assert np.abs(alone.astype(int) - first[1]).max() <= 1, "noise of item i depends on (seed, i) only"
