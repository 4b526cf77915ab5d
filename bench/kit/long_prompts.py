"""Prompts of any length, of word problems and their solutions, as token ids of the bundled tokenizer."""

from __future__ import annotations

import functools
import random

from tokenizers import Tokenizer
from train.problems import held_out

from elastic_ep.run import BUNDLED_MODEL


@functools.cache
def _problems() -> tuple[Tokenizer, list[list[int]]]:
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    texts = [f"{problem.question}\n{problem.solution}\n" for problem in held_out(256)]
    return tokenizer, [one.ids for one in tokenizer.encode_batch(texts)]


def long_prompt(number: int, tokens: int) -> list[int]:
    """The same for the same `number`. No two share the first full page."""
    tokenizer, problems = _problems()
    draw = random.Random(number)
    ids: list[int] = tokenizer.encode(f"Set {number}. ").ids
    while len(ids) < tokens:
        ids += draw.choice(problems)
    return ids[:tokens]
