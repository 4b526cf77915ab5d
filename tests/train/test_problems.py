"""The generator: deterministic, disjoint splits, every step of every solution right."""

from __future__ import annotations

import operator
import re
from itertools import pairwise

import pytest
from train.problems import Problem, held_out, problem, split_of

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LARGEST = 999


def test_the_same_arguments_give_the_same_problem_in_any_order() -> None:
    forward = [problem(3, index, "train") for index in range(20)]
    backward = [problem(3, index, "train") for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [problem(4, index, "train") for index in range(20)]


def test_the_problems_do_not_change_between_versions_and_processes() -> None:
    """The checkpoint was trained against this split: another hash or another draw would let it leak."""
    assert held_out(1)[0] == Problem(
        question=(
            "Felix starts the week with 40 muffins. Felix wins 50 muffins in a game. Felix packs the muffins"
            " into 6 equal boxes and takes one of them home. Felix sells 14 muffins. On Monday Felix adds 16"
            " muffins. How many muffins does Felix have now?"
        ),
        solution=(
            "Then 40 + 50 = 90 muffins.\n"
            "Then 90 / 6 = 15 muffins.\n"
            "Then 15 - 14 = 1 muffins.\n"
            "Then 1 + 16 = 17 muffins.\n"
            "#### 17"
        ),
        answer=17,
    )


def test_splits_are_disjoint() -> None:
    trained = {problem(1, index, "train").question for index in range(2000)}
    kept = {found.question for found in held_out(500)}
    assert not trained & kept
    assert {split_of(question) for question in trained} == {"train"}
    assert {split_of(question) for question in kept} == {"held_out"}


def test_problems_hardly_repeat() -> None:
    assert len({found.question for found in held_out(500)}) == 500


@pytest.mark.parametrize("found", held_out(200))
def test_every_step_is_right(found: Problem) -> None:
    *lines, last = found.solution.splitlines()
    assert 2 <= len(lines) <= 4
    steps = []
    for line in lines:
        match = re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)", line)
        assert match is not None
        left, sign, right, result = match.groups()
        assert OPERATIONS[sign](int(left), int(right)) == int(result) <= LARGEST
        steps.append((int(left), int(right), int(result)))
    assert all(before[2] == after[0] for before, after in pairwise(steps))
    assert steps[-1][2] == found.answer
    assert last == f"#### {found.answer}"
    numbers = [int(number) for number in re.findall(r"\d+", found.question)]
    spelled = {"doubles": 2, "triples": 3}
    numbers += [value for word, value in spelled.items() for _ in range(found.question.count(word))]
    needed = [steps[0][0], *(step[1] for step in steps)]
    assert sorted(numbers) == sorted(needed), "the story tells exactly the numbers that the solution uses"
