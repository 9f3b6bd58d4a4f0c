"""Encoder, painting UNet and files of Paint by Example (Yang 2022)."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from harmony.core.errors import UserError
from harmony.models.backbone import Backbone
from harmony.models.paint_by_example import (
    ExemplarEncoder,
    build_encoder,
    build_painting_unet,
    export_painter,
    join_condition,
    load_painter,
    read_encoder,
)
from harmony.pixels.images import to_clip


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


def pictures(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def encoder(backbone, **options) -> ExemplarEncoder:
    torch.manual_seed(0)
    return build_encoder(backbone.image_encoder, backbone.unet.config.cross_attention_dim, **options).eval()


def latents(backbone, count: int = 2):
    side = backbone.resolution // backbone.factor
    rng = torch.Generator().manual_seed(1)
    z, masked = torch.randn(2, count, backbone.channels, side, side, generator=rng)
    hole = torch.zeros(count, 1, side, side)
    hole[..., 2:5, 3:6] = 1
    return z, hole, masked


def test_it_is_diffusers_encoder(backbone):
    """Guards the contract: same keys, and with the same weights the same token as PaintByExampleImageEncoder."""
    ours = encoder(backbone)
    theirs = PaintByExampleImageEncoder(ours.config).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    token, nothing = theirs(to_clip(pictures()), return_uncond_vector=True)
    assert torch.equal(ours(pictures()), token) and torch.equal(ours.uncond_vector, nothing)
    assert token.shape == (2, 1, backbone.unet.config.cross_attention_dim)
    assert len(ours.mapper.blocks) == (backbone.image_encoder.config.num_hidden_layers + 1) // 5 == 1


def test_the_tower_is_the_backbones(backbone):
    """Guards the start: the frozen tower gives the features of the backbone's own image encoder."""
    ours, tower = encoder(backbone), backbone.image_encoder
    expected = tower(pixel_values=to_clip(pictures())).image_embeds
    assert torch.allclose(tower.visual_projection(ours.features(pictures())[:, 0]), expected, atol=1e-6)


class Shuffled(torch.nn.Module):
    """A tower whose patches come in another order behind the class token."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.post_layernorm = tower, tower.post_layernorm

    def forward(self, pixel_values):
        out = self.tower(pixel_values=pixel_values)
        patches = out.last_hidden_state[:, 1:].flip(1)
        return type(out)(torch.cat([out.last_hidden_state[:, :1], patches], 1), out.pooler_output)


def test_only_the_class_token_gets_through(backbone):
    """Guards the bottleneck: one token, and the order of the patches does not matter; the ablation sees all of them."""
    ours, every = encoder(backbone), encoder(backbone, all_tokens=True)
    one, many = ours(pictures()), every(pictures())
    assert one.shape[1] == 1 and many.shape[1] == 1 + (32 // 8) ** 2
    ours.model, every.model = Shuffled(ours.model), Shuffled(every.model)
    assert torch.equal(ours(pictures()), one)
    assert not torch.allclose(every(pictures()), many, atol=1e-3)


def test_painting_unet_from_nine_channels_is_the_same_network(backbone):
    """Guards the change of order and polarity: away from the rim the first layer gives the same numbers."""
    z, hole, masked = latents(backbone)
    text = torch.randn(2, 1, backbone.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([10, 700])
    painting = build_painting_unet(backbone.unet).eval()
    first = torch.nn.functional.conv2d
    u, v = torch.cat([z, hole, masked], 1), torch.cat([z, join_condition(hole, masked)], 1)
    ours = first(v, painting.conv_in.weight, painting.conv_in.bias)  # no padding: away from the rim
    theirs = first(u, backbone.unet.conv_in.weight, backbone.unet.conv_in.bias)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert painting(v, t, text).sample.shape == z.shape
    assert all(p.requires_grad for p in painting.parameters())
    assert not any(p.requires_grad for p in backbone.unet.parameters())


def test_widened_from_four_channels_it_does_not_see_what_is_known(backbone):
    """Guards the beginning: zero-extended, the output on [z, anything] equals the four-channel UNet's on z exactly."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel.from_config({**backbone.unet.config, "in_channels": 4}).eval()
    z, hole, masked = latents(backbone)
    text = torch.randn(2, 1, backbone.unet.config.cross_attention_dim)
    painting, t = build_painting_unet(plain).eval(), torch.tensor([10, 700])
    for known in (join_condition(hole, masked), 100 * torch.randn(2, 5, *z.shape[2:])):
        assert torch.equal(painting(torch.cat([z, known], 1), t, text).sample, plain(z, t, text).sample)
    with pytest.raises(UserError, match="7 input channels"):
        build_painting_unet(UNet2DConditionModel.from_config({**backbone.unet.config, "in_channels": 7}))


def test_polarity_is_an_involution(backbone):
    """Guards the channel order: latent, masked latent, keep mask; keep is 0 exactly where our hole is 1."""
    _, hole, masked = latents(backbone)
    known = join_condition(hole, masked)
    assert torch.equal(known[:, :-1], masked) and torch.equal(known[:, -1:], 1 - hole)
    assert torch.equal(join_condition(known[:, -1:], masked)[:, -1:], hole)


