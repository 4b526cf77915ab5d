"""The bytes of each token, as whoever computes masks needs them: the run process has them, and ranks read its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

FILE = "vocabulary"
"""In the run's directory."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens` by id, as many as the model has; b"" for one that no text has. Those in `special` are in no text either.

    `ends` are those that end a sequence, at least one.
    """

    tokens: tuple[bytes, ...]
    special: tuple[int, ...]
    ends: tuple[int, ...]

    def tokenizer(self) -> LLTokenizer:
        """HAZARD: with 150,000 tokens this takes most of a second, with the interpreter lock held."""
        return LLTokenizer(_Wrapper(self), eos_token=list(self.ends))

    @property
    def mask_words(self) -> int:
        """Of 32 bits."""
        return -(-len(self.tokens) // 32)

    def write(self, directory: Path) -> None:
        (directory / FILE).write_bytes(msgspec.msgpack.encode((self.tokens, self.special, self.ends)))

    @classmethod
    def read(cls, directory: Path) -> Vocabulary | None:
        """None if there is none: nothing can be guided then."""
        try:
            data = (directory / FILE).read_bytes()
        except FileNotFoundError:
            return None
        plain = msgspec.msgpack.decode(data, type=tuple[tuple[bytes, ...], tuple[int, ...], tuple[int, ...]])
        return cls(*plain)


class _Wrapper(TokenizerWrapper):
    """It never has to tokenize, as no token is forced on a text: see `grammars.HEADER`."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted({*vocabulary.special, *vocabulary.ends})

    def __call__(self, s: str) -> list[int]:
        return []
