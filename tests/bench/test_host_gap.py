"""The exchange that bench.host_gap times has no buffer and sets what the real one does by hand: it must keep up."""

from __future__ import annotations

from bench.host_gap import TimedExchange, Timer

from elastic_ep.exchange.base import Work


def test_a_step_of_the_timed_exchange_is_the_real_ones() -> None:
    exchange = TimedExchange(operations=48, timer=Timer(0.0))
    for step in range(2):
        exchange.begin_step(step)
        exchange.meet(Work(0, 0))
        exchange.read_masks()
        assert exchange.end_step() == frozenset()
    assert exchange.operations == 96
