"""The generator: deterministic, disjoint splits, every step of every solution right."""

from __future__ import annotations

import operator
import re

import pytest

from elastic_ep.problems import Problem, held_out, problem, split_of

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def test_the_same_arguments_give_the_same_problem_in_any_order() -> None:
    forward = [problem(3, index, "train") for index in range(20)]
    backward = [problem(3, index, "train") for index in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [problem(4, index, "train") for index in range(20)]


def test_splits_are_disjoint() -> None:
    assert all(split_of(problem(1, index, "train").question) == "train" for index in range(500))
    assert all(split_of(found.question) == "held_out" for found in held_out(500))


@pytest.mark.parametrize("found", held_out(200))
def test_every_step_is_right(found: Problem) -> None:
    *steps, last = found.solution.splitlines()
    assert 2 <= len(steps) <= 4
    for step in steps:
        match = re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)", step)
        assert match is not None
        left, sign, right, result = match.groups()
        assert OPERATIONS[sign](int(left), int(right)) == int(result)
    assert int(result) == found.answer
    assert last == f"#### {found.answer}"
