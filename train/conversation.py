"""Training rows: conversations of several problems, in the forms in which people put them.

Most turns are a problem as it is drawn, through the chat template. A share of conversations has a system message,
a share of the questions is worded around or broken into lines, and a share of the rows is no chat at all but a
question and its solution as plain text, which is what a completion request sends.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer

from train.problems import Problem
from train.tokenizer import prompt

LENGTH = 384
"""Tokens in a row; about three problems."""
ANSWER = 1 << 15
"""The bit that marks a token of a row as part of an answer: one to be learned in full."""

_SYSTEM_SHARE = 0.2
_REWORDED_SHARE = 0.2
_PLAIN_SHARE = 0.06
_SYSTEM_MESSAGES = (
    "You are a careful assistant. Solve the problem step by step.",
    "You are a helpful assistant.",
    "You solve word problems.",
    "Answer in short steps.",
    "You are a patient teacher of mathematics.",
    "Be precise and show your work.",
    "Today is a good day for numbers.",
    "You are an expert. Think before you answer, and end with the result.",
    "Help the user with sums, differences, products and quotients.",
    "Keep it simple!",
)
_BEFORE = ("Solve this: ", "Please help me. ", "Problem: ", "Here is a question.\n", "Question: ", "Hi! ")
_AFTER = (" Think step by step.", " Please explain.", "\nAnswer:", "\n", " Show the steps.", " Thanks!")


def reworded(draw: random.Random, question: str) -> str:
    """The same question with something around it, or with line breaks."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(_BEFORE) + question
    if kind == 1:
        return question + draw.choice(_AFTER)
    if kind == 2:
        return question.replace(". ", ".\n")
    return question.lower() if draw.random() < 0.3 else question.replace(". ", ".  ")


def conversation(tokenizer: Tokenizer, draw: random.Random, problems: Iterator[Problem]) -> list[int]:
    """One row of at most LENGTH token ids, those of the answers with the bit `ANSWER` set.

    Takes problems until the next one no longer fits.
    """
    row: list[int] = []
    plain = draw.random() < _PLAIN_SHARE
    system = draw.choice(_SYSTEM_MESSAGES) if draw.random() < _SYSTEM_SHARE else None
    while True:
        drawn = next(problems)
        question = reworded(draw, drawn.question) if draw.random() < _REWORDED_SHARE else drawn.question
        if plain:
            head, answer = question.rstrip(), f"\n{drawn.solution}<|end|>"
        else:
            head, answer = prompt(question, None if row else system), f"{drawn.solution}<|end|>"
        ids = tokenizer.encode(head).ids
        ids += [token | ANSWER for token in tokenizer.encode(answer).ids]
        if len(row) + len(ids) > LENGTH:
            return row
        row += ids
        if plain:
            return row
