"""Seeded grade-school word problems with worked solutions, in the form of GSM8K (arXiv 2110.14168).

A problem is a little story: somebody has things, two to four things happen, a question is asked. The solution
computes every step and ends in a line `#### answer`. Training and held-out problems are disjoint by construction:
a hash of the question's text decides the split, and a draw that lands in the other one is drawn again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]
HELD_OUT_SEED = 20_261
_HELD_OUT_SHARE = 16
_LARGEST = 240

NAMES = (
    "Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yusuf", "Zoe", "Amir",
    "Bella", "Carlos", "Dina", "Erik", "Fatima", "George",
)  # fmt: skip
OBJECTS = (
    "apples", "marbles", "stickers", "books", "coins", "pencils", "shells", "cards", "cookies", "stamps",
    "oranges", "balloons", "buttons", "flowers", "eggs", "beads", "toys", "candles", "stones", "tickets",
    "cups", "plums", "bricks", "photos", "pens", "muffins", "keys", "badges",
)  # fmt: skip
BOXES = ("boxes", "bags", "baskets", "jars", "crates", "packs", "drawers", "trays")


@dataclass(frozen=True, slots=True)
class Problem:
    """`solution` ends in the line `#### {answer}`."""

    question: str
    solution: str
    answer: int


@dataclass(frozen=True, slots=True)
class _Story:
    name: str
    friend: str
    things: str


@dataclass(frozen=True, slots=True)
class _Event:
    """One sentence of the story, and the line of the solution that follows from it."""

    text: str
    line: str
    total: int


_Maker = Callable[[random.Random, _Story, int], _Event | None]

_GAINS = (
    "{name} finds {n} more {things}.",
    "{name} buys {n} more {things}.",
    "Then {friend} gives {name} {n} {things}.",
    "{name} gets {n} {things} as a present.",
    "{name} wins {n} {things} in a game.",
    "After lunch {name} collects another {n} {things}.",
    "A neighbour brings {name} {n} {things}.",
    "On Monday {name} adds {n} {things}.",
    "{name} picks up {n} {things} on the way home.",
)
_LOSSES = (
    "{name} gives {n} {things} to {friend}.",
    "{name} loses {n} {things}.",
    "{name} sells {n} {things}.",
    "Then {n} of the {things} break.",
    "{friend} borrows {n} {things} from {name}.",
    "{name} uses up {n} {things}.",
    "{name} leaves {n} {things} at school.",
    "On Friday {name} throws {n} {things} away.",
    "{name} hides {n} of the {things} and forgets them.",
)
_GROWTHS = (
    ("Overnight the number of {things} doubles.", 2),
    ("Then {name} makes {n} times as many {things}.", 0),
    ("A lucky draw multiplies the {things} of {name} by {n}.", 0),
    ("{friend} promises to make it {n} times as many {things}, and does.", 0),
    ("With help from {friend}, {name} triples the {things}.", 3),
)
_SHARES = (
    "{name} shares all {things} equally among {n} friends and keeps the share of one.",
    "{name} splits the {things} into {n} equal parts and keeps only one part.",
    "The {things} are divided equally between {n} people, and {name} is one of them.",
    "{name} packs the {things} into {n} equal {box} and takes one of them home.",
)
_STARTS = (
    "{name} has {n} {things}.",
    "In the morning {name} has {n} {things}.",
    "{name} owns {n} {things}.",
    "There are {n} {things} on the table of {name}.",
    "{name} starts the week with {n} {things}.",
    "{name} counts {n} {things}.",
)
_PRODUCT_STARTS = (
    "{name} has {a} {box} with {b} {things} each.",
    "{name} buys {a} {box}, and each holds {b} {things}.",
    "Every day for {a} days {name} collects {b} {things}.",
    "{name} puts {b} {things} into each of {a} {box}.",
    "{a} children each bring {name} {b} {things}.",
)
_SUM_STARTS = (
    "{name} has {a} red {things} and {b} blue {things}.",
    "{name} has {a} {things} and {friend} puts {b} {things} to them.",
    "{name} keeps {a} old {things} and {b} new {things} together.",
    "One shelf of {name} holds {a} {things}, another holds {b} {things}.",
)
_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "How many {things} are left with {name}?",
    "What is the number of {things} that {name} has at last?",
    "Count the {things} of {name}.",
)


def problem(seed: int, index: int, split: Split) -> Problem:
    """Problem number `index` of a split; the same for the same arguments, whatever was asked before."""
    draw = random.Random(f"{seed}/{index}/{split}")
    while True:
        candidate = _draw_problem(draw)
        if split_of(candidate.question) == split:
            return candidate


def held_out(count: int) -> list[Problem]:
    """The first `count` held-out problems that every evaluation uses."""
    return [problem(HELD_OUT_SEED, index, "held_out") for index in range(count)]


def split_of(question: str) -> Split:
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0 else "train"


def _draw_problem(draw: random.Random) -> Problem:
    name, friend = draw.sample(NAMES, 2)
    story = _Story(name, friend, draw.choice(OBJECTS))
    wanted = draw.randint(2, 4)
    events = [_start(draw, story)]
    operations = 1 if events[0].line else 0
    while operations < wanted:
        event = draw.choice(_MAKERS)(draw, story, events[-1].total)
        if event is not None:
            events.append(event)
            operations += 1
    answer = events[-1].total
    question = draw.choice(_QUESTIONS).format(name=story.name, things=story.things)
    lines = [event.line for event in events if event.line]
    return Problem(
        " ".join([*(event.text for event in events), question]), "\n".join([*lines, f"#### {answer}"]), answer
    )


def _start(draw: random.Random, story: _Story) -> _Event:
    kind = draw.random()
    if kind < 0.4:
        n = draw.randint(5, 60)
        text = draw.choice(_STARTS).format(name=story.name, n=n, things=story.things)
        return _Event(text, "", n)
    if kind < 0.7:
        a, b = draw.randint(2, 9), draw.randint(2, 12)
        text = draw.choice(_PRODUCT_STARTS)
        line, total = f"{story.name} has {a} * {b} = {a * b} {story.things}.", a * b
    else:
        a, b = draw.randint(3, 50), draw.randint(3, 50)
        text = draw.choice(_SUM_STARTS)
        line, total = f"{story.name} has {a} + {b} = {a + b} {story.things}.", a + b
    filled = text.format(
        name=story.name, friend=story.friend, a=a, b=b, things=story.things, box=draw.choice(BOXES)
    )
    return _Event(filled, line, total)


def _gain(draw: random.Random, story: _Story, total: int) -> _Event | None:
    n = draw.randint(2, 60)
    if total + n > _LARGEST:
        return None
    text = draw.choice(_GAINS).format(name=story.name, friend=story.friend, n=n, things=story.things)
    return _Event(text, f"Then {total} + {n} = {total + n} {story.things}.", total + n)


def _loss(draw: random.Random, story: _Story, total: int) -> _Event | None:
    if total < 3:
        return None
    n = draw.randint(1, min(60, total - 1))
    text = draw.choice(_LOSSES).format(name=story.name, friend=story.friend, n=n, things=story.things)
    return _Event(text, f"Then {total} - {n} = {total - n} {story.things}.", total - n)


def _growth(draw: random.Random, story: _Story, total: int) -> _Event | None:
    template, fixed = draw.choice(_GROWTHS)
    n = fixed or draw.randint(2, 5)
    if total * n > _LARGEST or total > 60:
        return None
    text = template.format(name=story.name, friend=story.friend, n=n, things=story.things)
    return _Event(text, f"Then {total} * {n} = {total * n} {story.things}.", total * n)


def _share(draw: random.Random, story: _Story, total: int) -> _Event | None:
    divisors = [n for n in range(2, 10) if total % n == 0 and total // n >= 2]
    if not divisors:
        return None
    n = draw.choice(divisors)
    text = draw.choice(_SHARES).format(name=story.name, n=n, things=story.things, box=draw.choice(BOXES))
    return _Event(text, f"Then {total} / {n} = {total // n} {story.things}.", total // n)


_MAKERS: tuple[_Maker, ...] = (_gain, _gain, _loss, _loss, _growth, _share)
