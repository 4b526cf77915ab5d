"""When a request ends, and what it says then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_ep.config import EngineLimits
from elastic_ep.models.spec import ModelSpec
from tests.engine.solo import TINY, assign, drain, ids, solo_runner

PROMPT = [5, 6, 7]
LIMITS = EngineLimits(max_model_len=24, num_pages=8)


def generated(
    spec: ModelSpec = TINY, emitted: list[int] | None = None, **params: object
) -> tuple[list[int], str | None]:
    """The tokens, and the finish of the last one."""
    runner = solo_runner(spec, limits=LIMITS)
    runner.add(assign(1, PROMPT, emitted, 0, temperature=1.0, **params))
    tokens = drain(runner)[1]
    first = len(emitted or ())
    assert [token.index for token in tokens] == list(range(first, first + len(tokens)))
    assert {token.finish for token in tokens[:-1]} <= {None}
    assert not runner.running, "its pages are free again"
    return ids(tokens), tokens[-1].finish


def test_at_its_own_length_or_the_longest() -> None:
    free, finish = generated(max_tokens=100)
    assert (len(free), finish) == (LIMITS.max_model_len - len(PROMPT), "length")
    assert generated(max_tokens=4) == (free[:4], "length")
    assert generated(emitted=free[:3], max_tokens=4) == (free[3:4], "length")


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_at_a_stop_token_and_unless_told_otherwise_at_the_end_of_a_sequence(ignore_eos: bool) -> None:
    free, _ = generated(max_tokens=12)
    assert len(set(free)) == len(free)
    spec = replace(TINY, eos_token_ids=(210, free[5]))
    stopped = (free[:6], "stop")
    assert generated(max_tokens=12, stop_token_ids=(free[5], 210)) == stopped
    assert generated(spec, max_tokens=6, ignore_eos=False) == stopped, "not the length"
    expected = (free, "length") if ignore_eos else stopped
    assert generated(spec, max_tokens=12, ignore_eos=ignore_eos) == expected
