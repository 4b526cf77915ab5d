"""A poisoned batch runs again as it was, before anything that came in meanwhile."""

from __future__ import annotations

from tests.engine.solo import TINY, SoloExchange, assign, drain, solo_runner

RUNNING, LATER = 1, 2


def test_what_came_in_meanwhile_waits_for_the_step_after() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(exchange=exchange)
    runner.add(assign(RUNNING, [5, 6, 7]))
    first = runner.run_step(0, schedule=True)
    exchange.poison = frozenset({3})
    assert runner.run_step(1, schedule=True).masked == {3}
    runner.add(assign(LATER, list(range(8, 40))))
    again = runner.run_step(2, schedule=True)
    assert [token.request_id for token in (*first.tokens, *again.tokens)] == [RUNNING, RUNNING]
    assert runner.waiting == 1, "the newcomer has to wait for one step"
    assert {token.request_id for token in runner.run_step(3, schedule=True).tokens} == {RUNNING, LATER}


def test_a_request_cancelled_meanwhile_is_not_run_again() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(exchange=exchange)
    runner.add(assign(RUNNING, [5, 6, 7]))
    runner.add(assign(LATER, [9, 8]))
    exchange.poison = frozenset({3})
    runner.run_step(0, schedule=True)
    runner.cancel(LATER)
    assert [token.request_id for token in runner.run_step(1, schedule=True).tokens] == [RUNNING]
    runner.cancel(RUNNING)
    assert drain(runner) == {}


def test_without_cover_the_batch_waits() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(exchange=exchange)
    runner.add(assign(RUNNING, [5, 6, 7]))
    exchange.poison = frozenset({3})
    runner.run_step(0, schedule=True)
    assert runner.run_step(1, schedule=False).tokens == ()
    assert [token.request_id for token in runner.run_step(2, schedule=True).tokens] == [RUNNING]
