"""A word of textual inversion: a new token, its vectors in the text encoder's embedding table, and its file.

Gal 2022 (An Image is Worth One Word, arXiv 2208.01618). Names and file format are those of diffusers: the vectors of
``<mug>`` are the tokens ``<mug>``, ``<mug>_1``, ..., and ``load_textual_inversion`` of its pipelines reads the file.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from harmony.core.errors import UserError
from harmony.core.files import write_tensors
from harmony.models.backbone import Backbone
from harmony.models.shipped import WORD, find_weights
from harmony.models.weights import read_weights

WEIGHTS = "learned_embeds.safetensors"  # diffusers' name for the file


@dataclass(frozen=True)
class Word:
    """A learned word: its ``token``, as written in a prompt, and its ``vectors`` n x D."""

    token: str
    vectors: torch.Tensor

    @property
    def tokens(self) -> list[str]:
        """The tokens of the word, one for each vector."""
        return [self.token, *(f"{self.token}_{n}" for n in range(1, len(self.vectors)))]


def word_file(path: str | os.PathLike) -> Path:
    """Find the file of a learned word: ``path``, a run, its export, or a shipped word such as ``words/teal_mug``.

    UserError if there is none.
    """
    return Path(path) if Path(path).is_file() else find_weights(WORD, path) / WEIGHTS


def read_word(path: str | os.PathLike) -> Word:
    """Read a learned word from ``{token: vectors}`` in safetensors. UserError for anything else; never unpickles."""
    file = word_file(path)
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: learned words are read from safetensors alone, other formats can run code; convert it"
        )
    state = read_weights(file)
    token, vectors = next(iter(state.items()), ("", torch.empty(0)))
    if len(state) != 1 or vectors.ndim not in (1, 2) or not len(vectors):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise UserError(f"{file} holds {shapes}: a learned word is one tensor, named by its token, n x width")
    return Word(token, vectors.reshape(-1, vectors.shape[-1]).float())


def save_word(word: Word, folder: Path) -> Path:
    """Write ``folder/learned_embeds.safetensors`` atomically."""
    write_tensors(folder / WEIGHTS, {word.token: word.vectors.float()}, {"format": "pt"})
    return folder / WEIGHTS


def add_tokens(backbone: Backbone, token: str, count: int) -> int:
    """Add ``token``, and one token for each further vector, to the backbone's tokenizer; returns the first new id.

    UserError for a token without angle brackets, which would also match inside other words, and for one that the
    tokenizer has already. Tokenizers ignore case.
    """
    if not re.fullmatch(r"<[^<>\s]+>", token):
        raise UserError(f"token={token}: give one word in angle brackets, <mug> for instance")
    tokens = Word(token.lower(), torch.empty(count, 0)).tokens
    if duplicates := [name for name in tokens if name in backbone.tokenizer.get_vocab()]:
        raise UserError(f"token={duplicates[0]}: backbone {backbone.name} knows this word already, choose another")
    first = len(backbone.tokenizer)
    backbone.tokenizer.add_tokens(tokens)
    backbone.words[token.lower()] = tokens
    return first


def learn(backbone: Backbone, word: Word) -> Backbone:
    """Add ``word`` to the tokenizer and text encoder of ``backbone``, in place; returns ``backbone``.

    UserError for a word of another width, or one that the backbone has already.
    """
    table = backbone.text_encoder.get_input_embeddings()
    if word.vectors.shape[1] != table.embedding_dim:
        raise UserError(
            f"{word.token} has vectors of {word.vectors.shape[1]} numbers, backbone {backbone.name} needs"
            f" {table.embedding_dim}: it was learned on another model"
        )
    first = add_tokens(backbone, word.token, len(word.vectors))
    rows = table.weight.new_zeros(max(table.num_embeddings, first + len(word.vectors)), table.embedding_dim)
    rows[: table.num_embeddings] = table.weight.detach()
    rows[first : first + len(word.vectors)] = word.vectors.to(rows)
    backbone.text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows, freeze=True))
    backbone.text_encoder.config.vocab_size = len(rows)
    return backbone


def initial_vectors(backbone: Backbone, word: str, count: int) -> torch.Tensor:
    """Initial vectors ``count`` x D: copies of the embedding of ``word``. UserError unless it is one token."""
    ids = backbone.encode(word)
    if len(ids) != 1 or ids[0] == backbone.tokenizer.unk_token_id:
        raise UserError(
            f"init={word!r} is {len(ids)} tokens of backbone {backbone.name}: give a plain word that is a single one"
        )
    return backbone.text_encoder.get_input_embeddings().weight[ids].detach().float().repeat(count, 1)


def text_states(text_encoder: torch.nn.Module, ids: torch.Tensor, first: int, vectors: torch.Tensor) -> torch.Tensor:
    """B x T ids -> B x T x D states; ``vectors`` n x D replace the rows ``first`` .. ``first + n - 1``.

    The encoder does not change: only ``vectors`` get gradients, so that no weight decay or momentum can change the
    embeddings of other words.
    """
    is_learned = ids >= first
    index = (ids - first).clamp(min=0)  # for every position, because selecting some would wait for the GPU

    def insert(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(is_learned[..., None], vectors.to(rows.dtype)[index], rows)

    return states_of(text_encoder, torch.where(is_learned, 0, ids), insert)


def states_of(
    text_encoder: torch.nn.Module, ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """B x T ids -> B x T x D states, the embeddings B x T x D changed by ``change`` (before positions)."""
    hook = text_encoder.get_input_embeddings().register_forward_hook(lambda module, args, rows: change(rows))
    try:
        return text_encoder(ids)[0]
    finally:
        hook.remove()