def test_one_token_makes_queries_and_keys_dead(backbone):
    """Guards the single token: gradients of q and k are zero, those of v are not; noise in q and k changes nothing."""
    ours, painting = encoder(backbone), build_painting_unet(backbone.unet)
    ours.requires_grad_(True)
    z, hole, masked = latents(backbone)
    u, t = torch.cat([z, join_condition(hole, masked)], 1), torch.tensor([10, 700])
    out = painting(u, t, ours(pictures())).sample
    out.square().mean().backward()
    attentions = [(n, m) for n, m in [*painting.named_modules(), *ours.named_modules()] if hasattr(m, "to_q")]
    crossing = [m for n, m in attentions if n.endswith("attn2") or n.startswith("mapper")]
    assert len(crossing) >= 3
    for m in crossing:
        assert max(m.to_q.weight.grad.abs().max(), m.to_k.weight.grad.abs().max()) < 1e-9
        assert m.to_v.weight.grad.abs().max() > 1e-9 and m.to_out[0].weight.grad.abs().max() > 1e-9
    with torch.no_grad():
        for m in crossing:
            m.to_q.weight.normal_()
            m.to_k.weight.normal_()
        assert torch.equal(painting(u, t, ours(pictures())).sample, out)


def test_export_comes_back(backbone, tmp_path):
    """Guards the files: what is written is read again, on the backbone that it names, and diffusers reads it too."""
    ours, painting = encoder(backbone), build_painting_unet(backbone.unet)
    folder = export_painter(painting, ours, tmp_path, backbone)
    painter = load_painter(tmp_path, backbone)
    assert all(torch.equal(v, ours.state_dict()[n]) for n, v in painter.encoder.state_dict().items())
    assert all(torch.equal(v, painting.state_dict()[n]) for n, v in painter.backbone.unet.state_dict().items())
    assert painter.backbone.unet is not backbone.unet and painter.backbone.vae is backbone.vae
    assert not any(p.requires_grad for p in (*painter.encoder.parameters(), *painter.backbone.unet.parameters()))
    theirs = PaintByExampleImageEncoder.from_pretrained(folder / "image_encoder")
    assert torch.equal(theirs.proj_out.weight, ours.proj_out.weight)
    assert json.loads((folder / "backbone.json").read_text())["vae"] == backbone.hash("vae")
    export_painter(painting, encoder(backbone, all_tokens=True), tmp_path / "all", backbone)
    assert load_painter(tmp_path / "all", backbone).encoder.all_tokens


def other_backbone(backbone, folder, part: str) -> Backbone:
    """A copy of the backbone in which one weight of ``part`` is another."""
    shutil.copytree(backbone.path, folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = min(state)
    save_file(state | {name: state[name] + 1}, file, {"format": "pt"})
    return Backbone(str(folder))


def test_shipped_without_a_tower_it_takes_the_backbones(backbone, tmp_path):
    """Guards what is shipped: float16, no tower, which is that of the backbone to the last bit; of no other
    backbone.
    """
    torch.manual_seed(0)
    ours, painting = encoder(backbone), build_painting_unet(backbone.unet)
    folder = export_painter(painting, ours, tmp_path, backbone, half=True, tower=False)
    state = load_file(folder / "image_encoder" / "model.safetensors")
    assert not any(name.startswith("model.") for name in state) and {v.dtype for v in state.values()} == {torch.float16}
    again = load_painter(tmp_path, backbone)
    same = again.encoder.model.state_dict()
    assert all(torch.equal(v, same[n]) for n, v in ours.model.state_dict().items())
    assert torch.allclose(again.encoder(pictures()), ours(pictures()), atol=1e-2)
    with pytest.raises(UserError, match="with another CLIP tower"):
        load_painter(tmp_path, other_backbone(backbone, tmp_path / "tower", "image_encoder"))
    ours.model.embeddings.class_embedding += 1
    with pytest.raises(UserError, match="so it cannot be left out: tower=true"):
        export_painter(painting, ours, tmp_path / "foreign", backbone, tower=False)


def test_another_vae_is_refused(backbone, tmp_path):
    """Guards the latents: those of another VAE mean something else."""
    export_painter(build_painting_unet(backbone.unet), encoder(backbone), tmp_path, backbone)
    with pytest.raises(UserError, match="trained on another VAE"):
        load_painter(tmp_path, other_backbone(backbone, tmp_path / "vae", "vae"))


def test_released_files_with_older_names_load(backbone, tmp_path):
    """Guards Fantasy-Studio's files: the tower under model.vision_model., with position ids."""
    ours = encoder(backbone)
    folder = export_painter(build_painting_unet(backbone.unet), ours, tmp_path, backbone) / "image_encoder"
    state = load_file(folder / "model.safetensors")
    older = {("model.vision_" + n) if n.startswith("model.") else n: v for n, v in state.items()}
    older["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(older, folder / "model.safetensors")
    again = read_encoder(str(folder.parent), backbone)
    assert torch.equal(again(pictures()), ours(pictures()))


def test_released_geometry_has_the_released_parameter_counts():
    """Guards the architecture at its true size, on no memory at all."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    with torch.device("meta"):
        big = ExemplarEncoder(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert len(big.mapper.blocks) == 5 and count(big.mapper) == 62_981_120
    assert count(big.model) == 303_179_776 and count(big.proj_out) == 787_200
    assert sum(p.numel() for p in big.trainable_parameters()) + 859_535_364 == 923_306_500


def test_bad_folders_end_in_one_line(backbone, tmp_path):
    """Guards bad input: nothing there, another backbone's, weights that are torn or do not fit."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no Paint by Example"):
        load_painter(tmp_path / "empty", backbone)
    with pytest.raises(UserError, match="there is no Paint by Example"):
        load_painter(tmp_path / "nowhere" / "at" / "all", backbone)
    folder = export_painter(build_painting_unet(backbone.unet), encoder(backbone), tmp_path, backbone)
    weights = folder / "image_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="image_encoder/model.safetensors cannot be read"):
        load_painter(tmp_path, backbone)
    save_file({"uncond_vector": torch.zeros(1, 1, 32)}, weights)
    with pytest.raises(UserError, match="image_encoder/model.safetensors does not fit its configuration: tensor "):
        load_painter(tmp_path, backbone)
