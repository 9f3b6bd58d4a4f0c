"""Zero-shot harmonization (Chen 2023): its invariants on a random backbone, and the policy on scripted scores."""

import json
import resource
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate

from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.data import captions
from harmony.data.descriptions import Description
from harmony.methods import zero_shot
from harmony.methods.insert import cut, insert
from harmony.methods.method import Composite
from harmony.methods.zero_shot import (
    CONCLUDE,
    CONTINUE,
    DEFAULT_OBJECT,
    REGENERATE,
    AttentionMean,
    CopyAttention,
    Parts,
    Round,
    Words,
    attention_loss,
    choose_best,
    decide,
    edge_loss,
    find_descriptors,
    harmonize_once,
    refine_texts,
    run_rounds,
    run_together,
    sobel,
)
from harmony.models.attention import Layer, control_attention
from harmony.models.backbone import Backbone, weights_hash
from harmony.models.textual_inversion import states_of
from harmony.pixels.images import from_model, to_hint, to_model
from harmony.sampling.null_text import denoiser, guided_step, replay

WORDS = Description("a red mushroom", "warm sunset", "blue snow light")
SAME = Description("a red mushroom", "warm sunset", "warm sunset")
OTHER = Description("moonlight car", "grass", "warm light")
SHORT = Parts(steps=2)
BARE = Parts(steps=2, refine=0, edges=0.0)  # inversion, null texts and the copied attention


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def scene():
    """(composite, mask)."""
    mask = np.zeros((32, 32), bool)
    mask[8:22, 6:20] = True
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), mask


@pytest.fixture(scope="module")
def second():
    """(another composite, another mask)."""
    mask = np.zeros((32, 32), bool)
    mask[4:12, 10:30] = True
    return np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8), mask


def once(backbone, scene, words=WORDS, parts=SHORT) -> np.ndarray:
    """One round of one composite."""
    return harmonize_once(backbone, [scene[0]], [scene[1]], [words], parts)[0]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(a.astype(int) - b).max())


@contextmanager
def calls(module: torch.nn.Module, rows: int | None = None):
    """The first argument of each call of ``module``, of so many rows or any."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()
        seen[:] = [x for x in seen if rows in (None, len(x))]


@pytest.fixture
def watched(monkeypatch):
    """What the last ``null_texts`` was given (``trajectory``, ``texts``, ``search``) and found (``nulls``), and the
    loss of each improvement, summed over pictures.
    """
    seen, usual = SimpleNamespace(), zero_shot.null_texts

    def watch(eps, trajectory, texts, *more):
        *more, search = more
        losses = []

        def loss(*pair: torch.Tensor) -> torch.Tensor:
            found = search.loss(*pair)
            losses.append(found.sum().item())
            return found

        nulls = usual(eps, trajectory, texts, *more, replace(search, loss=loss))
        vars(seen).update(trajectory=trajectory, texts=texts, search=search, losses=losses, nulls=nulls)
        return nulls

    monkeypatch.setattr(zero_shot, "null_texts", watch)
    return seen


# --- words


@pytest.mark.parametrize(
    ("object_", "light"),
    [("a red mushroom", "warm light"), ("mushroom", "moonlight"), ("moonlight car", "warm moonlight")],
)
def test_where_the_descriptors_are(backbone, object_, light):
    """Guards the places: behind the object phrase up to the last word, also where words are several tokens."""
    prompt = f"{object_} {light}"
    found = find_descriptors(backbone, prompt, object_)
    (ids,) = backbone.tokens([prompt])
    first = 1 + sum(len(backbone.encode(word)) for word in object_.split())
    assert len(backbone.encode("moonlight")) > 1
    assert ids[found].tolist() == [i for word in light.split() for i in backbone.encode(word)]
    assert found.nonzero()[0].item() == first and ids[found.nonzero()[-1] + 1] == backbone.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("prompt", "object_", "said"),
    [
        ("a red mushroom", "a red mushroom", "says nothing of the light"),
        ("a red mushroom " + "warm " * 12, "a red mushroom", "has 15 tokens, the model reads 14"),
    ],
)
def test_prompts_that_cannot_lead(backbone, prompt, object_, said):
    """Guards bad input: no words behind the object, or more than the text encoder reads."""
    with pytest.raises(UserError, match=said):
        find_descriptors(backbone, prompt, object_)


def test_the_attention_loss_is_about_places():
    """Guards L_Emb: 0 where the map is the mask, whatever its scale; 1 at worst, each picture by itself."""
    mask = torch.tensor([[1.0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
    heat = torch.stack([7 * mask[0], 1 - mask[1], torch.tensor([0.2, 0.1, 0.1, 0.0])])
    found = attention_loss(mask, heat)
    assert torch.allclose(found, torch.tensor([0.0, 1.0, (0 + 0.25 + 0.25 + 0) / 4]))
    assert torch.allclose(attention_loss(mask, 1e-3 * heat), found)
    noise = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    both = attention_loss(mask[:1], noise) + attention_loss(1 - mask[:1], noise.flip(0))
    assert both.min() >= 0 and both.max() <= 2
    assert attention_loss(mask, torch.zeros(3, 4)).tolist() == [0.5] * 3, "an object that no word looks at"


def test_words_are_held_and_weighed():
    """Guards what holds the words: nothing where they have not moved, then the mean square of both prompts'; the
    weights are a simplex over the background's descriptors, even at first.
    """
    where = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    words = Words(where, torch.zeros(4, 4, 2), torch.zeros(2, 4))
    assert words.compute_penalty().tolist() == [0, 0]
    assert torch.allclose(words.weights, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0]]))
    words.change[0], words.change[2, 1], words.change[3] = 3.0, 2.0, 1.0
    assert torch.allclose(words.compute_penalty(), torch.tensor([9 + 4 / 3, 1.0])), (
        "what is no descriptor does not count"
    )
    words.logits = torch.tensor([[90.0, 1, 2, 3], [5, 1, 1, 1]])
    assert torch.allclose(words.weights.sum(1), torch.ones(2)) and (words.weights[~where[2:]] == 0).all()


def test_looks_are_the_mean_over_layers_and_heads(backbone):
    """Guards the maps: words' attention in the wanted size outside the middle block, summing to 1, with a gradient."""
    found, text, z = [], backbone.prompt(["a red mushroom", "a car"]).requires_grad_(True), torch.randn(2, 4, 8, 8)

    class Record(AttentionMean):
        def __call__(self, probabilities, layer, step):
            found.append((layer, probabilities.detach()))
            return super().__call__(probabilities, layer, step)

    with control_attention(backbone.unet, looks := Record(64)):
        denoiser(backbone)(z, 501, text)
    assert {layer.place for layer, _ in found} == {"down", "up"} and all(layer.is_cross for layer, _ in found)
    expected = torch.stack([p.mean(1) for _, p in found]).mean(0)
    assert looks.mean.shape == (2, 64, 16) and torch.allclose(looks.mean, expected, atol=1e-6)
    assert torch.allclose(looks.mean.sum(-1), torch.ones(2, 64), atol=1e-5)
    assert not AttentionMean(64).wants(Layer("x", "mid", True), 64, 0)
    (gradient,) = torch.autograd.grad(looks.mean[:, :, 1].sum(), text)
    assert gradient.abs().sum() > 0


