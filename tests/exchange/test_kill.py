"""Real processes over shared memory, on one host and on two with a carrier each, and SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import pytest

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.windows import Windows
from elastic_ep.wire.messages import Member
from tests.exchange.carriers import CarrierPair
from tests.exchange.group import DEADLINE_S
from tests.exchange.killable import Death, Done, Lost, Moment, Run, Start, rank_main
from tests.kit.bound import tied
from tests.kit.fused import needs_fused

SHAPE = ExchangeShape(
    num_ranks=4, max_tokens=48, hidden=256, top_k=2, slots_per_rank=2, operations_per_step=4
)
STEPS, STEPS_OF_HOSTS = 12, 7


@dataclass
class RankProcess:
    member: Member
    process: ForkServerProcess
    pipe: Connection

    def receive(self) -> Any:
        assert self.pipe.poll(DEADLINE_S), f"{self.member} does not answer"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.gone()

    def gone(self) -> None:
        self.process.join(DEADLINE_S)
        assert self.process.exitcode == -signal.SIGKILL
        self.pipe.close()


HOSTS = (0, 1, 1, 0)


class Processes:
    def __init__(self, shape: ExchangeShape, *, fused: bool, hosts: bool) -> None:
        self.shape = shape
        self._fused = fused
        self.ranks: dict[int, RankProcess] = {}
        self.step = 0
        self.pair = CarrierPair(shape, HOSTS) if hosts else None
        self.steps = STEPS_OF_HOSTS if hosts else STEPS
        self._fds = self.pair.fds if self.pair else [Windows.create(shape)]
        # Forked from a server that has imported torch once, and that has no threads.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "elastic_ep.exchange.fused"])
        self._incarnations = [0] * shape.num_ranks

    def join(self, *joiners: int) -> None:
        """New incarnations of `joiners` take part from `self.step` on."""
        for rank in joiners:
            windows = f"/proc/{os.getpid()}/fd/{self._fds[HOSTS[rank] if self.pair else 0]}"
            self._incarnations[rank] += 1
            member = Member(rank, self._incarnations[rank])
            mine, theirs = self._context.Pipe()
            process = self._context.Process(
                target=tied,
                args=(partial(rank_main, fused=self._fused), theirs, windows, self.shape, member),
            )
            process.start()
            theirs.close()
            self.ranks[rank] = RankProcess(member, process, mine)
        members = tuple(rank.member for rank in self.ranks.values())
        for peer in self.ranks.values():
            peer.pipe.send(Start(members))
        for peer in self.ranks.values():
            assert peer.receive() is None

    def run(self, steps: int) -> None:
        for rank in self.ranks.values():
            rank.pipe.send(Run(self.step, self.step + steps))
        self.step += steps

    def lose(self, number: int) -> None:
        """Tell the survivors that the process of this rank is gone."""
        lost = self.ranks.pop(number)
        for rank in self.ranks.values():
            rank.pipe.send(Lost(lost.member))

    def done(self) -> dict[int, Done]:
        """What each rank made of its run."""
        reports = {number: rank.receive() for number, rank in self.ranks.items()}
        assert all(isinstance(report, Done) for report in reports.values())
        return reports

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.process.kill()
        for rank in self.ranks.values():
            rank.process.join(DEADLINE_S)
            rank.process.close()
            rank.pipe.close()
        if self.pair:
            self.pair.close()
        else:
            os.close(self._fds[0])


IN_PYTHON = pytest.param((False, False), id="shm")
IN_CPP = pytest.param((True, False), id="fused", marks=needs_fused())
HOSTS_IN_PYTHON = pytest.param((False, True), id="two hosts")
HOSTS_IN_CPP = pytest.param((True, True), id="fused, two hosts", marks=needs_fused())


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    fused, hosts = request.param
    group = Processes(SHAPE, fused=fused, hosts=hosts)
    yield group
    group.close()


def run_cleanly(group: Processes) -> None:
    group.run(group.steps)
    assert group.done() == {rank: Done(good=group.steps) for rank in group.ranks}


@pytest.mark.parametrize("processes", [IN_CPP, HOSTS_IN_CPP], indirect=True)
def test_killed_at_every_point_of_a_step_and_back_again(processes: Processes) -> None:
    processes.join(*range(SHAPE.num_ranks))
    run_cleanly(processes)
    for operation in range(SHAPE.operations_per_step):
        for moment in Moment:
            victim = (operation + len(moment)) % SHAPE.num_ranks
            death = Death(processes.step + 3, operation, moment)
            processes.ranks[victim].pipe.send(Start((processes.ranks[victim].member,), death))
            assert processes.ranks[victim].receive() is None
            processes.run(processes.steps)
            processes.ranks[victim].gone()
            processes.lose(victim)
            for report in processes.done().values():
                check_poison(report, victim, death, processes.steps)
            run_cleanly(processes)
            processes.join(victim)
            run_cleanly(processes)


def check_poison(report: Done, victim: int, death: Death, steps: int) -> None:
    assert report.wrong == (), death
    assert report.good == steps - len(report.poisoned), death
    assert set(report.poisoned.values()) <= {frozenset({victim})}, death
    posted = death.operation + (death.moment is Moment.POSTED)
    if 0 < posted < SHAPE.operations_per_step:
        assert set(report.poisoned) == {death.step}, death
    else:  # at a boundary the loss may be heard in the step before, in the step after, or between them
        boundary = death.step + (posted > 0)
        assert set(report.poisoned) in ({boundary - 1}, {boundary}, set()), death


@pytest.mark.parametrize("processes", [IN_PYTHON, HOSTS_IN_PYTHON], indirect=True)
def test_killed_at_any_time(processes: Processes) -> None:
    dice = random.Random(7)
    processes.join(*range(SHAPE.num_ranks))
    steps = 60
    for _ in range(4):
        victim = dice.randrange(SHAPE.num_ranks)
        processes.run(steps)
        time.sleep(dice.random() * 0.15)  # anywhere in those steps
        processes.ranks[victim].kill()
        processes.lose(victim)
        for report in processes.done().values():
            assert report.wrong == ()
            assert set(report.poisoned.values()) <= {frozenset({victim})}
            assert len(report.poisoned) <= 1
            assert report.good + len(report.poisoned) == steps
        processes.join(victim)
        run_cleanly(processes)
