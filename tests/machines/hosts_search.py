"""Exhaustive search of a group on several hosts, beside `search.py`: hosts lost, links cut, leases, other machines.

`test_hosts_search.py` runs the cases below as they are; `python tests/machines/hosts_search.py --deeper 1` lets each run
more steps, `--large` the larger ones too. Beside what `search.py` proves:

* no rank is launched while an incarnation before it may be at work, on whichever machine;
* a group all of whose links are mended comes to full strength by itself;
* the hosts' machine gives no number to two.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.placement import launch_placement
from tests.machines.hosts_model import IN, Far, HostsModel
from tests.machines.membership_model import GONE, UNSUBSCRIBED, Bounds, World
from tests.machines.search import MODEL_CONFIG, Found, search

BUDGETED = ("boundary", "work", "timeout", "dies", "PUB lost")
"""What the start does without."""


@dataclass(frozen=True)
class HostsCase:
    """`hosts[rank]`; so many `machines` want the numbers beside 0. `unheard`: signs of life that may be lost;
    `late`: beats in which what is said may not be heard. `grows`: by so many of these hosts, which come later."""

    name: str
    hosts: tuple[int, ...]
    bounds: Bounds
    machines: int = 1
    cuts: int = 0
    host_deaths: int = 0
    unheard: int = 0
    late: int = 0
    grows: int = 0

    @property
    def at_start(self) -> int:
        return len(set(self.hosts)) - self.grows

    def run(self, deeper: int = 0, max_states: int = 10_000_000) -> tuple[HostsModel, Found]:
        """Without `relaunch` nothing that is lost comes back."""
        model = HostsModel(
            replace(self.bounds, max_step=self.bounds.max_step + deeper), self.hosts, self.at_start
        )
        return model, search(model, serving(model, self), max_states)


CASES = (
    HostsCase("a host dies", (0, 1), Bounds(1, relaunch=True), host_deaths=1),
    HostsCase("a link is cut", (0, 1), Bounds(1, relaunch=True), cuts=1),
    HostsCase("a link is cut, a spare waits", (0, 1), Bounds(0, relaunch=True), machines=2, cuts=1),
    HostsCase("signs of life are lost", (0, 1), Bounds(0, relaunch=True), host_deaths=1, unheard=1),
    HostsCase("two ranks a host, dies", (0, 1, 1), Bounds(1), host_deaths=1),
    HostsCase("two ranks a host, cut", (0, 1, 1), Bounds(0), cuts=1),
    HostsCase("grows, and that host dies", (0, 1), Bounds(1, relaunch=True), grows=1, host_deaths=1),
    HostsCase("grows over a link that is cut", (0, 1), Bounds(1, relaunch=True), grows=1, cuts=1),
)
LARGE = (
    HostsCase("late answers", (0, 1), Bounds(-1, relaunch=True), machines=2, cuts=2, late=1),
    HostsCase("cut, and a rank dies", (0, 1), Bounds(1, deaths=1, relaunch=True), cuts=1),
    HostsCase("cut twice", (0, 1), Bounds(1, relaunch=True), cuts=2),
    HostsCase("cut, two ranks a host", (0, 1, 1), Bounds(1, relaunch=True), cuts=1),
    HostsCase("three hosts, one cut", (0, 1, 2), Bounds(1, relaunch=True), machines=2, cuts=1),
)


def serving(model: HostsModel, case: HostsCase) -> World:
    """All ranks but those to grow by serve and are about to begin step 0; machines beyond the group's numbers wait."""
    bounds, num_ranks = model.bounds, len(case.hosts)
    placement = launch_placement(num_ranks, 1, num_ranks, num_ranks, hosts=case.hosts)
    config = replace(MODEL_CONFIG, relaunch_limit=1 if case.bounds.relaunch else 0)
    at_start = sum(host < case.at_start for host in case.hosts)
    controller = MembershipMachine(at_start, placement, config)
    hosts, far = model.first(case.machines - case.grows)
    empty: tuple[tuple[int, ...], ...] = ((),) * num_ranks
    born = tuple((-1, 0) if host == 0 else (0, 0) for host in case.hosts)
    world = World(
        0, 0, (), (0,) * num_ranks, (GONE,) * num_ranks, (UNSUBSCRIBED,) * num_ranks, empty, empty, (0,) * 8
    )
    world = world._replace(controller=model.keep_controller(controller), hosts=hosts, far=far, born=born)
    for event in (ev.Start(), ev.WorkBegan()):
        world = model._tell_controller(world, event)
    model.bounds = replace(bounds, relaunch=True)
    while act := next((act for label, act in model.successors(world) if label[0] not in BUDGETED), None):
        world = act()
    assert len(model.controllers[world.controller].view.seats) == at_start
    assert sum(far.phase == IN for far in world.far) == case.at_start - 1
    world = world._replace(far=world.far + (Far(),) * case.grows)
    model.bounds = bounds
    budget = (bounds.deaths, bounds.timeouts, bounds.work_changes, bounds.losses)
    return world._replace(budget=(*budget, case.cuts, case.host_deaths, case.unheard, case.late))


def main() -> None:
    parser = argparse.ArgumentParser(description="Search a group on several hosts beyond the test's bounds.")
    parser.add_argument("--deeper", type=int, default=0, help="more steps per case")
    parser.add_argument("--large", action="store_true", help="the cases that take minutes, too")
    parser.add_argument("--only", help="the case of this name")
    options = parser.parse_args()
    for case in (*CASES, *(LARGE if options.large or options.only else ())):
        if options.only in (None, case.name):
            _, found = case.run(options.deeper)
            print(f"{case.name}: {found} ({case})", flush=True)


if __name__ == "__main__":
    main()
