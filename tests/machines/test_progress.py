"""The watch over progress finds every hang within its deadline and no rank that is merely busy, parked or waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.lived_time import LivedTime
from elastic_ep.machines.membership.progress import MemberBeat, ProgressMachine, Pulse, Starved, Suspect
from elastic_ep.timing import ProgressConfig
from elastic_ep.wire.messages import Member

CONFIG = ProgressConfig(deadline_ms=1_000, busy_factor=30, idle_factor=5)
PULSE_MS = 100


@dataclass
class Life:
    """One rank as its heartbeats show it."""

    steps: bool = True
    burns: bool = True
    waits_for: int | None = None
    parked: bool = False
    silent: bool = False
    operations: int = 0
    cpu_ms: int = 0


@dataclass
class Group:
    """A group whose ranks beat with every pulse."""

    lives: list[Life]
    machine: ProgressMachine = field(default_factory=lambda: ProgressMachine(CONFIG))
    clock: LivedTime = field(default_factory=LivedTime)
    reading_ms: int = 5_000
    now_ms: int = 5_000
    starting: set[int] = field(default_factory=set)
    starving: set[int] = field(default_factory=set)

    def pulse(self, after_ms: int = PULSE_MS, late_ms: int = 0) -> list[Suspect]:
        """The watcher asked to be woken after `after_ms` and is so much too late. `starving` are so all the while."""
        self.clock.rest(self.reading_ms, after_ms)
        self.reading_ms += after_ms + late_ms
        self.now_ms = int(self.clock.at(self.reading_ms))
        beats = []
        for rank, life in enumerate(self.lives):
            life.operations += life.steps
            life.cpu_ms += life.burns
            if not life.silent:
                beats.append(
                    MemberBeat(Member(rank, 1), life.operations, life.cpu_ms, life.waits_for, life.parked)
                )
        ranks = range(len(self.lives))
        found = self.machine.step(
            Pulse(
                self.now_ms,
                tuple(Member(rank, 1) for rank in ranks if rank not in self.starting),
                tuple(Member(rank, 1) for rank in ranks if rank in self.starting),
                tuple(beats),
                tuple(
                    Starved(member, after_ms)
                    for member in self.machine.doubtful()
                    if member.rank in self.starving
                ),
            )
        )
        self.machine.check()
        return found

    def run(self, for_ms: int, until: Callable[[], bool] = lambda: False) -> tuple[list[int], int]:
        """The ranks suspected meanwhile, and how long it took to find the last of them, milliseconds."""
        found: list[int] = []
        took_ms = 0
        began_ms = self.now_ms
        while self.now_ms < began_ms + for_ms and not until():
            for suspect in self.pulse():
                found.append(suspect.member.rank)
                took_ms = self.now_ms - began_ms
        return found, took_ms

    def wait_for(self, *ranks: int) -> None:
        """Everybody stops; rank i waits for ranks[i], or -1: for nobody."""
        for life, waits_for in zip(self.lives, ranks, strict=True):
            life.steps = life.burns = False
            life.waits_for = waits_for if waits_for >= 0 else None


def healthy(ranks: int = 3) -> Group:
    group = Group([Life() for _ in range(ranks)])
    assert group.run(3_000) == ([], 0)
    return group


def test_a_stopped_process_is_found_by_its_silence() -> None:
    group = healthy()
    group.wait_for(2, 2, -1)
    group.lives[2].silent = True
    found, took_ms = group.run(10_000)
    assert found == [2], "once, and nobody else"
    assert 800 <= took_ms <= CONFIG.deadline_ms


def test_silence_counts_while_the_others_still_move() -> None:
    group = healthy()
    group.lives[2].silent = True
    assert group.run(10_000)[0] == [2]


def test_a_stuck_forward_thread_is_found_though_it_beats() -> None:
    group = healthy()
    group.wait_for(2, 2, -1)
    found, took_ms = group.run(10_000)
    assert found == [2]
    assert 800 <= took_ms <= CONFIG.deadline_ms


def test_a_stuck_rank_without_peers_is_found_though_nobody_waits_for_it() -> None:
    group = healthy(1)
    group.wait_for(-1)
    found, took_ms = group.run(5_000)
    assert found == [0]
    assert took_ms <= CONFIG.deadline_ms


def test_a_chain_of_waiting_leads_to_the_culprit() -> None:
    group = healthy(4)
    group.wait_for(1, 3, 1, -1)
    assert group.run(10_000)[0] == [3]


def test_two_culprits_are_found_together() -> None:
    group = healthy(4)
    group.wait_for(2, 3, -1, -1)
    assert sorted(group.run(1_000)[0]) == [2, 3]


def test_waiting_for_each_other_blames_nobody() -> None:
    """Beats are not simultaneous: two ranks may seem to wait for each other."""
    group = healthy(2)
    group.wait_for(1, 0)
    assert group.run(60_000)[0] == []


def test_a_busy_rank_is_not_suspected_for_thirty_deadlines() -> None:
    """A long compilation or a huge prefill: everybody waits for a rank that burns processor time."""
    group = healthy()
    group.wait_for(2, 2, -1)
    group.lives[2].burns = True
    assert group.run(29 * CONFIG.deadline_ms)[0] == []
    assert group.run(2 * CONFIG.deadline_ms)[0] == [2], "but not for ever"


def test_a_group_that_moves_suspects_nobody_however_they_wait() -> None:
    group = healthy()
    for life in group.lives[:2]:
        life.waits_for, life.burns = 2, False
    group.lives[2].burns = False
    assert group.run(60_000)[0] == []


def test_while_anybody_moves_nobody_is_blamed() -> None:
    group = healthy()
    group.wait_for(-1, 2, -1)
    group.lives[0].steps = True
    assert group.run(60_000)[0] == []


def test_where_nobody_waits_nobody_is_blamed() -> None:
    """All are in a long computation on the device, which costs no processor time."""
    group = healthy()
    group.wait_for(-1, -1, -1)
    assert group.run(60_000)[0] == []


def test_parked_ranks_beat_seldom_and_are_left_alone() -> None:
    group = healthy()
    for life in group.lives:
        life.steps, life.burns, life.parked = False, False, True
    for _ in range(60):
        assert group.pulse() == []
        for life in group.lives:
            life.silent = True
        for _ in range(20):
            assert group.pulse() == []
        for life in group.lives:
            life.silent = False


def test_a_parked_rank_that_is_silent_too_long_is_found() -> None:
    group = healthy()
    for life in group.lives:
        life.steps, life.burns, life.parked = False, False, True
    group.run(500)
    group.lives[1].silent = True
    found, took_ms = group.run(10_000)
    assert found == [1]
    assert 3_500 <= took_ms <= CONFIG.idle_factor * CONFIG.deadline_ms


def test_after_a_pause_the_clock_starts_anew() -> None:
    group = healthy()
    for life in group.lives:
        life.steps, life.burns, life.parked = False, False, True
    group.run(20_000)
    for life in group.lives:
        life.parked = False
    group.wait_for(2, 2, -1)
    found, took_ms = group.run(10_000)
    assert found == [2]
    assert took_ms >= 800, "what it did not do while parked does not count"


def test_a_rank_that_waited_long_for_its_seat_is_not_suspected_in_its_first_step() -> None:
    """Forming: one rank was ready early and sat idle, and the first beats say that somebody waits for it."""
    group = Group([Life(steps=False, burns=False) for _ in range(2)], starting={0, 1})
    assert group.run(30_000)[0] == []
    group.starting.clear()
    group.lives[0].waits_for = 1
    assert group.run(500)[0] == []
    assert group.run(1_000)[0] == [1]


def test_a_starting_rank_may_be_silent_before_its_first_beat_but_not_long_after() -> None:
    group = healthy()
    group.lives.append(Life(silent=True))
    group.starting.add(3)
    assert group.run(60_000)[0] == [], "it has its own, longer deadline"
    group.lives[3].silent = False
    group.pulse()
    group.lives[3].silent = True
    assert group.run(3_000)[0] == [], "an import may hold the interpreter lock"
    assert group.run(3_000)[0] == [3]


def test_the_own_absence_is_forgiven() -> None:
    """The run process itself was stopped or starved: all beats are late, and no rank is to blame."""
    group = healthy()
    for life in group.lives:
        life.silent = True
    for _ in range(20):
        assert group.pulse(late_ms=30_000) == []
    for life in group.lives:
        life.silent = False
    group.pulse()
    group.lives[1].silent = True
    found, took_ms = group.run(10_000)
    assert found == [1]
    assert took_ms <= CONFIG.deadline_ms


def test_beats_of_another_incarnation_are_no_sign_of_life() -> None:
    group = healthy()
    group.lives[1].silent = True
    suspected: list[Suspect] = []
    for _ in range(12):
        group.now_ms += PULSE_MS
        beats = tuple(
            MemberBeat(Member(rank, 1 if rank != 1 else 7), group.now_ms, 0, None, False)
            for rank in (0, 1, 2)
        )
        seated = tuple(Member(rank, 1) for rank in range(3))
        suspected += group.machine.step(Pulse(group.now_ms, seated, (), beats))
    assert [suspect.member for suspect in suspected] == [Member(1, 1)]


def test_a_lost_member_is_forgotten_and_its_successor_begins_anew() -> None:
    group = healthy(2)
    group.lives[1].silent = True
    assert group.run(2_000)[0] == [1]
    group.starting.add(1)
    seated = (Member(0, 1), Member(1, 2))
    beat = MemberBeat(Member(1, 2), 1, 1, None, False)
    assert group.machine.step(Pulse(group.now_ms + 100, seated, (), (beat,))) == []
    assert group.machine.suspected == set()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_healthy_ranks_with_ragged_beats_are_never_suspected(data: st.DataObject) -> None:
    """Beats and pulses come irregularly, ranks wait for each other in any way, and one at least gets on."""
    ranks = data.draw(st.integers(2, 4))
    group = Group([Life() for _ in range(ranks)])
    silence = [0] * ranks
    for _ in range(data.draw(st.integers(5, 25))):
        after_ms = data.draw(st.integers(50, 200))
        for rank, life in enumerate(group.lives):
            life.waits_for = data.draw(st.sampled_from([None, *range(ranks)]))
            life.silent = silence[rank] + after_ms < 500 and data.draw(st.booleans())
            silence[rank] = silence[rank] + after_ms if life.silent else 0
            life.steps = rank == 0 or data.draw(st.booleans())
            life.burns = data.draw(st.booleans())
        assert group.pulse(after_ms) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_culprit_behind_any_chain_is_found_in_time(data: st.DataObject) -> None:
    """Rank `culprit` hangs, dead to the world or beating; all others wait along some tree for it."""
    ranks = data.draw(st.integers(2, 8))
    order = data.draw(st.permutations(range(ranks)))
    culprit = order[0]
    group = healthy(ranks)
    waits = {rank: order[data.draw(st.integers(0, place))] for place, rank in enumerate(order[1:])}
    group.wait_for(*(waits.get(rank, -1) for rank in range(ranks)))
    group.lives[culprit].silent = data.draw(st.booleans())
    found, took_ms = group.run(5_000)
    assert found == [culprit]
    assert took_ms <= CONFIG.deadline_ms
