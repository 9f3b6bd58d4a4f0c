"""Textual inversion: a word's file, the backbone that knows it, and text states through vectors that stand alone."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from harmony.core.errors import UserError
from harmony.models.backbone import Backbone
from harmony.models.textual_inversion import Word, add_tokens, initial_vectors, learn, read_word, save_word, text_states

WIDTH = 32
PLAIN = ["a red mushroom on snow", "a blue car on grass, warm sunset light", ""]  # prompts without the word
PROMPTS = ["a <mug> on snow", "a red mushroom on grass", "<mug>, a blue car, a <mug>"]


@pytest.fixture
def backbone(random_backbone):
    """One of its own for each test: learning changes it."""
    return Backbone(str(random_backbone))


def word(count: int = 1, token: str = "<mug>", width: int = WIDTH) -> Word:
    return Word(token, torch.randn(count, width, generator=torch.Generator().manual_seed(count)))


def state(backbone: Backbone) -> tuple:
    """What of a backbone a word may change."""
    return len(backbone.tokenizer), dict(backbone.words), backbone.text_encoder.get_input_embeddings().num_embeddings


# --- the backbone


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_without_the_word_mean_what_they_meant(backbone, count):
    """Guards other prompts: their states are identical before and after, and so is every tensor of the text encoder."""
    before, weights = backbone.prompt(PLAIN), {n: v.clone() for n, v in backbone.text_encoder.state_dict().items()}
    spoken = backbone.prompt(PROMPTS)
    assert learn(backbone, word(count)) is backbone
    assert torch.equal(backbone.prompt(PLAIN), before)
    now = backbone.text_encoder.state_dict()
    assert set(now) == set(weights)
    assert all(torch.equal(now[name][: len(value)], value) for name, value in weights.items())
    grown = {name: len(now[name]) - len(value) for name, value in weights.items() if now[name].shape != value.shape}
    assert list(grown.values()) == [count], "the table of words alone has grown"
    assert not backbone.text_encoder.get_input_embeddings().weight.requires_grad
    means = backbone.prompt(PROMPTS)
    assert torch.equal(means[1], spoken[1]) and not torch.allclose(means[[0, 2]], spoken[[0, 2]], atol=1e-2)


def test_a_word_stands_wherever_it_is_written(backbone):
    """Guards the vocabulary: one id for each vector, in order, inside punctuation too; two words live side by side."""
    first = len(backbone.tokenizer)
    learn(learn(backbone, word(2)), word(3, "<hat>"))
    mug, hat = [first, first + 1], [first + 2, first + 3, first + 4]
    assert backbone.encode("<mug>") == mug and backbone.encode("a <hat>, a <mug>") == [
        *backbone.encode("a"), *hat, *backbone.encode(","), *backbone.encode("a"), *mug,
    ]  # fmt: skip
    assert backbone.words == {"<mug>": ["<mug>", "<mug>_1"], "<hat>": ["<hat>", "<hat>_1", "<hat>_2"]}
    table = backbone.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[mug], word(2).vectors) and torch.equal(table[hat], word(3).vectors)
    assert backbone.text_encoder.config.vocab_size == len(table) == first + 5


def test_a_word_begins_as_init(backbone):
    """Guards the beginning: the vectors are the row of the init word, so that a prompt with the one is a prompt with
    the other; what is not one token of the backbone is refused.
    """
    row = backbone.text_encoder.get_input_embeddings().weight[backbone.encode("mushroom")[0]].clone()
    rows = initial_vectors(backbone, "mushroom", 3)
    assert rows.shape == (3, WIDTH) and all(torch.equal(vector, row) for vector in rows)
    before = backbone.prompt(["a red mushroom on snow"])
    learn(backbone, Word("<mug>", initial_vectors(backbone, "mushroom", 1)))
    assert torch.equal(backbone.prompt(["a red <mug> on snow"]), before)
    for several in ("red mushroom", "zebra", "", "<|endoftext|>"):
        with pytest.raises(UserError, match=r"init='.*' is \d tokens of backbone"):
            initial_vectors(backbone, several, 1)


def test_case_does_not_matter(backbone):
    """Guards against half a word: tokenizers read lower case, so that <Mug> and <mug> are one, all its vectors."""
    learn(backbone, word(2, "<Mug>"))
    assert backbone.encode("<mug>") == backbone.encode("<MUG>") and len(backbone.encode("<Mug>")) == 2


def test_words_that_do_not_fit_are_refused(backbone):
    """Guards the vocabulary: refused are its tokens, learned or not, ones that other words may hold, other widths."""
    learn(backbone, word(2, "<hat>"))
    before, spoken = state(backbone), backbone.prompt(PLAIN)
    for token, count in (("<|endoftext|>", 1), ("<hat>", 1), ("<HAT>", 2)):
        with pytest.raises(UserError, match="knows this word already, choose another"):
            learn(backbone, word(count, token))
    for token in ("car", "mush", "<my mug>", " <mug>", "<mug>\n", "<mug>s", "<>", ""):
        with pytest.raises(UserError, match="give one word in angle brackets"):
            learn(backbone, word(1, token))
    with pytest.raises(
        UserError, match="<mug> has vectors of 16 numbers, backbone .* needs 32: it was learned on another"
    ):
        learn(backbone, word(width=16))
    assert state(backbone) == before and torch.equal(backbone.prompt(PLAIN), spoken)


# --- its file


@pytest.mark.parametrize("count", [1, 2])
def test_the_stock_pipeline_reads_the_file(backbone, random_backbone, tmp_path, count):
    """Guards the file: ``load_textual_inversion`` of diffusers gives the text states of ``learn``."""
    file, stock = save_word(word(count), tmp_path), Backbone(str(random_backbone))
    parts = {name: getattr(stock, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.load_textual_inversion(str(file))
    with torch.no_grad():
        theirs = torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in PROMPTS])
    learn(backbone, read_word(file))
    torch.testing.assert_close(backbone.prompt(PROMPTS), theirs)
    spelled = [pipeline.maybe_convert_prompt(text, stock.tokenizer) for text in PROMPTS]
    assert torch.equal(backbone.tokens(PROMPTS), stock.tokens(spelled)), "the same ids"
    other = learn(Backbone(str(random_backbone)), Word("<mug>", word(count).vectors.flip(-1)))
    assert not torch.allclose(other.prompt(PROMPTS)[0], theirs[0], atol=1e-2), "the vectors do matter"


def test_a_word_is_found_where_its_run_left_it(tmp_path):
    """Guards the hand-over: a run, its export and the file itself; other shapes and types of the same thing."""
    left, export = word(2), tmp_path / "run" / "export"
    save_word(word(1), export)  # an earlier one, which the next replaces
    file = save_word(Word(left.token, left.vectors.clone().requires_grad_()), export)
    assert [path.name for path in export.iterdir()] == ["learned_embeds.safetensors"]
    for place in (export.parent, export, file, str(file)):
        found = read_word(place)
        assert (found.token, found.tokens) == ("<mug>", ["<mug>", "<mug>_1"]) and torch.equal(
            found.vectors, left.vectors
        )
    save_file({"<mug>": left.vectors[0].half()}, tmp_path / "flat.safetensors")
    flat = read_word(tmp_path / "flat.safetensors").vectors
    assert flat.shape == (1, WIDTH) and flat.dtype == torch.float32


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["learned_embeds.bin", "word.pt", "word.ckpt", "word.safetensors"])
def test_nothing_is_unpickled(tmp_path, name):
    """Guards the user: files of other formats run code when they are read, also under the name of a safe one."""
    torch.save({"<mug>": Trap(tmp_path / "sprung")}, tmp_path / name)
    message = "cannot be read" if name.endswith(".safetensors") else "from safetensors alone"
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        read_word(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_files_that_hold_no_word_are_refused(tmp_path):
    """Guards bad input: torn, empty, several tensors, too many dimensions, nothing there at all."""
    file = save_word(word(), tmp_path / "torn")
    whole = file.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="learned_embeds.safetensors cannot be read"):
            read_word(tmp_path / "torn")
    two = {"<mug>": torch.zeros(1, 4), "<hat>": torch.zeros(1, 4)}
    for tensors in ({}, two, *({"<mug>": torch.zeros(shape)} for shape in ((1, 1, 4), (0, 4), ()))):
        save_file(tensors, file)
        with pytest.raises(UserError, match="holds {.*}: a learned word is one tensor"):
            read_word(file)
    (tmp_path / "run" / "export").mkdir(parents=True)
    for nowhere in (tmp_path / "run", tmp_path / "missing"):
        with pytest.raises(UserError, match="(is|holds) no learned word.*(run|missing)"):
            read_word(nowhere)


# --- text states through vectors that stand alone


@pytest.mark.parametrize("count", [1, 2])
def test_states_are_those_of_a_backbone_that_has_learnt_the_word(backbone, random_backbone, count):
    """Guards training: what the vectors are trained in is what the word means later; the encoder is left alone."""
    first, vectors = add_tokens(backbone, "<mug>", count), word(count).vectors
    before = {name: value.clone() for name, value in backbone.text_encoder.state_dict().items()}
    with torch.no_grad():
        states = text_states(backbone.text_encoder, backbone.tokens(PROMPTS), first, vectors)
    assert torch.equal(states, learn(Backbone(str(random_backbone)), word(count)).prompt(PROMPTS))
    assert all(torch.equal(value, before[name]) for name, value in backbone.text_encoder.state_dict().items())
    assert not backbone.text_encoder.get_input_embeddings()._forward_hooks, "nothing stays hooked"


def test_gradients_reach_the_rows_that_are_used_and_nothing_else(backbone):
    """Guards the gradients: each vector learns from its own places; encoder and unused vectors have none."""
    first = add_tokens(backbone, "<mug>", 3)
    vectors = word(3).vectors.requires_grad_()

    def gradient(ids: torch.Tensor) -> torch.Tensor | None:
        weights = torch.randn(len(ids), 16, WIDTH, generator=torch.Generator().manual_seed(0))
        vectors.grad = None
        loss = (text_states(backbone.text_encoder, ids, first, vectors) * weights).sum()
        loss.backward() if loss.requires_grad else None
        return vectors.grad

    ids = backbone.tokens(PROMPTS)
    assert gradient(ids).abs().sum(1).min() > 0
    assert not any(p.grad is not None or p.requires_grad for p in backbone.text_encoder.parameters())
    used = gradient(ids.where(ids != first + 1, backbone.encode("car")[0])).abs().sum(1)
    assert used[0] > 0 and used[1] == 0 and used[2] > 0
    unused = gradient(backbone.tokens(PLAIN))
    assert unused is None or not unused.any()
