"""The simulation of a large group: every loss comes to an end, and what is counted is what was lost."""

from __future__ import annotations

import random

import pytest
from bench.simulate import Loss, Pace, interruptions, started

from bench import simulate


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "LAYERS", 2)
    monkeypatch.setattr(simulate, "EXPERTS", 8)


def test_a_lost_host_costs_its_ranks_and_a_pause_of_all() -> None:
    group, pace = started(4, 2), Pace()
    begins, whole = group.now, 1_000_000
    group.at(begins + 1_000, Loss("a host", (2, 3), pace.spare))
    group.run(begins + whole)
    (loss,) = group.losses
    assert not loss.waiting
    assert not group.open
    assert len(group.membership.view.seats) == 8
    assert group.least_tolerated == (0, 0)
    away_ms = pace.spare + pace.start  # and a little
    lost = 8 * whole - group.computed
    assert 2 * away_ms <= lost <= 2 * 1.2 * away_ms + 8 * (pace.notice_host + 5 * pace.step)
    assert group.held_ms == 0, "what the host held is on others too"


def test_weeks_of_losses_leave_a_whole_group() -> None:
    group = started(6, 2)
    begins, days = group.now, 20.0
    for when, loss in interruptions(group, days, 300.0, random.Random(3)):
        group.at(begins + when, loss)
    group.run(begins + int(days * simulate.DAY_MS))
    assert len(group.losses) > 20
    assert {loss.cause for loss in group.losses} >= {*simulate.CAUSES}
    assert len(group.membership.view.seats) == group.ranks
    assert group.computed / (group.ranks * days * simulate.DAY_MS) > 0.999
