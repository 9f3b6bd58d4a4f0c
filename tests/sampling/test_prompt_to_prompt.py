"""Prompt-to-prompt (Hertz 2022): how attention goes over from one prompt to another."""

import pytest
import torch

from harmony.core.errors import UserError
from harmony.models.attention import Layer, control_attention
from harmony.models.backbone import Backbone
from harmony.sampling.ddim import sample
from harmony.sampling.guidance import GuidedModel, Schedule
from harmony.sampling.prompt_to_prompt import (
    LocalBlend,
    PromptToPrompt,
    alignment,
    build_edit,
    edit_kind,
    edit_latents,
    replacement,
    spans,
)
from harmony.sampling.text_to_image import full_hole_condition

IDS: dict[str, list[int]] = {"sculpture": [70, 71]}


def encode(word: str) -> list[int]:
    """A tokenizer with one token a word, two for ``sculpture``."""
    return IDS.setdefault(word, [100 + len(IDS)])


def test_golden_replacement():
    """Guards the suffix: one token becomes two, and what follows moves along (the released code errs)."""
    a, b = (spans(p, encode, 10) for p in ("a cat on the mat", "a sculpture on the mat"))
    matrix = replacement([*a.values()], [*b.values()], 10)
    wanted = {(0, 0): 1, (1, 1): 1, (2, 2): 0.5, (2, 3): 0.5, (3, 4): 1, (4, 5): 1, (5, 6): 1, (6, 7): 1}
    found = {(i, j): v for (i, j), v in ((tuple(p), matrix[tuple(p)].item()) for p in matrix.nonzero().tolist())}
    assert {place: v for place, v in found.items() if place[0] < 7} == wanted
    assert torch.equal(matrix.sum(1), torch.ones(10))


def test_replacement_of_the_same_is_the_identity_and_loses_nothing():
    """Guards the matrix: identity for identical prompts; rows sum to 1 both ways; other word counts are refused."""
    words = [*spans("a sculpture on the mat", encode, 10).values()]
    assert torch.equal(replacement(words, words, 10), torch.eye(10))
    shorter = [*spans("a cat on the mat", encode, 10).values()]
    assert torch.equal(replacement(words, shorter, 10).sum(1), torch.ones(10))
    with pytest.raises(UserError, match="equally many words: the source has 5, the target 4"):
        replacement(words, shorter[:-1], 10)


def test_golden_refinement():
    """Guards the alignment: an added word keeps its own attention, the others take that of their fellows."""
    a, b = (["<", *p.split(), ">"] for p in ("a cat on the mat", "a big cat on the mat"))
    index, known = alignment(a, b, 10)
    assert index[known].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9] and known.tolist().index(False) == 2
    assert known.sum() == 9


def test_refinement_takes_columns_of_the_source():
    """Guards refinement: aligned columns are the source's, new ones the target's own; a factor comes last."""
    source, own = torch.rand(2, 2, 4, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    edit = build_edit("a cat on the mat", "a big cat on the mat", encode, 10, {"cat": 2.0})
    made = edit(source, own)
    assert torch.equal(made[..., 2], own[..., 2]) and torch.equal(made[..., 3], 2 * source[..., 2])
    assert torch.equal(made[..., 4], source[..., 3])


def test_replaced_attention_still_sums_to_one():
    """Guards the mass: after Replace it is a distribution over the keys, after Reweight it need not be."""
    source, own = torch.rand(2, 2, 4, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    prompts = "a cat on the mat", "a sculpture on the mat"
    made = build_edit(*prompts, encode, 10)(source, own)
    assert torch.allclose(made.sum(-1), torch.ones(2, 4), atol=1e-6)
    heavier = build_edit(*prompts, encode, 10, {"sculpture": 3.0})(source, own)
    assert torch.allclose(heavier[..., 2:4], 3 * made[..., 2:4]) and (heavier.sum(-1) > 1).all()


def test_the_edit_is_inferred_from_the_prompts():
    assert edit_kind("a cat", "a dog") == "replace" and edit_kind("a cat", "a cat") == "reweight"
    assert edit_kind("a cat", "a big cat") == "refine"
    own = torch.rand(1, 4, 10)
    same = build_edit("a cat", "a cat", encode, 10)
    assert torch.equal(same(own, torch.zeros_like(own)), own), "nothing changes between identical prompts"


def test_prompts_that_cannot_be_edited():
    """Guards bad input: too long a prompt, a factor for a word that is not there."""
    with pytest.raises(UserError, match="has 9 tokens, the model reads 8"):
        spans("a b c d e f g h i", encode, 10)
    with pytest.raises(UserError, match="reweight.dog: the target 'a cat' has no such word"):
        build_edit("a cat", "a cat", encode, 10, {"dog": 2.0})


STEPS, SOURCE, TARGET = 4, "a red mushroom on snow", "a red car on snow"


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


def edited(backbone, control=None, prompts=(SOURCE, TARGET), w: float = 3.0) -> torch.Tensor:
    """Latents of the prompts, all from the same noise, in an empty picture."""
    side = backbone.unet.config.sample_size
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1)).repeat(len(prompts), 1, 1, 1)
    known = torch.zeros(len(prompts), 5, side, side)
    known[:, 0] = 1
    eps = GuidedModel(backbone, known, backbone.prompt(list(prompts)), backbone.prompt([""]), Schedule(guidance=w))
    with torch.no_grad():
        if control is None:
            return sample(eps, noise, STEPS, backbone.alphas_cumprod)
        with control_attention(backbone.unet, control):
            return sample(eps, noise, STEPS, backbone.alphas_cumprod)