# --- refinement


@pytest.fixture
def refined(backbone, monkeypatch):
    """``refined(parts)``: refines the words of two composites on latents of noise; ``texts`` of each step, ``rows``
    that went into the text encoder each time, ``words`` in the end, ``tokens``, ``where``, ``masks``, the latent ``z``,
    and the masks and maps that were ``compared``.
    """
    made, compared = [], []
    usual = zero_shot.attention_loss
    monkeypatch.setattr(zero_shot, "Words", lambda *given: (made.append(Words(*given)), made[-1])[1])

    monkeypatch.setattr(zero_shot, "attention_loss", lambda *pair: (compared.append(pair), usual(*pair))[1])

    def run(parts: Parts) -> SimpleNamespace:
        prompts, objects = [WORDS.prompts, OTHER.prompts], [WORDS.object, OTHER.object] * 2
        prompts = [pair[0] for pair in prompts] + [pair[1] for pair in prompts]
        tokens = backbone.tokens(prompts)
        where = torch.stack([find_descriptors(backbone, *pair) for pair in zip(prompts, objects, strict=True)])
        rng, masks = torch.Generator().manual_seed(0), torch.zeros(2, 1, 32, 32)
        masks[0, :, 8:24, 8:24] = masks[1, :, :16] = 1
        z = torch.randn(2, 4, 8, 8, generator=rng)
        rows = []
        hook = embeddings(backbone).register_forward_hook(lambda module, args, out: rows.append(out.detach()))
        try:
            texts = refine_texts(backbone, [z] * (parts.steps + 1), masks, tokens, where, parts)
        finally:
            hook.remove()
        found = {"texts": texts, "rows": rows, "words": made[-1], "compared": compared}
        return SimpleNamespace(**found, tokens=tokens, where=where, masks=masks, z=z)

    return run


def embeddings(backbone: Backbone) -> torch.nn.Module:
    """What adds up the rows of tokens and of positions."""
    return next(part for name, part in backbone.text_encoder.named_modules() if name.endswith("embeddings"))


def test_refinement_changes_descriptors_alone(backbone, refined):
    """Guards what is refined: the text encoder's input is that of the bare prompts but for the descriptors, which
    all move; states before them are bit for bit the bare ones.
    """
    found = refined(Parts(steps=3, refine=2, lr=0.05, prompt_l2=0.0))
    plain = embeddings(backbone)(found.tokens)
    assert len(found.texts) == 3 and len(found.rows) == 3 * (2 + 1), "each improvement, and what is kept of each step"
    assert torch.equal(found.rows[0], plain), "the words begin as they are"
    for rows in found.rows[1:]:
        assert torch.equal(rows[~found.where], plain[~found.where])
        assert (rows - plain)[found.where].abs().amax(1).min() > 0
    bare = backbone.text(found.tokens)
    for text in found.texts:
        for row, old, where in zip(text, bare, found.where, strict=True):
            first = where.nonzero()[0, 0]
            assert torch.allclose(row[:first], old[:first], atol=1e-6) and not torch.equal(row[first:], old[first:])


