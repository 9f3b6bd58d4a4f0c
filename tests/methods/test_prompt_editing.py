"""Editing by words: inversions that are kept, and edits of a picture, on a random backbone."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.methods import prompt_editing as edit
from harmony.methods.prompt_editing import (
    MODES,
    Changes,
    Inversion,
    Mode,
    compare_prompts,
    edit_picture,
    find_mode,
    hash_inversion,
    invert_pictures,
    load_or_invert,
    plan_edit,
    reconstruct,
)
from harmony.models.backbone import Backbone
from harmony.models.textual_inversion import Word, initial_vectors, learn
from harmony.sampling.null_text import denoiser, replay
from harmony.sampling.prompt_to_prompt import LocalBlend, PromptToPrompt, spans

SOURCE, TARGET, STEPS, W = "a red mushroom on snow", "a red car on snow", 4, 7.5
EVERYWHERE = Mode(cross_attention_steps=0.8, self_attention_steps=0.5, factor=1.0, local=False)


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inversion(backbone, image):
    """In the fast mode."""
    return invert_pictures(backbone, [image], [SOURCE], STEPS, W, 0)[0]


@pytest.fixture
def toy(random_backbone):
    """``toy(number)``: a backbone of its own that has learned <toy>, two vectors full of this number."""
    return lambda number: learn(Backbone(str(random_backbone)), Word("<toy>", torch.full((2, 32), float(number))))


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(a.astype(int) - b).max())


def latent(backbone: Backbone, found: Inversion, nulls: list[torch.Tensor], w: float = W) -> torch.Tensor:
    """What guided sampling gives back."""
    return replay(denoiser(backbone), found.noise, backbone.prompt([SOURCE]), nulls, w, backbone.alphas_cumprod)[-1]


# --- words


@pytest.mark.parametrize(
    ("source", "target", "gone", "come", "mode"),
    [
        (SOURCE, TARGET, [2], [2], "replace"),
        (SOURCE, "a blue mushroom on grass", [1, 4], [1, 4], "replace"),
        (SOURCE, "a big red old mushroom on snow", [], [1, 3], "insert"),
        ("a big red old mushroom on snow", SOURCE, [1, 3], [], "insert"),
        (SOURCE, "a red car on snow at night", [2], [2, 5, 6], "insert"),
        ("a cat and a cat", "a cat and a big cat", [], [4], "insert"),
        (SOURCE, SOURCE, [], [], "reweight"),
        (SOURCE, "a  red mushroom on snow ", [], [], "reweight"),
    ],
)
def test_the_words_that_change(source, target, gone, come, mode):
    """Guards the handles of an edit: which words are in one prompt alone, and what the prompts mean by it."""
    assert compare_prompts(source, target) == Changes(gone, come)
    assert find_mode(source, target) == mode


def test_a_learnt_word_of_two_vectors_is_one_word(toy, inversion, monkeypatch):
    """Guards long words: it replaces one word, a local edit looks at both its tokens, and it has one map."""
    backbone, seen, target = toy(0.1), [], "a red <toy> on snow"
    assert len(backbone.words["<toy>"]) == 2 and find_mode(SOURCE, target) == "replace"
    assert compare_prompts(SOURCE, target) == Changes([2], [2])
    blend = lambda words, *more: (seen.append(words), LocalBlend(words, *more))[1]  # noqa: E731
    monkeypatch.setattr(edit, "LocalBlend", blend)
    edited = perform(backbone, inversion, SOURCE, target, MODES["replace"])
    assert [row.nonzero()[:, 0].tolist() for row in seen[0]] == [[3], [3, 4]]
    assert [word for word, _ in edited.maps[1]] == target.split() and spans(target, backbone.encode, 16)[3] == (5, 6)


# --- inversion


def test_the_fast_mode_is_blind_to_guidance(backbone, image, inversion):
    """Guards the fast mode: the condition stands for the empty prompt; what comes back does not depend on w."""
    assert len(inversion.nulls) == STEPS and all(torch.equal(n, backbone.prompt([SOURCE])) for n in inversion.nulls)
    one, many = (latent(backbone, inversion, inversion.nulls, w) for w in (1.0, 20.0))
    assert torch.allclose(one, many, atol=1e-4)
    pictures = [reconstruct(backbone, [inversion], [SOURCE], w)[0] for w in (1.0, 20.0)]
    assert apart(*pictures) <= 1 and pictures[0].shape == image.shape
    assert not torch.allclose(latent(backbone, inversion, [backbone.prompt([""])] * STEPS, 20.0), many, atol=0.1)


def test_null_texts_bring_a_picture_back(backbone, image, inversion):
    """Guards reconstruction: N embeddings 1 x T x D; nearer to the picture's latent than with the empty prompt, and
    that latent is the picture, encoded.
    """
    lines = []
    (found,) = invert_pictures(backbone, [image], [SOURCE], STEPS, W, 5, lines.append)
    empty = backbone.prompt([""])
    assert len(found.nulls) == STEPS == len(lines) and all(null.shape == empty.shape for null in found.nulls)
    assert torch.allclose(found.latent, edit.encode(backbone, [image])) and torch.allclose(found.noise, inversion.noise)
    misses = [
        (latent(backbone, found, nulls) - found.latent).square().mean() for nulls in (found.nulls, [empty] * STEPS)
    ]
    assert misses[0] < 0.9 * misses[1]
    assert f"{misses[0]:.2e}" == lines[-1].split()[-1], "what is stored replays the optimisation"


def test_pictures_are_inverted_each_by_itself(backbone, image):
    """Guards the batch: another picture beside it changes neither the noise nor the embeddings, nor what comes back."""
    pictures, prompts = [image, image[::-1].copy()], [SOURCE, TARGET]
    both = invert_pictures(backbone, pictures, prompts, 2, W, 2)
    alone = [invert_pictures(backbone, [p], [text], 2, W, 2)[0] for p, text in zip(pictures, prompts, strict=True)]
    for ours, theirs in zip(both, alone, strict=True):
        assert torch.allclose(ours.noise, theirs.noise, atol=1e-4) and ours.latent.shape == (1, 4, 8, 8)
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours.nulls, theirs.nulls, strict=True))
    assert not torch.allclose(both[0].noise, both[1].noise, atol=0.1)
    together = reconstruct(backbone, both, prompts, W)
    assert all(
        apart(reconstruct(backbone, [one], [text], W)[0], p) <= 2
        for one, text, p in zip(both, prompts, together, strict=True)
    )


# --- inversions that are kept


@pytest.fixture
def keep(tmp_path, backbone, image, monkeypatch):
    """``keep(**other)``: the inversion of ``load_or_invert`` and how many have been computed so far."""
    computed, usual = [], edit.invert_pictures
    monkeypatch.setattr(edit, "invert_pictures", lambda *given: (computed.append(given), usual(*given))[1])

    def run(**other):
        usual = {"backbone": backbone, "image": image, "prompt": SOURCE, "steps": 2, "w": W, "inner": 0}
        return load_or_invert(tmp_path / "kept", **usual | other), len(computed)

    return run


def same(a: Inversion, b: Inversion) -> bool:
    pairs = zip([a.latent, a.noise, *a.nulls], [b.latent, b.noise, *b.nulls], strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_an_inversion_is_computed_once(keep, tmp_path):
    """Guards the second edit of a picture: it reads what the first has written, bit for bit; no other file is left."""
    first, computed = keep(inner=1)
    again, still = keep(inner=1)
    assert (computed, still) == (1, 1) and same(first, again) and len(again.nulls) == 2
    (file,) = (tmp_path / "kept").iterdir()
    assert file.suffix == ".safetensors" and not file.name.startswith(".")


def test_whatever_it_depends_on_makes_another_inversion(keep, image, toy, tmp_path):
    """Guards the key: pixels, prompt, steps, w, inner, and the vectors of a learned word."""
    pixel = image.copy()
    pixel[0, 0, 0] ^= 1
    others = [{"image": pixel}, {"prompt": TARGET}, {"steps": 3}, {"w": 2.0}, {"inner": 1}]
    others += [{"backbone": toy(0.1)}, {"backbone": toy(0.2)}]
    keep()
    assert [keep(**other)[1] for other in others] == [*range(2, 9)]
    assert [keep(**other)[1] for other in others] == [8] * 7, "and each is found again"
    assert len(list((tmp_path / "kept").iterdir())) == 8


def test_other_weights_make_another_inversion(backbone, image, monkeypatch):
    """Guards the key: each of the five parts that sampling needs."""
    keys = set()
    for part in ("none", "vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        monkeypatch.setattr(Backbone, "hash", lambda self, name, part=part: f"{name}, new" if name == part else name)
        keys.add(hash_inversion(backbone, image))
    assert len(keys) == 6


def test_a_damaged_file_is_made_anew(keep, tmp_path):
    """Guards a run that was killed, or a full disk: cut short, empty, or without its embeddings; then it is whole."""
    first, _ = keep()
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        again, _ = keep()
        assert same(first, again) and file.read_bytes() == whole
    save_file({"latent": first.latent}, file)
    again, computed = keep()
    assert same(first, again) and computed == 6 and [*(tmp_path / "kept").iterdir()] == [file]


def test_a_write_that_fails_leaves_nothing(keep, tmp_path, monkeypatch):
    """Guards atomicity: what was half written is never read, nor left behind."""

    def full(partial, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(UserError, match="disk full"):
            keep()
    assert not list((tmp_path / "kept").glob("*"))
    assert keep()[1] == 2 and keep()[1] == 2


# --- edits


def perform(backbone, inversion, source, target, mode, factors=None, look_at=None, threshold=0.3):
    """The edit that is planned."""
    return edit_picture(backbone, inversion, plan_edit(backbone, source, target, mode, factors, look_at), W, threshold)


def test_identical_prompts_give_the_reconstruction(backbone, inversion):
    """Guards the null edit: with a factor of 1 both rows are what reconstructs the picture; every word has its map."""
    for factors in (None, {"red": 1.0}):
        edited = perform(backbone, inversion, SOURCE, SOURCE, MODES["reweight"], factors)
        assert np.array_equal(*edited.pictures) and edited.masks is None
        assert apart(edited.pictures[0], reconstruct(backbone, [inversion], [SOURCE], W)[0]) <= 1
    for maps in edited.maps:
        assert [word for word, _ in maps] == SOURCE.split() and all(heat.shape == (8, 8) for _, heat in maps)
        assert all(heat.max() == 1 and heat.min() >= 0 for _, heat in maps)


def test_the_source_is_reconstructed_whatever_the_target(backbone, inversion):
    """Guards the source's row: its picture is the reconstruction in every mode; the target's is another."""
    back = reconstruct(backbone, [inversion], [SOURCE], W)[0]
    for name, target in (("replace", TARGET), ("insert", "a big red mushroom on snow"), ("style", f"{SOURCE} car")):
        edited = perform(backbone, inversion, SOURCE, target, MODES[name])
        assert apart(edited.pictures[0], back) <= 1 < apart(edited.pictures[1], back), name


def test_factors_reach_the_edit(backbone, inversion):
    """Guards reweighting: of a word, of the words that come (the mode's), and a factor that is given instead of it."""

    def target(prompt, mode, factors=None) -> np.ndarray:
        edited = perform(backbone, inversion, SOURCE, prompt, mode, factors)
        assert apart(edited.pictures[0], back) <= 1, "the source has no factors"
        return edited.pictures[1]

    back = reconstruct(backbone, [inversion], [SOURCE], W)[0]
    assert apart(target(SOURCE, MODES["reweight"], {"red": 5.0}), back) > 1
    louder = Mode(0.8, 0.5, 3.0, False)
    plain, given = target(TARGET, louder, {}), target(TARGET, louder, {"car": 3.0})
    assert apart(plain, given) > 1 and np.array_equal(target(TARGET, louder), given)
    assert np.array_equal(target(TARGET, EVERYWHERE), plain)


def test_shares_become_steps(backbone, inversion, monkeypatch):
    """Guards counts: floor(f N) steps of cross- and self-attention; maps of at most 16 x 16 positions, here 8 x 8."""
    made = []
    control = lambda *given, **more: (made.append((given[1:], more)), PromptToPrompt(*given, **more))[1]  # noqa: E731
    monkeypatch.setattr(edit, "PromptToPrompt", control)
    for mode in (Mode(0.8, 0.5, 1.0, False), Mode(1.0, 0.0, 1.0, False)):
        perform(backbone, inversion, SOURCE, TARGET, mode)
    assert made == [((3, 2), {"map_tokens": 64}), ((4, 0), {"map_tokens": 64})]


def test_a_local_edit_stays_where_its_words_look(backbone, inversion, monkeypatch):
    """Guards locality: outside both masks the target's latent is the source's, inside it is not; masks are pixels of
    the picture, one for each prompt.
    """
    latents = []
    usual = edit.edit_latents
    monkeypatch.setattr(edit, "edit_latents", lambda *given: (latents.append(usual(*given)), latents[-1])[1])
    edited = perform(backbone, inversion, SOURCE, TARGET, MODES["replace"], threshold=0.97)
    assert all(mask.shape == (32, 32) and mask.dtype == bool for mask in edited.masks) and len(edited.masks) == 2
    union = edited.masks[0] | edited.masks[1]
    cells = torch.from_numpy(union[::4, ::4])
    assert np.array_equal(union, np.kron(cells.numpy(), np.ones((4, 4), bool))) and 0.05 < union.mean() < 0.95
    source, target = latents[0]
    assert torch.equal(source[:, ~cells], target[:, ~cells]) and (source != target).any(0)[cells].all()


def test_what_a_local_edit_looks_at(backbone, inversion, monkeypatch):
    """Guards the blend: the words that change, or those that are named; the threshold and a fifth of the steps; where
    nothing is seen nothing changes.
    """
    made = []
    blend = lambda words, *more: (made.append((words, more)), LocalBlend(words, *more))[1]  # noqa: E731
    monkeypatch.setattr(edit, "LocalBlend", blend)
    monkeypatch.setattr(LocalBlend, "masks", lambda self, seen, h, w: torch.zeros(2, h, w, dtype=torch.bool))
    inserted = perform(backbone, inversion, SOURCE, "a blue red mushroom on snow", MODES["insert"])
    assert [row.nonzero()[:, 0].tolist() for row in made[0][0]] == [[], [2]] and made[0][1] == (0, 0.3)
    perform(backbone, inversion, SOURCE, TARGET, MODES["replace"], None, [[1, 4], [2]], 0.5)
    assert [row.nonzero()[:, 0].tolist() for row in made[1][0]] == [[2, 5], [3]] and made[1][1] == (0, 0.5)
    late = Inversion(inversion.latent, inversion.noise, [inversion.nulls[0]] * 10)
    perform(backbone, late, SOURCE, TARGET, MODES["replace"])
    assert made[2][1][0] == 2
    assert apart(*inserted.pictures) == 0 and not any(mask.any() for mask in inserted.masks)


def test_the_unet_is_itself_again(backbone, inversion, monkeypatch):
    """Guards the backbone: its own attention processors and no hooks, after an edit and after one that failed."""
    before = dict(backbone.unet.attn_processors)

    def whole() -> bool:
        now = backbone.unet.attn_processors
        return all(now[name] is own for name, own in before.items()) and not backbone.unet._forward_hooks

    perform(backbone, inversion, SOURCE, TARGET, EVERYWHERE)
    assert whole()

    def boom(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(PromptToPrompt, "__call__", boom)
    with pytest.raises(KeyboardInterrupt):
        perform(backbone, inversion, SOURCE, TARGET, EVERYWHERE)
    assert whole()


@pytest.mark.parametrize(
    ("source", "target", "factors", "said"),
    [
        (SOURCE, SOURCE, None, "a local edit needs words to look at"),
        (SOURCE, " ".join(["car"] * 15), None, "has 15 tokens, the model reads 14"),
        (" ".join(["car"] * 15), SOURCE, None, "has 15 tokens, the model reads 14"),
        (SOURCE, TARGET, {"mushroom": 2.0}, "reweight.mushroom: the target 'a red car on snow' has no such word"),
    ],
)
def test_edits_that_cannot_be_perform(backbone, inversion, source, target, factors, said):
    """Guards bad input: nothing to look at, prompts that are too long, a factor of a word of the source alone."""
    with pytest.raises(UserError, match=said):
        plan_edit(backbone, source, target, MODES["replace"], factors)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd1", "sd2_base"])
def test_it_runs_at_true_size(model, tmp_path):
    """Guards the paths at the size of Stable Diffusion 1 and 2, with random weights: a word of two vectors, a null text
    for each of two steps, an edit, every processor put back. About 10 GB and some minutes on a CPU.
    """
    backbone = instantiate(compose("edit", ["image=x", "target=x", f"model={model}", "model.weights=random"]).model)
    learn(backbone, Word("<toy>", initial_vectors(backbone, "car", 2)))
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    prompts = "a red car on snow", "a red <toy> on snow"
    before = dict(backbone.unet.attn_processors)
    (inversion,) = invert_pictures(backbone, [image], prompts[:1], steps=2, w=7.5, inner=1)
    assert inversion.noise.shape == (1, 4, 64, 64) and len(inversion.nulls) == 2
    assert not torch.equal(*inversion.nulls) and inversion.nulls[0].shape == backbone.prompt([""]).shape
    edited = edit_picture(backbone, inversion, plan_edit(backbone, *prompts, MODES["replace"]), 7.5)
    assert [picture.shape for picture in edited.pictures] == [(512, 512, 3)] * 2
    assert edited.maps[1][2][0] == "<toy>" and edited.maps[1][2][1].shape == (16, 16)
    assert backbone.unet.attn_processors == before
