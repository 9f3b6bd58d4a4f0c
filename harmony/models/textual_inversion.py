"""Textual inversion's word: a token of its own, one or several vectors in the text encoder's table, its file.

Gal 2022 (An Image is Worth One Word, arXiv 2208.01618). Names and file are those of diffusers: the vectors of ``<mug>``
are the tokens ``<mug>``, ``<mug>_1``, ..., and ``load_textual_inversion`` of its pipelines reads the file.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from harmony.core.errors import UserError
from harmony.core.files import write_tensors
from harmony.models.backbone import ASSETS, Backbone

WEIGHTS = "learned_embeds.safetensors"  # diffusers' name for the file


@dataclass(frozen=True)
class Word:
    """``token``, as it stands in a prompt, and its ``vectors`` n x D."""

    token: str
    vectors: torch.Tensor

    @property
    def tokens(self) -> list[str]:
        """One for each vector."""
        return [self.token, *(f"{self.token}_{n}" for n in range(1, len(self.vectors)))]


def word_file(path: str | os.PathLike) -> Path:
    """The file of a learnt word: ``path``, what a run or its export keeps, or one shipped with the
    tiny backbone, ``words/teal_mug`` for instance. UserError for none.
    """
    path = Path(path)
    for candidate in (path / "export" / WEIGHTS, path / WEIGHTS, path, ASSETS / path / WEIGHTS):
        if candidate.is_file():
            return candidate
    raise UserError(f"there is no learnt word in {path}: give a run of experiment=textual_inversion, or its {WEIGHTS}")


def read_word(path: str | os.PathLike) -> Word:
    """A learnt word from ``{token: vectors}`` in safetensors. UserError for anything else; nothing is unpickled."""
    file = word_file(path)
    if file.suffix != ".safetensors":
        raise UserError(f"{file}: learnt words are read from safetensors alone, other formats can run code; convert it")
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    token, vectors = next(iter(state.items()), ("", torch.empty(0)))
    if len(state) != 1 or vectors.ndim not in (1, 2) or not len(vectors):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise UserError(f"{file} holds {shapes}: a learnt word is one tensor, named by its token, n x width")
    return Word(token, vectors.reshape(-1, vectors.shape[-1]).float())


def save_word(word: Word, folder: Path) -> Path:
    """Write ``folder/learned_embeds.safetensors``, whole or not at all."""
    write_tensors(folder / WEIGHTS, {word.token: word.vectors.float()}, {"format": "pt"})
    return folder / WEIGHTS


def add_tokens(backbone: Backbone, token: str, count: int) -> int:
    """Make ``token`` and what stands for its further vectors tokens of the backbone; the id of the first.

    UserError for a token without angle brackets, since a bare one would be found inside other words too, and for one
    that the backbone knows already. Tokenizers do not tell upper from lower case.
    """
    if not re.fullmatch(r"<[^<>\s]+>", token):
        raise UserError(f"token={token}: give one word in angle brackets, <mug> for instance")
    tokens = Word(token.lower(), torch.empty(count, 0)).tokens
    if taken := [name for name in tokens if name in backbone.tokenizer.get_vocab()]:
        raise UserError(f"token={taken[0]}: backbone {backbone.name} knows this word already, choose another")
    first = len(backbone.tokenizer)
    backbone.tokenizer.add_tokens(tokens)
    backbone.words[token.lower()] = tokens
    return first


def learn(backbone: Backbone, word: Word) -> Backbone:
    """``backbone`` itself, whose tokenizer and text encoder know ``word`` from now on.

    UserError for a word of another width, or one that the backbone knows already.
    """
    table = backbone.text_encoder.get_input_embeddings()
    if word.vectors.shape[1] != table.embedding_dim:
        raise UserError(
            f"{word.token} has vectors of {word.vectors.shape[1]} numbers, backbone {backbone.name} wants"
            f" {table.embedding_dim}: it was learnt on another model"
        )
    first = add_tokens(backbone, word.token, len(word.vectors))
    rows = table.weight.new_zeros(max(table.num_embeddings, first + len(word.vectors)), table.embedding_dim)
    rows[: table.num_embeddings] = table.weight.detach()
    rows[first : first + len(word.vectors)] = word.vectors.to(rows)
    backbone.text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows, freeze=True))
    backbone.text_encoder.config.vocab_size = len(rows)
    return backbone


def initial(backbone: Backbone, word: str, count: int) -> torch.Tensor:
    """``count`` x D: the table's row of the backbone's own ``word``, count times. UserError unless it is one token."""
    ids = backbone.encode(word)
    if len(ids) != 1 or ids[0] == backbone.tokenizer.unk_token_id:
        raise UserError(
            f"init={word!r} is {len(ids)} tokens of backbone {backbone.name}: give a plain word that is a single one"
        )
    return backbone.text_encoder.get_input_embeddings().weight[ids].detach().float().repeat(count, 1)


def text_states(text_encoder: torch.nn.Module, ids: torch.Tensor, first: int, vectors: torch.Tensor) -> torch.Tensor:
    """B x T ids -> B x T x D states; ``vectors`` n x D stand at the ids ``first`` .. ``first + n - 1``.

    The encoder stays as it is: gradients flow to ``vectors`` and nothing else need be optimised, so that no decay or
    momentum can move the rows of other words.
    """
    ours = ids >= first
    at = (ids - first).clamp(min=0)  # an index for every position: to pick out ours, a GPU would have to be waited for

    def put(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(ours[..., None], vectors.to(rows.dtype)[at], rows)

    return states_of(text_encoder, torch.where(ours, 0, ids), put)


def states_of(
    text_encoder: torch.nn.Module, ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """B x T ids -> B x T x D states, the rows of the table B x T x D changed on their way in (positions come later)."""
    hook = text_encoder.get_input_embeddings().register_forward_hook(lambda module, args, rows: change(rows))
    try:
        return text_encoder(ids)[0]
    finally:
        hook.remove()