def test_the_backgrounds_words_are_one(backbone, refined):
    """Guards the pooling: in the backgrounds' states all descriptors are their weighted sum, those of the foregrounds
    and whatever else stay; the weights are a simplex that has moved.
    """
    found = refined(Parts(steps=2, refine=2, lr=0.05, prompt_l2=0.0))
    weights, words = found.words.weights, found.words
    assert torch.allclose(weights.sum(1), torch.ones(2)) and (weights >= 0).all()
    assert (weights[~found.where[2:]] == 0).all()
    assert all(w[here].std() > 1e-4 for w, here in zip(weights, found.where[2:], strict=True))
    with torch.no_grad():
        moved = states_of(
            backbone.text_encoder, found.tokens, lambda rows: rows + words.change * found.where[..., None]
        )
    for row in range(4):
        here, text = found.where[row], found.texts[-1][row]
        summed = moved[row] if row < 2 else (moved[row] * weights[row - 2, :, None]).sum(0, keepdim=True).expand(16, -1)
        assert torch.allclose(text[here], summed[here], atol=1e-5)
        assert torch.allclose(text[~here], moved[row][~here], atol=1e-5)


def test_where_words_should_look(backbone, refined):
    """Guards L_Emb: the maps of all descriptors of a prompt together, the background's each by its weight, against the
    share of the object in each position for the foreground and the rest for the background.
    """
    found = refined(Parts(steps=1, refine=1))
    ((mask, heat),) = found.compared
    inside = F.avg_pool2d(found.masks, 4).flatten(1)
    assert torch.allclose(mask, torch.cat([inside, 1 - inside])) and set(inside.unique().tolist()) == {0, 1}
    with torch.no_grad(), control_attention(backbone.unet, looks := AttentionMean(64)):
        denoiser(backbone)(found.z.repeat(2, 1, 1, 1), 1, backbone.text(found.tokens))
    weights = found.where.float()
    weights[2:] /= weights[2:].sum(1, keepdim=True)
    assert torch.allclose(heat, (looks.mean * weights[:, None]).sum(2), atol=1e-5)


def test_refinement_makes_words_look_where_they_should(refined):
    """Guards the purpose of the refinement: within the steps, the loss of where the words look falls."""
    compared = refined(Parts(steps=2, refine=5, lr=5e-3, prompt_l2=0.0)).compared
    losses = [attention_loss(*pair).sum().item() for pair in compared]
    assert len(losses) == 10 and losses[4] < losses[0] and losses[9] < losses[5]


def test_words_that_are_held_stay(refined):
    """Guards the hold: with a huge weight they never go further than Adam's first step, without it they do."""
    lr = 1e-2
    held, free = (refined(Parts(steps=2, refine=4, lr=lr, prompt_l2=hold)) for hold in (1e9, 0.0))
    far = [found.words.change.detach().abs().max().item() for found in (held, free)]
    assert far[0] <= lr and far[1] > 3 * lr
    plain = free.rows[0]
    assert max((rows - plain).abs().max().item() for rows in held.rows) <= 1.01 * lr


# --- edges


def test_golden_edges_of_a_ramp():
    """Guards the kernels: a ramp of slope s has the edge sqrt(s^2 + 1e-6) within, half of s at its repeated rims,
    across as along; channels do not mix.
    """
    ramp = (0.05 * torch.arange(8.0)).expand(1, 1, 8, 8)
    x = torch.cat([ramp, ramp.transpose(2, 3), torch.zeros_like(ramp)], 1)
    found = sobel(x)
    inner, rim = (torch.tensor(s**2 + 1e-6).sqrt() for s in (0.05, 0.025))
    assert torch.allclose(found[0, 0, :, 1:-1], inner) and torch.allclose(found[0, 1, 1:-1], inner)
    assert torch.allclose(found[0, 0, :, [0, -1]], rim) and torch.allclose(found[0, 1, [0, -1]], rim)
    assert torch.allclose(found[0, 2], torch.tensor(1e-3))
    assert torch.allclose(sobel(x + 0.3), found, atol=1e-5)


def test_what_the_edge_loss_sees(scene):
    """Guards L_Edge: nothing between a picture and itself, or itself made brighter; pixels that do not touch the
    object do not count, those that touch it do, each picture by itself.
    """
    x, mask = to_hint(scene[0])[None], torch.from_numpy(scene[1])[None, None].float()
    assert edge_loss(x, x, mask, Parts()).item() == 0
    assert edge_loss(x, x + 0.2, mask, Parts()).item() == pytest.approx(0, abs=1e-9)
    near = F.max_pool2d(mask, 3, 1, 1).bool()
    far, touched = torch.where(near, x, 1 - x), torch.where(mask.bool(), x, 1 - x)
    assert edge_loss(x, far, mask, Parts()).item() == 0
    assert edge_loss(x, touched, mask, Parts()).item() > 1e-5
    both = edge_loss(torch.cat([x, x]), torch.cat([x, touched]), mask, Parts())
    assert both.shape == (2,) and both[0] == 0 and both[1] == edge_loss(x, touched, mask, Parts())


