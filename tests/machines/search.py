"""Exhaustive search of the membership protocol: breadth first, so that a counterexample is a shortest one.

`test_membership_search.py` runs the cases below as they are. To let every case run more steps:

    python tests/machines/search.py --deeper 1 [--only NAME]

Proved within the bounds of each case, in every interleaving:

* no split: two members that run the same step do so with the same peers, but for those that one of them holds for
  lost;
* no broken word: no rank begins a step that it promised to hold before, until that attempt is over;
* nothing gets stuck: every path ends with all live ranks seated and at the last step, or parked for want of work or
  of an expert; a wait for a deadline must lead there too;
* who is asked to leave ends by itself, and takes no expert's last copy with it;
* where ranks stay away, it is said that nothing will serve exactly when too few are left for all experts;
* the machines' own `check()`s, and that epochs only grow and no live rank is expelled.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, replace
from typing import Any

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.placement import launch_placement
from elastic_ep.timing import MembershipConfig
from elastic_ep.wire.messages import Member, RankState
from tests.machines.membership_model import GONE, UNSUBSCRIBED, Bounds, Model, World
from tests.machines.model_rank import Violation

MODEL_CONFIG = MembershipConfig(
    attempt_deadline_ms=10,
    park_after_ms=0,
    stable_after_ms=1_000_000,
    relaunch_limit=1,
    relaunch_backoff_ms=1,
    forming_grace_ms=1,
    init_deadline_ms=1_000_000,
)
"""Short, but the order is what matters: in the model any deadline may pass at any time."""


@dataclass(frozen=True)
class Case:
    """`members` of `num_ranks` serve at the start, the others join; each expert has `redundant` + 1 copies."""

    name: str
    num_ranks: int
    members: int
    bounds: Bounds
    redundant: int = 1
    joiners_ready: bool = True
    relaunch_limit: int = 1

    def run(self, deeper: int = 0) -> tuple[Model, Found]:
        model = Model(replace(self.bounds, max_step=self.bounds.max_step + deeper))
        return model, search(model, serving(model, self))


CASES = (
    Case("join, one death", 3, 2, Bounds(max_step=2, deaths=1)),
    Case("join, two deaths", 3, 2, Bounds(max_step=0, deaths=2)),
    Case("join, timeout", 3, 2, Bounds(max_step=1, timeouts=1)),
    Case("join, work ends", 3, 2, Bounds(max_step=1, work_changes=1)),
    Case("two join one", 3, 1, Bounds(max_step=1)),
    Case("one joins three", 4, 3, Bounds(max_step=2)),
    Case("lose one of three, take it back", 3, 3, Bounds(max_step=3, deaths=1, relaunch=True)),
    Case("lose two, take them back", 2, 2, Bounds(max_step=1, deaths=2, relaunch=True)),
    Case("park and go on", 2, 1, Bounds(max_step=1, deaths=1, work_changes=2)),
    Case("expert lost and found", 2, 2, Bounds(1, deaths=1, work_changes=1, relaunch=True), redundant=0),
    Case("lost messages", 2, 2, Bounds(2, deaths=1, timeouts=1, losses=1, relaunch=True)),
    Case("who dies stays away", 3, 3, Bounds(1, deaths=2, relaunch=True), relaunch_limit=0),
    Case("one leaves and comes back", 2, 2, Bounds(max_step=2, drains=1, relaunch=True)),
    Case("one leaves, one dies", 3, 3, Bounds(max_step=0, deaths=1, drains=1)),
    Case("one leaves while one joins", 3, 2, Bounds(max_step=0, drains=1)),
    Case("one leaves, lost messages", 2, 2, Bounds(max_step=2, losses=1, drains=1)),
    Case("the last copy does not leave", 2, 2, Bounds(1, drains=1), redundant=0),
    Case("late joiner, lost messages", 2, 1, Bounds(2, timeouts=1, losses=2), joiners_ready=False),
)


@dataclass(frozen=True)
class Found:
    """`trace` leads from the start to the violation; None: there is none within the bounds."""

    states: int
    transitions: int
    seconds: float
    violation: str = ""
    trace: tuple[str, ...] = ()
    ends: int = 0
    """States in which nothing more can happen."""

    def __str__(self) -> str:
        lines = [
            f"{self.states} states, {self.transitions} transitions, {self.ends} ends, {self.seconds:.1f} s"
        ]
        if self.violation:
            lines += [f"VIOLATION: {self.violation}", *self.trace]
        return "\n".join(lines)


def serving(model: Model, case: Case) -> World:
    """The members serve and are about to begin step 0. The joiners have just been launched; if `joiners_ready`, they
    have had a snapshot and are about to say that they can join."""
    num_ranks, members = case.num_ranks, case.members
    placement = launch_placement(num_ranks, 1, num_ranks, case.redundant * num_ranks)
    config = replace(MODEL_CONFIG, relaunch_limit=case.relaunch_limit)
    controller = MembershipMachine(num_ranks, placement, config)
    empty: tuple[Any, ...] = ((),) * num_ranks
    blank = (0,) * num_ranks
    cursors = (UNSUBSCRIBED,) * num_ranks
    world = World(0, 0, (), blank, (GONE,) * num_ranks, cursors, empty, empty, (0, 0, 0, 0))
    world = world._replace(controller=model.keep_controller(controller))
    for event in (ev.Start(), ev.WorkBegan()):
        world = model._tell_controller(world, event)
    for rank in range(members):
        world = _settle(model, world, rank)
    world = model._tell_controller(world, Tick(1))
    for _ in range(2):
        for rank in range(members):
            world = _settle(model, world, rank)
    for rank in range(members, num_ranks if case.joiners_ready else 0):
        world = _settle(model, world, rank, until_ready=True)
    machine = model.controllers[world.controller]
    assert machine.view.members == {Member(rank, 1) for rank in range(members)}
    bounds = model.bounds
    budget = (bounds.deaths, bounds.timeouts, bounds.work_changes, bounds.losses)
    return world._replace(budget=budget, drains=bounds.drains)


def _settle(model: Model, world: World, rank: int, until_ready: bool = False) -> World:
    """Let one rank hear and be heard until there is nothing more to say, or until it is about to report Joining."""
    quiet = ("boundary", "work", "timeout")
    while not (until_ready and model.ranks[world.ranks[rank]].machine.stage is RankState.JOINING):
        enabled = [
            act for label, act in model.successors(world) if label[0] not in quiet and label[1] == rank
        ]
        if not enabled:
            return world
        world = enabled[0]()
    return world


def search(model: Model, start: World, max_states: int = 10_000_000) -> Found:
    """Visit every state reachable from `start`. Stops at the first violation."""
    gc.disable()
    try:
        return _search(model, start, max_states)
    finally:
        gc.enable()


def _search(model: Model, start: World, max_states: int) -> Found:
    began = time.monotonic()
    parents: dict[World, tuple[World, Any] | None] = {start: None}
    frontier = [start]
    transitions = ends = 0

    def found(violation: str = "", last: World | None = None, label: Any = "") -> Found:
        seconds = time.monotonic() - began
        trace = _trace(model, parents, last, label) if last else ()
        return Found(len(parents), transitions, seconds, violation, trace, ends)

    while frontier:
        following = []
        for world in frontier:
            moved = False
            for label, act in model.successors(world):
                try:
                    after = act()
                except Violation as violation:
                    return found(str(violation), world, label)
                transitions += 1
                if after == world:
                    continue
                moved = True
                if after not in parents:
                    parents[after] = (world, label)
                    following.append(after)
            if not moved:
                ends += 1
                try:
                    later = model.after_quiet(world)
                except Violation as violation:
                    return found(str(violation), world, ("nothing more", -1))
                if later is not None and later not in parents:
                    parents[later] = (world, ("time passes", -1))
                    following.append(later)
        if len(parents) > max_states:
            return found(f"more than {max_states} states")
        frontier = following
    return found()


def _trace(model: Model, parents: dict[World, Any], last: World, label: Any) -> tuple[str, ...]:
    lines = [model.describe(last), f"-> {label[0]} {label[1]}"]
    world = last
    while (step := parents[world]) is not None:
        world, label = step
        lines.append(f"{label[0]} {label[1]}")
    return tuple(reversed(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Search the membership protocol beyond the bounds of the test."
    )
    parser.add_argument("--deeper", type=int, default=0, help="more steps per case")
    parser.add_argument("--only", help="the case of this name")
    options = parser.parse_args()
    for case in CASES:
        if options.only in (None, case.name):
            _, found = case.run(options.deeper)
            bounds = replace(case.bounds, max_step=case.bounds.max_step + options.deeper)
            print(f"{case.name}: {found} ({case.members} of {case.num_ranks} ranks, {bounds})", flush=True)


if __name__ == "__main__":
    main()
