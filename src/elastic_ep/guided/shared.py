"""A run's vocabulary as llguidance has it, made once: by the fork server, from which ranks have it when they begin."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from llguidance import LLTokenizer

from elastic_ep.guided.vocabulary import Vocabulary


class Guide(NamedTuple):
    """What masks are made with. `words` of 32 bits are a mask; `special` tokens are in no text."""

    tokenizer: LLTokenizer
    words: int
    special: frozenset[int]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Guide:
        return cls(vocabulary.tokenizer(), vocabulary.mask_words, frozenset(vocabulary.special))


@cache
def shared(directory: Path) -> Guide | None:
    """Of the run in `directory`; None if nothing can be guided there."""
    vocabulary = Vocabulary.read(directory)
    return Guide.of(vocabulary) if vocabulary is not None else None


def before_forks(directory: Path) -> None:
    """See host/fork_server.py. No thread is started."""
    shared(directory)