@pytest.fixture
def deep():
    """A tiny differentiable edge detector."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 1, 3, padding=1).requires_grad_(False)


def test_a_deep_detector_adds_its_share(scene, second, deep):
    """Guards the deep edges: their squared differences inside the mask come on top, by their share."""
    x, y = to_hint(np.stack([scene[0], second[0]])).split(1)
    mask = torch.from_numpy(scene[1])[None, None].float()
    more = edge_loss(x, y, mask, Parts(edge_detector=deep, edge_detector_weight=0.3)) - edge_loss(x, y, mask, Parts())
    assert more.item() == pytest.approx(0.3 * ((deep(x) - deep(y)) * mask).square().mean().item(), rel=1e-4)


def test_a_deep_detector_carries_gradient(backbone, scene, deep, watched):
    """Guards the gradient from the deep edges alone to the null embedding, and that it leads to other null texts."""
    text, empty = backbone.prompt([WORDS.prompts[0]]), backbone.prompt([""]).requires_grad_(True)
    z, mask = torch.randn(1, 4, 8, 8), torch.from_numpy(scene[1])[None, None].float()
    reached = guided_step(
        denoiser(backbone), z, 501, empty, denoiser(backbone)(z, 501, text), 2.5, 500, backbone.alphas_cumprod
    )
    made = backbone.decode(reached) / 2 + 0.5
    with_, without = (edge_loss(made, to_hint(scene[0])[None], mask, Parts(edge_detector=d)) for d in (deep, None))
    (gradient,) = torch.autograd.grad((with_ - without).sum(), empty)
    assert gradient.abs().max() > 0
    found = []
    for detector in (None, deep):
        once(backbone, scene, parts=Parts(steps=2, refine=0, edge_detector=detector))
        found.append(watched.nulls[-1])
    assert not torch.equal(*found)


def test_edges_are_taken_in_one_range(backbone, scene, monkeypatch):
    """Guards the range: a codec without loss gives edges that are the composite's own, and the composite back."""
    found, usual = [], zero_shot.edge_loss
    monkeypatch.setattr(zero_shot, "edge_loss", lambda *given: (found.append(usual(*given)), found[-1])[1])
    picture = to_model(scene[0])
    monkeypatch.setattr(backbone, "decode", lambda z: picture.expand(len(z), -1, -1, -1) + 0 * z.mean())
    assert np.array_equal(once(backbone, scene, parts=Parts(steps=2, refine=0, detail=False)), scene[0])
    assert len(found) > 1 and all(loss.abs().max() < 1e-9 for loss in found)


# --- null texts


def test_golden_schedule_of_the_null_texts(backbone, scene, watched):
    """Guards the counts: one improvement a step for the first tenth, five at last, none left out; rate 0.1."""
    once(backbone, scene, parts=replace(BARE, steps=4))
    search = watched.search
    assert [search.inner(i, 50) for i in range(50)] == [1 + i // 10 for i in range(50)]
    assert search.rate(0) == search.rate(49) == Parts().null_lr == 0.1
    assert len(watched.losses) == 1 + 2 + 3 + 4


def test_the_null_texts_lower_their_loss(backbone, scene, watched):
    """Guards the descent: with edges and without, the last loss of the steps is below the first in sum; ten times the
    distance is what is lowered.
    """
    for edges in (1.0, 0.0):
        once(backbone, scene, parts=replace(BARE, steps=4, edges=edges))
        first, last = ([watched.losses[i] for i in at] for at in ((0, 1, 3, 6), (0, 2, 5, 9)))
        assert sum(last) < sum(first)
    a, b = watched.trajectory[0], watched.trajectory[1]
    assert torch.allclose(watched.search.loss(a, b), 10 * (a - b).square().mean((1, 2, 3)))


def test_nothing_is_decoded_without_edges(backbone, scene):
    """Guards the cost: the decoder is called for the result alone; with edges once more for each improvement."""
    for edges, count in ((0.0, 1), (1.0, 1 + 1 + 3)):
        with calls(backbone.vae.decoder) as decoded:
            once(backbone, scene, parts=Parts(steps=2, refine=0, edges=edges))
        assert len(decoded) == count and len(decoded[-1]) == 2


def test_the_composite_is_inverted_without_words(backbone, scene, watched):
    """Guards the inversion: from the posterior's mean, under the empty prompt, whatever the words."""
    found = []
    for words in (WORDS, OTHER):
        once(backbone, scene, words, BARE)
        found.append(watched.trajectory)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) == 3
    mean = backbone.moments(to_model(scene[0])[None]).chunk(2, dim=1)[0] * backbone.vae.config.scaling_factor
    assert torch.allclose(found[0][0], mean, atol=1e-6)


# --- copied attention