def edit_of(backbone, source=SOURCE, target=TARGET, **more):
    tokens = lambda word: backbone.tokenizer(word, add_special_tokens=False).input_ids  # noqa: E731
    return build_edit(source, target, tokens, backbone.tokenizer.model_max_length, **more)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_identical_prompts_stay_identical(backbone, w):
    """Guards the null edit: whatever is injected, the edited branch is the source branch exactly."""
    control = PromptToPrompt([edit_of(backbone, target=SOURCE)], cross_steps=3, self_steps=2)
    source, target = edited(backbone, control, (SOURCE, SOURCE), w)
    assert torch.equal(source, target)


def test_nothing_injected_is_uncontrolled_sampling(backbone):
    """Guards the null control: with 0 and 0 steps the output is the plain one, and the control is never called."""
    control, calls = PromptToPrompt([edit_of(backbone)], 0, 0), []
    control.__class__ = type("Counting", (PromptToPrompt,), {"__call__": lambda self, *a: calls.append(a)})
    assert torch.equal(edited(backbone, control), edited(backbone)) and not calls


def test_the_control_is_asked_in_its_steps_alone(backbone):
    """Guards the counting: words in the first ``cross`` steps, layout in the first ``own``, small layers only."""

    class Counting(PromptToPrompt):
        calls = []

        def __call__(self, probabilities, layer, step):
            self.calls.append((layer.is_cross, step, probabilities.shape[2]))
            return super().__call__(probabilities, layer, step)

    edited(backbone, Counting([edit_of(backbone)], cross_steps=3, self_steps=1, max_tokens=16))
    assert {step for cross, step, _ in Counting.calls if cross} == {0, 1, 2}
    assert {(step, n <= 16) for cross, step, n in Counting.calls if not cross} == {(0, True)}


def test_the_source_row_is_not_touched(backbone):
    """Guards the source's row: bit for bit that of a control which looks at the same layers and changes nothing."""

    class Watching(PromptToPrompt):
        def __call__(self, probabilities, layer, step):
            return probabilities

    strong = PromptToPrompt([edit_of(backbone, factors={"car": 5.0})], STEPS, STEPS, map_tokens=64)
    plain, changed = (
        edited(backbone, Watching([edit_of(backbone)], STEPS, STEPS, map_tokens=64)),
        edited(backbone, strong),
    )
    assert torch.equal(plain[0], changed[0]) and not torch.allclose(plain[1], changed[1], atol=1e-3)
    assert strong.map_sum.shape == (2, 64, backbone.tokenizer.model_max_length)


def test_injected_attention_brings_the_edit_nearer_to_the_source(backbone):
    """Guards the effect, against two prompts on their own from the same noise."""
    apart = edited(backbone)
    near = edited(backbone, PromptToPrompt([edit_of(backbone)], STEPS, STEPS))
    distances = [(pair[0] - pair[1]).square().mean() for pair in (near, apart)]
    assert distances[0] < distances[1]


def test_maps_of_rounded_attention_are_summed_whole():
    """Guards a network in bfloat16, in which a sum of 256 equal numbers no longer grows."""
    control, probabilities = PromptToPrompt([], 0, 0, map_tokens=4), torch.full((1, 1, 4, 3), 0.5, dtype=torch.bfloat16)
    for step in range(1000):
        control(probabilities, Layer("attn2", "down", True), step)
    assert torch.equal(control.map_sum, torch.full((1, 4, 3), 500.0))


def test_the_mask_is_where_the_words_look():
    """Guards the blend: the chosen column alone, grown by one cell, each prompt by its own largest value; source and
    target together decide, and before its start nothing is held back.
    """
    seen = torch.zeros(2, 16, 5)
    seen[0, 5, 2], seen[0, 15, 3], seen[1, 0, 1], seen[1, 1, 1] = 8.0, 100.0, 0.5, 0.1
    words = torch.zeros(2, 5)
    words[0, 2] = words[1, 1] = 1
    blend = LocalBlend(words, start=2)
    masks = blend.masks(seen, 8, 8)
    assert masks[0].nonzero().amax().item() == 5 and masks[0].sum() == 36 and not masks[0, 6:, 6:].any()
    assert masks[1].sum() == 16 and masks[1, :4, :4].all()
    z = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])
    assert torch.equal(blend(z, seen, 1), z)
    assert torch.equal(blend(z, seen, 2)[1], (masks[0] | masks[1]).float().expand(4, 8, 8))
    everywhere = LocalBlend(torch.ones(2, 5), 0, threshold=-1.0)
    assert torch.equal(everywhere(z, seen, 3), z)


def test_a_local_edit(backbone):
    """Guards locality and the loop: outside the mask the target is the source; without edits and blend the loop is
    guided sampling with the empty prompt.
    """
    texts, null = backbone.prompt([SOURCE, TARGET]), backbone.prompt([""])
    side = backbone.unet.config.sample_size
    z = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    control = PromptToPrompt([edit_of(backbone)], cross_steps=3, self_steps=2, map_tokens=64)
    nothing = torch.zeros(2, backbone.tokenizer.model_max_length)
    source, target = edit_latents(backbone, z, [texts] * STEPS, [null] * STEPS, 3.0, control, LocalBlend(nothing, 0))
    assert torch.equal(source, target), "no word looks anywhere: all is kept"
    before = backbone.unet.attn_processors
    plain = edit_latents(backbone, z, [texts] * STEPS, [null] * STEPS, 3.0, PromptToPrompt([edit_of(backbone)], 0, 0))
    eps = GuidedModel(backbone, full_hole_condition(backbone, 2), texts, null, Schedule(guidance=3.0))
    with torch.no_grad():
        expected = sample(eps, z.repeat(2, 1, 1, 1), STEPS, backbone.alphas_cumprod)
    assert torch.allclose(plain, expected, atol=1e-5)
    assert all(backbone.unet.attn_processors[name] is own for name, own in before.items())
