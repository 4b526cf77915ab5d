"""The watch over progress on a machine that stands still, starves some or all, and in which some ranks really hang.

A small machine is simulated, in slices of time in which each process either runs or does not. Ranks beat as real ones do,
the watcher wakes when it asked to be woken, or later, and goes by the time that it has lived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.lived_time import LivedTime
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import MemberBeat, ProgressMachine, Pulse, Starved, Suspect
from elastic_ep.placement import launch_placement
from elastic_ep.timing import ProgressConfig
from elastic_ep.wire.messages import Member, RankState

CONFIG = ProgressConfig(deadline_ms=1_000)
SLICE_MS = 20
BEAT_MS = 100
PULSE_MS = 100
WAKES_WITHIN_MS = 300
"""After a pause each process may come that much later than the first."""


@dataclass
class Rank:
    number: int
    next_beat_ms: int = 0
    runs_from_ms: int = 0
    operations: int = 0
    hangs: bool = False
    starved: bool = False
    computes: bool = True
    """Its forward thread gets a processor; its control loop may beat without."""
    parked: bool = False
    waits_for: int | None = None

    def waits_for_a_processor(self, now_ms: int) -> bool:
        return not self.hangs and (self.starved or not self.computes or now_ms < self.runs_from_ms)

    def beat(self) -> MemberBeat:
        return MemberBeat(
            Member(self.number, 1), self.operations, self.operations, self.waits_for, self.parked
        )


@dataclass
class Machine:
    ranks: list[Rank]
    tells_starvation: bool = True
    watch: ProgressMachine = field(default_factory=lambda: ProgressMachine(CONFIG))
    clock: LivedTime = field(default_factory=LivedTime)
    now_ms: int = 1_000
    wakes_ms: int = 0
    arrived: list[MemberBeat] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)

    def run(self, for_ms: int) -> list[int]:
        """Everybody runs who can. The ranks suspected."""
        before = len(self.suspects)
        for _ in range(for_ms // SLICE_MS):
            self.now_ms += SLICE_MS
            for rank in self.ranks:
                self._run(rank)
            if self.now_ms >= self.wakes_ms:
                self._pulse()
        return sorted(suspect.member.rank for suspect in self.suspects[before:])

    def pause(self, for_ms: int, wake_ms: list[int]) -> None:
        """Nobody runs, and then one rank after the other."""
        self.now_ms += for_ms
        for rank, late_ms in zip(self.ranks, wake_ms, strict=False):
            rank.runs_from_ms = self.now_ms + late_ms

    def _run(self, rank: Rank) -> None:
        if rank.hangs or rank.starved or self.now_ms < rank.runs_from_ms:
            return
        rank.operations += rank.computes and rank.waits_for is None
        if self.now_ms >= rank.next_beat_ms:
            rank.next_beat_ms = self.now_ms + BEAT_MS * (4 if rank.parked else 1)
            self.arrived.append(rank.beat())

    def _pulse(self) -> None:
        lived_ms = int(self.clock.at(self.now_ms))
        doubtful = self.watch.doubtful() if self.tells_starvation else []
        members = tuple(Member(rank.number, 1) for rank in self.ranks)
        waiting = {rank.number for rank in self.ranks if rank.waits_for_a_processor(self.now_ms)}
        starved = tuple(Starved(member, PULSE_MS) for member in doubtful if member.rank in waiting)
        self.suspects += self.watch.step(Pulse(lived_ms, members, (), tuple(self.arrived), starved))
        self.watch.check()
        self.arrived.clear()
        self.clock.rest(self.now_ms, PULSE_MS)
        self.wakes_ms = self.now_ms + PULSE_MS


def machine_of(ranks: int, **options: Any) -> Machine:
    machine = Machine([Rank(number) for number in range(ranks)], **options)
    assert machine.run(2_000) == []
    return machine


LATE = st.lists(st.integers(0, WAKES_WITHIN_MS), min_size=8, max_size=8)
PAUSES = st.lists(
    st.tuples(st.sampled_from([20, 60, 90, 200, 700, 5_000, 3_600_000]), LATE, st.integers(1, 40)), max_size=8
)
RANKS = st.integers(1, 8)


@settings(max_examples=80, deadline=None)
@given(ranks=RANKS, pauses=PAUSES)
def test_no_pause_of_the_whole_machine_has_anybody_fenced(ranks: int, pauses: Any) -> None:
    machine = machine_of(ranks)
    for for_ms, wake_ms, then in pauses:
        machine.pause(for_ms, wake_ms)
        assert machine.run(then * SLICE_MS) == []
    assert machine.run(3_000) == []


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(2, 8), lengths=st.lists(st.integers(100, 2_400), min_size=1, max_size=6), late=LATE)
def test_ranks_that_all_fall_silent_together_are_not_to_blame(
    ranks: int, lengths: list[int], late: list[int]
) -> None:
    """The watcher gets its processor, and none of the ranks does; nobody says why."""
    machine = machine_of(ranks, tells_starvation=False)
    for length in lengths:
        for rank, late_ms in zip(machine.ranks, late, strict=False):
            rank.runs_from_ms = machine.now_ms + length + late_ms
        assert machine.run(length + WAKES_WITHIN_MS + 400) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=RANKS, seconds=st.integers(1, 20))
def test_a_rank_that_gets_no_processor_is_starved_and_does_not_hang(
    data: st.DataObject, ranks: int, seconds: int
) -> None:
    """Whoever else runs, and whoever waits for it meanwhile."""
    machine = machine_of(ranks)
    starved = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1))
    for rank in machine.ranks:
        rank.starved = rank.number in starved
        rank.waits_for = None if rank.starved else min(starved)
    assert machine.run(seconds * 1_000) == []
    for rank in machine.ranks:
        rank.starved, rank.waits_for = False, None
    assert machine.run(3_000) == []


@settings(max_examples=60, deadline=None)
@given(ranks=RANKS, seconds=st.integers(1, 20))
def test_a_rank_that_beats_and_whose_steps_get_no_processor_does_not_hang(ranks: int, seconds: int) -> None:
    machine = machine_of(ranks)
    for rank in machine.ranks[1:]:
        rank.waits_for = 0
    machine.ranks[0].computes = False
    assert machine.run(seconds * 1_000) == []


@settings(max_examples=80, deadline=None)
@given(data=st.data(), ranks=RANKS, pauses=PAUSES)
def test_those_that_hang_are_found_and_nobody_else(data: st.DataObject, ranks: int, pauses: Any) -> None:
    """One, two at once, all but one; while the machine stands still now and then. The deadline counts what it ran."""
    machine = machine_of(ranks)
    most = max(1, ranks - 1)
    hung = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=most))
    for rank in machine.ranks:
        rank.hangs = rank.number in hung
        rank.waits_for = None if rank.hangs else min(hung)
    for for_ms, wake_ms, then in pauses:
        machine.pause(for_ms, wake_ms)
        machine.run(then * SLICE_MS)
    machine.run(CONFIG.deadline_ms)
    assert {suspect.member.rank for suspect in machine.suspects} == hung


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=RANKS, before=st.integers(0, 20))
def test_a_hang_is_found_within_its_deadline(data: st.DataObject, ranks: int, before: int) -> None:
    machine = machine_of(ranks)
    machine.run(before * SLICE_MS)
    hung = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=max(1, ranks - 1)))
    for rank in machine.ranks:
        rank.hangs = rank.number in hung
    hangs_ms = machine.now_ms
    assert machine.run(CONFIG.limit_ms - BEAT_MS - SLICE_MS) == [], "not before its time"
    to_carry_out_ms = 50
    assert machine.run(CONFIG.deadline_ms - to_carry_out_ms - machine.now_ms + hangs_ms) == sorted(hung)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_hang_in_a_parked_group_is_found_within_some_deadlines(ranks: int) -> None:
    """All beat seldom, and all at the same moment: the time in between is not one in which the machine stands still."""
    machine = machine_of(ranks)
    for rank in machine.ranks:
        rank.parked = True
    machine.run(2_000)
    machine.ranks[1].hangs = True
    assert machine.run(CONFIG.idle_factor * CONFIG.limit_ms - 4 * BEAT_MS - PULSE_MS) == []
    assert machine.run(4 * BEAT_MS + 2 * PULSE_MS) == [1]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_that_hang_at_once_are_found_within_some_deadlines(ranks: int) -> None:
    machine = machine_of(ranks)
    for rank in machine.ranks:
        rank.hangs = True
    assert machine.run(CONFIG.idle_factor * CONFIG.deadline_ms) == list(range(ranks))


def test_a_silent_rank_that_is_always_ready_to_run_is_found_in_the_end() -> None:
    machine = machine_of(3)
    machine.ranks[1].starved = True
    assert machine.run((CONFIG.busy_factor - 1) * CONFIG.deadline_ms) == []
    assert machine.run(2 * CONFIG.deadline_ms) == [1]


# Lived time

STEPS = st.lists(
    st.tuples(st.integers(1, 1_000), st.integers(0, 5_000), st.lists(st.integers(0, 6_000), max_size=4))
)


@given(steps=STEPS)
def test_of_each_rest_no_more_counts_than_was_asked_for(steps: Any) -> None:
    """Whoever looks at the clock in between, and however late."""
    clock = LivedTime()
    reading = lived = 10_000
    assert clock.at(reading) == lived
    for asked, late, looks in steps:
        clock.rest(reading, asked)
        for look in sorted(looks):
            if look <= asked + late:
                assert clock.at(reading + look) == lived + min(look, asked)
        reading += asked + late
        lived += asked
        assert clock.at(reading) == lived


@given(readings=st.lists(st.integers(0, 10_000)), asked=st.integers(0, 5_000))
def test_lived_time_never_goes_back_nor_faster_than_the_readings(readings: list[int], asked: int) -> None:
    clock = LivedTime()
    clock.rest(0, asked)
    times = [clock.at(reading) for reading in readings]
    assert times == sorted(times)
    assert all(time <= max(readings[: place + 1]) for place, time in enumerate(times))


def test_without_a_rest_the_readings_count() -> None:
    clock = LivedTime()
    assert [clock.at(reading) for reading in (5, 7_000, 6_000, 9_000)] == [5, 7_000, 7_000, 9_000]


@pytest.mark.parametrize("pause_ms", [50, 900, 130_000, 86_400_000])
def test_a_pause_costs_no_joiner_its_life(pause_ms: int) -> None:
    """Not one that connects, nor one that starts up: the membership machine's deadlines go by the same clock."""
    machine = MembershipMachine(2, launch_placement(2, 1, 2, 2))
    clock = LivedTime()
    machine.step(Tick(int(clock.at(1_000))))
    machine.step(ev.Start())
    for state in (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING):
        machine.step(ev.Reported(Member(0, 1), state))
    machine.step(Tick(int(clock.at(1_000)) + machine.config.forming_grace_ms))
    assert machine.attempt, "rank 0 joins alone, rank 1 still starts"
    reading = 1_000 + machine.config.forming_grace_ms
    clock.rest(reading, PULSE_MS)
    effects = machine.step(Tick(int(clock.at(reading + PULSE_MS + pause_ms))))
    assert [effect for effect in effects if isinstance(effect, ev.Fence)] == []