def test_golden_copy_of_attention():
    """Guards the copy: position by position, in every layer, the background's rows that see words take those of their
    own foreground; what guidance goes away from is left alone.
    """
    layers = [Layer("x", place, cross) for place in ("down", "mid", "up") for cross in (True, False)]
    assert all(CopyAttention(4).wants(layer, 4096, step) for layer in layers for step in (0, 49))
    assert [CopyAttention(4, self_attention=False).wants(layer, 64, 0) for layer in layers] == [True, False] * 3
    maps = torch.rand(8, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    made = CopyAttention(4)(maps, layers[0], 0)
    assert torch.equal(made, maps[[0, 1, 2, 3, 4, 5, 4, 5]])
    assert torch.equal(CopyAttention(4)(maps[4:], layers[0], 0), maps[[4, 5, 4, 5]])


def test_the_same_words_lead_nowhere(backbone, scene):
    """Guards the null edit: the background's row is the foreground's, bit for bit at every step, and the composite
    comes back; other words lead it away.
    """
    for words, same in ((SAME, True), (WORDS, False)):
        with calls(backbone.unet, rows=4) as seen:
            made = once(backbone, scene, words, BARE)
        assert len(seen) == 2 and torch.equal(seen[1][0], seen[1][1]) == torch.equal(seen[1][2], seen[1][3]) == same
        assert torch.equal(seen[0][0], seen[0][1]), "both begin with the same noise"
        assert np.array_equal(made, scene[0]) == same


@pytest.mark.parametrize("copied", [True, False])
def test_the_same_words_are_plain_guided_sampling(backbone, scene, watched, monkeypatch, copied):
    """Guards equality with the composite's noise, words and null texts; attention copied or not."""
    if not copied:
        monkeypatch.setattr(CopyAttention, "wants", lambda *given: False)
    made = once(backbone, scene, SAME, replace(BARE, detail=False))
    text = backbone.prompt([SAME.prompts[0]])
    z = replay(denoiser(backbone), watched.trajectory[-1], text, watched.nulls, BARE.guidance, backbone.alphas_cumprod)[
        -1
    ]
    assert all(torch.equal(used, text) for used in watched.texts)
    assert apart(made, from_model(backbone.decode(z))[0]) <= 1


def test_self_attention_may_be_left_alone(backbone, scene):
    """Guards self_attention=: it changes what other words lead to."""
    assert (
        apart(once(backbone, scene, WORDS, BARE), once(backbone, scene, WORDS, replace(BARE, self_attention=False))) > 2
    )


def test_detail_adds_what_the_words_change(backbone, scene):
    """Guards detail=: the composite and the difference that the words make; without, the picture itself."""
    plain = replace(BARE, detail=False)
    back, led = (once(backbone, scene, words, plain).astype(int) for words in (SAME, WORDS))
    kept = once(backbone, scene, WORDS, BARE)
    clear = (np.minimum(back, led) > 0) & (np.maximum(back, led) < 255)
    expected = np.clip(scene[0] + led - back, 0, 255)
    assert clear.mean() > 0.5 and np.abs(kept - expected)[clear].max() <= 1


# --- a round


def test_a_round_is_deterministic_whatever_the_batch(backbone, scene, second):
    """Guards determinism: no dice; the words, masks and pictures of a batch do not mix."""
    torch.manual_seed(1)
    first = once(backbone, scene)
    torch.manual_seed(2)
    assert np.array_equal(first, once(backbone, scene)) and first.shape == (32, 32, 3) and first.dtype == np.uint8
    both = harmonize_once(backbone, *zip(scene, second, strict=True), [WORDS, OTHER], SHORT)
    assert apart(both[0], first) <= 2 and apart(both[1], once(backbone, second, OTHER)) <= 2


def test_an_empty_mask_gives_the_composite_back(backbone, scene):
    """Guards the empty mask: nothing to look at and no edges, but every loss is a number, and all is background."""
    nothing = np.zeros_like(scene[1])
    (made,) = run_together(backbone, [run_rounds(scene[0], nothing, 1, 2)], [[WORDS]], [nothing], SHORT)
    assert len(made) == 3 and all(np.array_equal(r.image, scene[0]) for r in made)


@pytest.mark.parametrize("where", [None, "refinement", "null texts", "copy"])
def test_nothing_of_the_backbone_changes(backbone, scene, monkeypatch, where):
    """Guards the backbone: weights, gradients, attention processors and hooks, after a round and after one that fails
    in any of its stages.
    """
    networks = backbone.unet, backbone.vae, backbone.text_encoder
    before, own = [weights_hash(network) for network in networks], dict(backbone.unet.attn_processors)

    def boom(*given):
        raise KeyboardInterrupt

    spots = {
        "refinement": (AttentionMean, "__call__"),
        "null texts": (backbone, "decode"),
        "copy": (CopyAttention, "__call__"),
    }
    with monkeypatch.context() as patch:
        if where is None:
            once(backbone, scene)
        else:
            patch.setattr(*spots[where], boom)
            with pytest.raises(KeyboardInterrupt):
                once(backbone, scene)
    assert [weights_hash(network) for network in networks] == before
    assert not any(p.requires_grad or p.grad is not None for network in networks for p in network.parameters())
    assert all(backbone.unet.attn_processors[name] is processor for name, processor in own.items())
    assert not any(part._forward_hooks for network in networks for part in network.modules())


def test_a_backbone_whose_latents_are_not_a_power_of_two(backbone):
    """Guards the maps: a UNet without a layer of 16 x 16 positions (96 px here, Stable Diffusion at 768) has others."""
    torch.manual_seed(0)
    shape = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    config = {**backbone.unet.config, "sample_size": 24, **shape}
    large = backbone.with_unet(UNet2DConditionModel.from_config(config).requires_grad_(False).eval())
    mask = np.zeros((96, 96), bool)
    mask[20:60, 20:60] = True
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert once(large, (picture, mask), parts=Parts(steps=1, edges=0.0)).shape == (96, 96, 3)


# --- rounds

BLACK, SPOT = np.zeros((4, 4, 3), np.uint8), np.eye(4, dtype=bool)


def play(scores, prompts: int = 1, count: int = 10, judge: bool = True, mask: np.ndarray = SPOT, say=lambda made: None):
    """(the rounds after the composite, what was asked for) where the evaluator says 0 of it and ``scores`` one by one.
    The n-th raw output is full of n everywhere, so that a picture is known by what it shows; 0 is the composite.
    """
    script, asked = iter([0.0, *scores]), []
    generator = run_rounds(BLACK, mask, prompts, count, (lambda image, mask: next(script)) if judge else None, say)
    try:
        wanted = next(generator)
        while True:
            asked.append((int(wanted[0].max()), wanted[1]))
            wanted = generator.send(np.full_like(BLACK, len(asked)))
    except StopIteration as end:
        assert not judge or next(script, None) is None, "every score was asked for"
        start, *rounds = end.value
        assert (start.number, start.prompt, start.decision) == (0, None, CONTINUE) and start.image.max() == 0
        return rounds, asked


def test_golden_decisions():
    """Guards the end: three scores that fall strictly, the last three alone; first another description."""
    assert [decide(s, 1, False) for s in ([], [3], [3, 2], [3, 2, 2], [3, 3, 2], [1, 3, 2])] == [CONTINUE] * 6
    assert decide([3, 2, 1], 1, False) == decide([0, 3, 2, 1], 2, False) == REGENERATE
    assert decide([3, 2, 1], 0, False) == decide([3, 2, 1], 1, True) == CONCLUDE


def test_one_description_concludes_at_the_first_fall():
    """Guards the policy: each round goes on from the last; the best of all is what is given."""
    made, asked = play([0.5, 0.6, 0.9, 0.8, 0.7])
    assert asked == [(n, 0) for n in range(5)]
    assert [r.decision for r in made] == [CONTINUE] * 4 + [CONCLUDE] and [r.number for r in made] == [1, 2, 3, 4, 5]
    assert choose_best(made) is made[2] and choose_best(made).image.max() == 3


def test_the_first_round_tries_every_description():
    """Guards the policy: each from the raw composite; the best one goes on from its own result."""
    made, asked = play([0.2, 0.9, 0.4, 0.95, 0.96], prompts=3, count=3)
    assert asked == [(0, 0), (0, 1), (0, 2), (2, 1), (4, 1)]
    assert [(r.number, r.prompt, r.score) for r in made] == [
        (1, 0, 0.2),
        (1, 1, 0.9),
        (1, 2, 0.4),
        (2, 1, 0.95),
        (3, 1, 0.96),
    ]
    assert [r.decision for r in made] == [CONTINUE] * 4 + [CONCLUDE]


def test_another_description_after_a_fall():
    """Guards the policy: it takes two rounds back, the next best description goes on with scores of its own; the
    second fall is the end though a third description is left.
    """
    made, asked = play([0.2, 0.9, 0.4, 0.8, 0.7, 0.6, 0.5, 0.4], prompts=3)
    assert asked == [(0, 0), (0, 1), (0, 2), (2, 1), (4, 1), (2, 2), (6, 2), (7, 2)]
    assert [r.decision for r in made[3:]] == [CONTINUE, REGENERATE, CONTINUE, CONTINUE, CONCLUDE]
    assert [r.number for r in made] == [1, 1, 1, 2, 3, 4, 5, 6] and choose_best(made) is made[1]


def test_two_rounds_are_taken_back_from_further_on():
    """Guards the policy: not to the beginning, but to before the last two of the three that fell."""
    _, asked = play([0.2, 0.1, 0.3, 0.9, 0.8, 0.7, 0.6], prompts=2, count=6)
    assert asked[-1] == (4, 1) and asked[:6] == [(0, 0), (0, 1), (1, 0), (3, 0), (4, 0), (5, 0)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_there_are_so_many_rounds_at_most(count):
    """Guards rounds=: scores that rise go on until then; the last decision is the end."""
    made, asked = play([0.1 * n for n in range(1, count + 1)], count=count)
    assert len(asked) == count and [r.decision for r in made] == [CONTINUE] * (count - 1) + [CONCLUDE]
    assert choose_best(made) is made[-1]


def test_without_an_evaluator_all_rounds_are_made():
    """Guards evaluator=null: the first description, as many rounds as asked for, the last is what is given."""
    made, asked = play([], prompts=3, count=4, judge=False)
    assert asked == [(n, 0) for n in range(4)] and [r.score for r in made] == [None] * 4
    assert choose_best(made) is made[-1] and made[-1].decision == CONCLUDE


def test_the_background_is_never_touched():
    """Guards the background: bit for bit in every round, whatever is made of it; all of it for an empty mask."""
    for mask in (SPOT, np.zeros_like(SPOT)):
        for count in (1, 3):
            made, _ = play([0.1] * count, count=count, mask=mask)
            assert all((r.image[~mask] == 0).all() and (r.image[mask] > 0).all() for r in made)


def test_rounds_are_told_as_they_end():
    """Guards the progress of a long run: each as it is returned, its decision included."""
    told: list[Round] = []
    made, _ = play([0.1, 0.2, 0.3], count=3, say=told.append)
    assert [(r.number, r.score, r.decision) for r in told[1:]] == [(r.number, r.score, r.decision) for r in made]
    assert (told[0].number, told[0].score) == (0, 0.0)


@pytest.mark.parametrize("score, number", [(0.1, 1), (0.5, 0), (0.9, 0)])
def test_the_evaluator_may_choose_the_composite(backbone, scene, monkeypatch, score, number):
    """Guards the answer "leave it": the composite is a candidate, and is taken where no round is better."""
    monkeypatch.setattr(zero_shot, "harmonize_once", lambda b, images, *rest: [255 - image for image in images])
    composite = Composite(scene[0], scene[0], scene[1], scene[1], lights=(WORDS,))
    judge = zero_shot.Evaluator("statistic", lambda image, mask: score if (image == scene[0]).all() else 0.5)
    method, lines = zero_shot.ZeroShot(backbone, BARE, evaluator=judge), []
    method.say = lines.append
    ((before, after),) = method.relight([composite], [(0, 0)])
    assert [r.number for r in method.outcomes[-1][0][1]] == [0, 1]
    assert np.array_equal(after, np.where(scene[1][..., None] & (number == 1), 255 - scene[0], scene[0]))
    assert np.array_equal(before, scene[0]) and any("is left as it is" in line for line in lines) == (number == 0)


def test_a_composite_without_descriptions_is_left_as_it_is(backbone, scene, second, tmp_path):
    """Guards a describer that says nothing: no round is run for it, beside one that has words; its files say so."""
    composites = [Composite(image, image, mask, mask) for image, mask in (scene, second)]
    words = iter([[], [SAME]])
    method = zero_shot.ZeroShot(backbone, BARE, lambda *given: next(words), count=2)
    outputs = method.fill(composites, [(0, 0)] * 2)
    assert np.array_equal(outputs[0], scene[0])
    outcomes = [outcome for _, outcome in method.outcomes[-1]]
    assert [[r.number for r in outcome] for outcome in outcomes] == [[0], [0, 1, 2]]
    assert [outcome[-1].decision for outcome in outcomes] == [CONCLUDE, CONCLUDE]
    method.write_beside(0, composites[0], tmp_path)
    told = json.loads((tmp_path / "rounds.json").read_text())
    assert told == [{"number": 0, "prompt": None, "score": None, "decision": CONCLUDE}]
    assert not list((tmp_path / "rounds").iterdir())


def test_small_and_large_squares_of_a_batch_have_rounds_of_their_own(backbone, scene, tmp_path):
    """Guards a folder of photographs of any size: ``insert`` fills small and large squares apart, in two calls."""
    large = [np.kron(part, np.ones((4, 4, *[1] * (part.ndim - 2)), part.dtype)) for part in scene]
    small = [part[6:24, 4:22] for part in scene]
    descriptions = {18: [SAME], 128: []}
    method = zero_shot.ZeroShot(backbone, BARE)
    insertions = [cut(32, picture, picture, mask, None, 0) for picture, mask in (large, small)]
    method.find_descriptions = lambda composite: descriptions[max(composite.size)]
    insert(method, insertions)
    for n, (insertion, numbers) in enumerate(zip(insertions, ([0], [0, 1]), strict=True)):
        (folder := tmp_path / str(n)).mkdir()
        method.write_beside(n, insertion.square, folder)
        assert [r["number"] for r in json.loads((folder / "rounds.json").read_text())] == numbers


def test_outputs_depend_on_the_evaluator(backbone):
    """Guards stored outputs: the evaluator chooses between the composite and even a single round."""
    judges = (None, zero_shot.Evaluator("statistic", lambda image, mask: 0.5))
    assert len({zero_shot.ZeroShot(backbone, BARE, evaluator=judge).fingerprint for judge in judges}) == 2


def test_several_composites_side_by_side(backbone, scene, second, monkeypatch):
    """Guards the batch: composites that need fewer rounds leave it; each has the rounds that it has alone, its own
    background around them.
    """
    batches, usual = [], zero_shot.harmonize_once
    monkeypatch.setattr(zero_shot, "harmonize_once", lambda *given: (batches.append(given), usual(*given))[1])
    descriptions, masks = [[WORDS, SAME], [OTHER]], [scene[1], second[1]]

    def asked() -> list:
        judge = iter([0.0, 0.1, 0.9, 0.8])  # of the first: the composite, two descriptions, then the better one goes on
        return [run_rounds(*scene, 2, 2, lambda *given: next(judge)), run_rounds(*second, 1, 1)]

    together = run_together(backbone, asked(), descriptions, masks, BARE)
    assert [len(pictures) for _, pictures, *_ in batches] == [2, 1, 1]
    assert [[m is scene[1] for m in given] for _, _, given, *_ in batches] == [[True, False], [True], [True]]
    assert [[r.prompt for r in made] for made in together] == [[None, 0, 1, 1], [None, 0]]
    for n, (image, mask) in enumerate((scene, second)):
        (alone,) = run_together(backbone, [asked()[n]], [descriptions[n]], [mask], BARE)
        assert all(apart(a.image, b.image) <= 2 for a, b in zip(together[n], alone, strict=True))
        assert all(np.array_equal(r.image[~mask], image[~mask]) for r in together[n])
    assert (together[0][1].image != scene[0]).any() and (together[0][2].image == scene[0]).all()


def test_a_share_of_the_change(backbone, scene):
    """Guards the strength of a description: half of the change is half-way between the composite and all of it."""

    class Half(Description):
        strength = 0.5

    for parts in (BARE, replace(BARE, detail=False)):
        whole, half = (once(backbone, scene, words, parts).astype(int) for words in (WORDS, Half(**vars(WORDS))))
        inner = (whole > 0) & (whole < 255)  # elsewhere the whole change is cut off
        assert (abs(half - (scene[0].astype(int) + whole) / 2)[inner] <= 1).all() and (whole != scene[0]).any()


@pytest.mark.parametrize(
    "knows_photographs, clip, is_measured", [(False, None, True), (True, None, False), (False, "NAME/WEIGHTS", False)]
)
def test_whose_words_photographs_get(monkeypatch, knows_photographs, clip, is_measured):
    """Guards the describer: brightness is measured where no model of the backbone knows photographs; a CLIP that was
    asked for scores its words.
    """
    monkeypatch.setattr(captions, "knows_photographs", lambda folder: knows_photographs)
    backbone = Backbone("tiny")
    monkeypatch.setattr(zero_shot, "clip_of", lambda *given, usual=zero_shot.clip_of: usual(backbone))
    assert (zero_shot.make_word_scorer(backbone, clip).photographs is not None) == is_measured


@pytest.mark.parametrize("knows_photographs", [False, True])
def test_the_object_phrase(monkeypatch, capsys, scene, knows_photographs):
    """Guards the words for the object: a captioner that does not know photographs names objects of renders alone."""
    monkeypatch.setattr(captions, "knows_photographs", lambda folder: knows_photographs)
    monkeypatch.setattr(zero_shot, "caption_picture", lambda *given: "a red mug, warm light")
    scorer = zero_shot.make_word_scorer(Backbone("tiny"))
    texts = ("a photo of a cow", "A photograph of an owl, dim light", "a cow, a dog, rain", "", " , ", None)
    phrases = [scorer.name(scene[0], caption) for caption in texts]
    known = ["a cow,", "an owl,", "a cow, a dog,", DEFAULT_OBJECT, DEFAULT_OBJECT, "a red mug,"]
    assert phrases == (["a red mug,"] * 6 if knows_photographs else known)
    assert capsys.readouterr().out.count("does not know photographs") == (not knows_photographs)


def test_the_describer_hears_the_caption_of_a_photograph(backbone, scene):
    """Guards the way of a dataset's label to the object phrase; a render is described by what it shows."""
    captions_of = []
    method = zero_shot.ZeroShot(backbone, BARE, lambda picture, mask, caption: captions_of.append(caption) or [])
    photograph = Composite(scene[0], scene[0], scene[1], scene[1], caption="a photo of a cow")
    for composite in (photograph, replace(photograph, is_photograph=False)):
        method.find_descriptions(composite)
    assert captions_of == ["a photo of a cow", None]


@pytest.mark.slow
def test_a_round_at_true_size(capsys):
    """Guards the path at the size of Stable Diffusion 2, with random weights: a round of two steps, edges decoded, all
    maps copied, every processor put back; says how much memory it took.
    """
    backbone = instantiate(compose("edit", ["image=x", "target=x", "model=sd2_base", "model.weights=random"]).model)
    rng, mask = np.random.default_rng(0), np.zeros((512, 512), bool)
    mask[150:400, 180:360] = True
    picture, before = rng.integers(0, 256, (512, 512, 3), np.uint8), dict(backbone.unet.attn_processors)
    words = Description("a red car on snow,", "pink neon light", "grey overcast light")
    (made,) = run_together(backbone, [run_rounds(picture, mask, 1, 1)], [[words]], [mask], Parts(steps=2, refine=1))
    assert made[1].image.shape == (512, 512, 3) and np.array_equal(made[1].image[~mask], picture[~mask])
    assert (made[1].image != picture)[mask].any() and backbone.unet.attn_processors == before
    with capsys.disabled():
        print(f"\n{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")
