"""Tokenizers of single letters in the place of trained ones: Python imports this first in some cases of golden.py.

The library's training draws the ids from hash maps whose seed no one can set: equal texts give other ids, and with them
other weights, in each run.
"""

from tokenizers import BertWordPieceTokenizer, pre_tokenizers
from transformers import CLIPTokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clip_tokenizer(self, *args, **options):
    words = (*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])


def word_pieces(self, **options):
    return {word: n for n, word in enumerate((*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)))}


CLIPTokenizer.train_new_from_iterator = clip_tokenizer
BertWordPieceTokenizer.train_from_iterator = lambda self, *args, **options: None
BertWordPieceTokenizer.get_vocab = word_pieces
