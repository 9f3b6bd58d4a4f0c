"""Attention control: what is handed over, what it changes, and that nothing of it stays behind."""

from types import SimpleNamespace

import pytest
import torch

from harmony.models.attention import attention_layers, conditional_rows, control_attention, map_side
from harmony.models.backbone import Backbone


@pytest.fixture(scope="module")
def unet(random_backbone):
    return Backbone(str(random_backbone)).unet


@pytest.fixture
def inputs(unet):
    rng = torch.Generator().manual_seed(0)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    z = torch.randn(4, unet.config.in_channels, side, side, generator=rng)
    return z, torch.tensor([500]), torch.randn(4, 16, width, generator=rng)


class Watch:
    """Sees what it wants, and may change it."""

    def __init__(self, wants=lambda layer, tokens, step: True, change=lambda p: p):
        self.wants, self.change, self.seen = wants, change, []

    def __call__(self, probabilities, layer, step):
        self.seen.append((layer, step, probabilities.shape))
        assert torch.allclose(probabilities.sum(-1), torch.ones(()), atol=1e-5)
        return self.change(probabilities)


def run(unet, inputs) -> torch.Tensor:
    with torch.no_grad():
        return unet(*inputs, return_dict=False)[0]


def test_watching_changes_nothing(unet, inputs):
    """Guards the mechanism: every layer is seen once a call, words in half of them; the output is the usual one, to
    the last bit where nothing was wanted.
    """
    plain, all_, none = run(unet, inputs), Watch(), Watch(lambda *_: False)
    with control_attention(unet, all_) as steps:
        first, second = run(unet, inputs), run(unet, inputs)
    assert torch.allclose(first, plain, atol=1e-5) and torch.equal(first, second) and steps.number == 2
    names = [layer.name for layer in attention_layers(unet)]
    assert sorted(layer.name for layer, step, _ in all_.seen if step == 0) == sorted(names)
    assert {step for _, step, _ in all_.seen} == {0, 1}
    cross = [(layer, shape) for layer, _, shape in all_.seen if layer.is_cross]
    assert len(cross) * 2 == len(all_.seen) and all(shape[0] == 4 and shape[-1] == 16 for _, shape in cross)
    assert {layer.place for layer in attention_layers(unet)} == {"down", "mid", "up"}
    with control_attention(unet, none):
        assert torch.equal(run(unet, inputs), plain)
    assert not none.seen


def test_the_layers_and_steps_that_are_wanted(unet, inputs):
    """Guards the choice: by kind, by size and by step, and only then."""
    few = Watch(lambda layer, tokens, step: layer.is_cross and tokens <= 16 and step < 1)
    with control_attention(unet, few):
        run(unet, inputs)
        run(unet, inputs)
    assert few.seen and all(layer.is_cross and step == 0 and shape[2] <= 16 for layer, step, shape in few.seen)


def test_a_change_reaches_the_output_of_its_row_alone(unet, inputs):
    """Guards the layout: copying the source's probabilities into the target moves the target's row and no other."""

    def copied(p):
        rows = conditional_rows(p, 2).clone()
        rows[1] = rows[0]
        return torch.cat([p[:2], rows])

    plain = run(unet, inputs)
    with control_attention(unet, Watch(change=copied)):
        changed = run(unet, inputs)
    assert torch.allclose(changed[:3], plain[:3], atol=1e-5) and not torch.allclose(changed[3], plain[3], atol=1e-3)


def test_nothing_stays_behind(unet, inputs):
    """Guards the restore: after an exception inside, processors and hooks are those from before."""
    before, plain = unet.attn_processors, run(unet, inputs)
    with pytest.raises(ZeroDivisionError), control_attention(unet, Watch(change=lambda p: 1 / 0)):
        run(unet, inputs)
    after = unet.attn_processors
    assert all(after[name] is own for name, own in before.items()) and not unet._forward_hooks
    assert torch.equal(run(unet, inputs), plain)


def test_rows_with_and_without_guidance():
    batch = torch.arange(6)
    assert conditional_rows(batch, 3).tolist() == [3, 4, 5] and conditional_rows(batch[:3], 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="neither with nor without guidance"):
        conditional_rows(batch, 4)


def test_which_maps_say_where_words_look(unet):
    """Guards map_side: the tiny backbone's finest, Stable Diffusion's 16 at 512 px, and 24 at 768, where 12 has no
    words.
    """
    assert map_side(unet, unet.config.sample_size) == unet.config.sample_size
    shapes = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    unlike = SimpleNamespace(config=SimpleNamespace(down_block_types=shapes))
    assert [map_side(unlike, side) for side in (32, 64, 96)] == [16, 16, 24]
