"""1,024 ranks on 128 hosts over weeks, by the machines that a real group runs: what do losses cost it?

    python -m bench.simulate [--days 54] [--hosts 128] [--per-host 8] [--times 1] [--seed 1] [--out FILE]

No process is started and no time passes: ranks, hosts, links and racks are a queue of events, and the membership and
repair machines are the real ones. Interruptions come as often as in Llama 3's training (419 that nobody had planned in
54 days on 16,384 GPUs; here for as many GPUs as there are ranks, times `--times`, and sixteen times as often), in about
its proportions: most are one GPU or one process, some a host, some a cable or a switch. Beside them a link of a host
is cut now and then, and of more than 32 hosts racks of sixteen are lost. How long things take is `Pace`.

Goodput is what the group computes, of what it would if nobody were ever lost: a rank that is away computes nothing; while
a death is noticed, and for the step that runs again then, nobody does; nor while an expert has no copy. Processor time
is what the machines take for all events that a loss leads to: until the view without the lost is out, which is all that
the others wait for, and from there until all its ranks are back, copies of experts included.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.kit.served import percentile, write_result

from bench.kit.command_line import command_line
from elastic_ep.machines.contract import Tick
from elastic_ep.machines.experts import events as rp
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.relaunch import HOST_LOST
from elastic_ep.placement import launch_placement
from elastic_ep.wire.messages import Commit, Member, Prepare, RankState, View

LAYERS, EXPERTS = 58, 256
"""DeepSeek-V3's. A slot a rank, which is four copies of each expert on 1,024 ranks; more if there are fewer ranks."""
INTERRUPTIONS, IN_DAYS, ON_GPUS = 419, 54, 16_384
CAUSES = {"a GPU": 0.59, "a process": 0.17, "a host": 0.13, "a cable or switch": 0.11}
"""Of all interruptions, in the report's proportions as its causes fall under these heads."""
CUTS_PER_HOST_DAY = 0.002
RACK_HOSTS = 16
RACKS_LOST = 2
"""In the whole time."""
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Pace:
    """Milliseconds."""

    step: int = 40
    notice_rank: int = 1
    """A rank's death, by its host's agent."""
    notice_host: int = 400
    """A host's, by its agent's silence."""
    gone: int = 50
    """Until nothing of a dead process is left."""
    gone_host: int = 2_000
    """Until a lease has surely run out."""
    start: int = 6_000
    """From a launch until a rank is ready to join."""
    spare: int = 30_000
    """Until another host, or GPU, stands in for one that is broken."""
    cut: int = 60_000
    """How long a link is cut."""
    rack: int = 600_000
    """Until hosts stand in for those of a rack."""
    promise: int = 3
    copy: int = 100
    """Of an expert's bytes."""


@dataclass
class Loss:
    cause: str
    ranks: tuple[int, ...]
    away_ms: int
    masked_s: float = 0.0
    """Processor time of the machines until the view without the lost is out, which the others wait for."""
    back_s: float = 0.0
    """And from then on until all are back."""
    waiting: set[int] = field(default_factory=set)


class Boundary:
    """Every rank passes one, with the newest placement."""


@dataclass(frozen=True)
class Stands:
    """What stands in for the machines of these ranks is there: those that wait for one are launched."""

    ranks: tuple[int, ...]


class Simulation:
    def __init__(self, hosts: int, per_host: int, pace: Pace) -> None:
        self.ranks = hosts * per_host
        self.pace = pace
        self.host = [rank // per_host for rank in range(self.ranks)]
        slots = -(-2 * EXPERTS // self.ranks)
        placement = launch_placement(
            self.ranks, LAYERS, EXPERTS, self.ranks * slots - EXPERTS, hosts=self.host
        )
        self.membership = MembershipMachine(self.ranks, placement)
        self.repair = RepairMachine(placement)
        self.now = 0
        self.queue: list[tuple[int, int, Any]] = []
        self.order = itertools.count()
        self.away_until = [0] * self.ranks
        """When a machine is there for the rank's next launch."""
        self.held: dict[int, Member] = {}
        """To be launched then."""
        self.losses: list[Loss] = []
        self.open: list[Loss] = []
        self.spent_s = 0.0
        self.computed = 0.0
        """Rank-milliseconds."""
        self.stalled_until = 0
        self.held_ms = 0
        self.least_tolerated = (self.ranks, hosts)
        self.tick_at: int | None = None
        self.boundary_due = False
        self._accounted = 0

    # Time

    def at(self, when: int, event: Any) -> None:
        heapq.heappush(self.queue, (when, next(self.order), event))

    def run(self, until: int) -> None:
        while self.queue and self.queue[0][0] <= until:
            when, _, event = heapq.heappop(self.queue)
            self.account(when)
            self.now = when
            if isinstance(event, Loss):
                self.lose(event)
            else:
                self.feed(event)
        self.account(until)

    def account(self, when: int) -> None:
        """What was computed since the last event."""
        held = not self.membership.covered
        busy = max(0, when - max(self._accounted, self.stalled_until))
        self.computed += 0 if held else busy * len(self.membership.view.seats)
        self.held_ms += when - self._accounted if held else 0
        self._accounted = when

    # The world

    def lose(self, loss: Loss) -> None:
        """All its ranks that run die; what stands in for their host is there when they are launched."""
        members = [self.membership.records[rank].member for rank in loss.ranks]
        alive = [m for m in members if not self.membership.records[m.rank].gone]
        for rank in loss.ranks:
            self.away_until[rank] = self.now + loss.away_ms
        self.at(self.now + loss.away_ms, Stands(loss.ranks))
        if not alive:
            return
        whole = len(loss.ranks) > 1
        notice = self.pace.notice_host if whole else self.pace.notice_rank
        self.stalled_until = max(self.stalled_until, self.now + notice + self.pace.step)
        loss.waiting = {member.rank for member in alive}
        self.losses.append(loss)
        self.open.append(loss)
        gone = self.pace.gone_host if whole else self.pace.gone
        if whole:
            by_host = itertools.groupby(alive, lambda member: self.host[member.rank])
            for _, some in by_host:
                self.at(self.now + notice, ev.HostLost(tuple(some), loss.cause))
        else:
            self.at(self.now + notice, ev.DeathNoticed(alive[0], loss.cause))
        for member in alive:
            status = HOST_LOST if whole else "signal 9"
            self.at(self.now + notice + gone, ev.ProcessGone(member, status))

    def feed(self, event: Any) -> None:
        began = time.process_time()
        effects: list[Any] = []
        if isinstance(event, rp.Copied):
            effects += self.placing(event)
        elif isinstance(event, Boundary):
            effects += self.boundary()
        elif isinstance(event, Stands):
            for member in [self.held.pop(rank) for rank in event.ranks if rank in self.held]:
                self.launch(member)
            effects += self.membership.step(ev.RelaunchRequested(event.ranks))
        else:
            effects += self.membership.step(Tick(self.now)) if not isinstance(event, Tick) else []
            effects += self.membership.step(event)
        published = time.process_time()
        if any(isinstance(e, ev.Publish) and isinstance(e.body, View | Commit) for e in effects):
            effects += self.placing(rp.MembersChanged(tuple(sorted(self.membership.view.members))))
        self.charge(event, published - began, time.process_time() - published)
        for effect in effects:
            self.perform(effect)
        due = self.membership.next_deadline_ms()
        if due is not None and due != self.tick_at:
            self.tick_at = due
            self.at(max(due, self.now + 1), Tick(max(due, self.now + 1)))

    def placing(self, *events: rp.Event) -> list[Any]:
        """What the repair machine makes of them, of which membership hears. Ranks see it at their next boundary."""
        effects: list[Any] = self.repair.step(Tick(self.now))
        for event in events:
            effects += self.repair.step(event)
        while self.repair.next_deadline_ms() == self.now:  # layers that are left
            effects += self.repair.step(Tick(self.now))
        for changed in [one.changed for one in effects if isinstance(one, rp.Replace)]:
            effects += self.membership.step(ev.Placed(changed.version, changed.changes))
            if not self.boundary_due:
                self.boundary_due = True
                self.at(self.now + self.pace.step, Boundary())
        return effects

    def boundary(self) -> list[Any]:
        self.boundary_due = False
        version = self.repair.placement.version
        return self.placing(*(rp.Seen(member, version) for member in sorted(self.repair.members)))

    def charge(self, event: Any, until_published: float, placing: float) -> None:
        """What a loss is told by counts until the view without the lost is out; the rest as what follows."""
        self.spent_s += until_published + placing
        lost = {*event.members} if isinstance(event, ev.HostLost) else set()
        if isinstance(event, ev.DeathNoticed):
            lost = {event.member}
        for loss in self.open:
            if loss.waiting & {member.rank for member in lost}:
                loss.masked_s += until_published
                loss.back_s += placing
                return
        for loss in self.open:
            loss.back_s += (until_published + placing) / len(self.open)

    def perform(self, effect: Any) -> None:
        match effect:
            case ev.Launch(member) if self.now < self.away_until[member.rank]:
                self.held[member.rank] = member
            case ev.Launch(member):
                self.launch(member)
            case ev.Fence(member):
                self.held.pop(member.rank, None)
                self.at(self.now + self.pace.gone, ev.ProcessGone(member, "signal 9"))
            case ev.Publish(Prepare(attempt, joiners)):
                self.promise(attempt, joiners)
            case ev.MemberUp(member):
                for loss in self.open:
                    loss.waiting.discard(member.rank)
                self.open = [loss for loss in self.open if loss.waiting]
                # The members connect beside their steps, and wait once at the joiner's first.
                self.stalled_until = max(self.stalled_until, self.now + self.pace.step)
            case ev.MemberDown():
                self.tolerated()
            case rp.Order(member, ticket, layer, _physical, logical):
                self.at(self.now + self.pace.copy, rp.Copied(member, ticket, 1000 * layer + logical))

    def launch(self, member: Member) -> None:
        self.at(self.now + 20, ev.ProcessStarted(member))
        for state, share in ((RankState.INIT_CUDA, 3), (RankState.INIT_DIST, 2), (RankState.JOINING, 1)):
            self.at(self.now + 20 + self.pace.start // share, ev.Reported(member, state))

    def promise(self, attempt: int, joiners: tuple[Member, ...]) -> None:
        step = self.now // self.pace.step
        for member in (*joiners, *self.membership.view.members):
            self.at(self.now + self.pace.promise, ev.Promised(member, attempt, step))

    def tolerated(self) -> None:
        copies, hosts = self.repair.counts().least()
        self.least_tolerated = min(self.least_tolerated, (copies - 1, hosts - 1))


def interruptions(
    simulation: Simulation, days: float, times: float, dice: random.Random
) -> Iterator[tuple[int, Loss]]:
    """When each comes, in no order."""
    host, pace = simulation.host, simulation.pace
    hosts = max(host) + 1
    per_day = INTERRUPTIONS / IN_DAYS / ON_GPUS * simulation.ranks * times

    def of_hosts(some: range) -> tuple[int, ...]:
        return tuple(rank for rank, there in enumerate(host) if there in some)

    def moments(mean: float) -> Iterator[int]:
        when = dice.expovariate(mean)
        while when < days:
            yield int(when * DAY_MS)
            when += dice.expovariate(mean)

    for when in moments(per_day):
        (cause,) = dice.choices([*CAUSES], [*CAUSES.values()])
        rank = dice.randrange(simulation.ranks)
        one = host[rank]
        if cause == "a process":
            yield when, Loss(cause, (rank,), 0)
        elif cause == "a GPU":
            yield when, Loss(cause, (rank,), pace.spare)
        else:
            yield when, Loss(cause, of_hosts(range(one, one + 1)), pace.spare)
    for when in moments(CUTS_PER_HOST_DAY * hosts):
        one = dice.randrange(hosts)
        yield when, Loss("a link cut", of_hosts(range(one, one + 1)), pace.cut)
    for _ in range(RACKS_LOST if hosts > 2 * RACK_HOSTS else 0):
        first = dice.randrange(hosts // RACK_HOSTS) * RACK_HOSTS
        yield (
            int(dice.random() * days * DAY_MS),
            Loss("a rack", of_hosts(range(first, first + RACK_HOSTS)), pace.rack),
        )


def started(hosts: int, per_host: int) -> Simulation:
    """All ranks serve."""
    simulation = Simulation(hosts, per_host, Pace())
    simulation.feed(ev.Start())
    simulation.feed(ev.WorkBegan())
    limit = 20 * Pace().start
    simulation.run(limit)
    assert len(simulation.membership.view.seats) == simulation.ranks, "not all ranks have come up"
    simulation.computed = simulation.spent_s = 0.0
    simulation.held_ms = 0
    simulation.now = limit
    return simulation


def simulate(hosts: int, per_host: int, days: float, times: float, seed: int) -> dict[str, Any]:
    simulation = started(hosts, per_host)
    begins = simulation.now
    for when, loss in interruptions(simulation, days, times, random.Random(seed)):
        simulation.at(begins + when, loss)
    simulation.run(begins + int(days * DAY_MS))
    by_cause: dict[str, list[Loss]] = {}
    for loss in simulation.losses:
        by_cause.setdefault(loss.cause, []).append(loss)
    full = simulation.ranks * days * DAY_MS
    return {
        "ranks": simulation.ranks,
        "hosts": hosts,
        "days": days,
        "times": times,
        "losses": len(simulation.losses),
        "ranks_lost": sum(len(loss.ranks) for loss in simulation.losses),
        "goodput": round(simulation.computed / full, 6),
        "held_s": round(simulation.held_ms / 1000, 1),
        "least_tolerated": dict(zip(("ranks", "hosts"), simulation.least_tolerated, strict=True)),
        "machines_ms_a_loss": {
            cause: {
                "losses": len(some),
                "until_masked": _ms(some, "masked_s"),
                "until_back": _ms(some, "back_s"),
            }
            for cause, some in sorted(by_cause.items())
        },
        "machines_s": round(simulation.spent_s, 2),
    }


def _ms(losses: list[Loss], what: str) -> dict[str, float]:
    values = [1000 * getattr(loss, what) for loss in losses]
    return {
        "mean": round(statistics.mean(values), 2),
        "p50": round(percentile(values, 0.5), 2),
        "max": round(max(values), 2),
    }


def main() -> None:
    parser = command_line(__doc__, "simulate")
    parser.add_argument("--hosts", type=int, default=128)
    parser.add_argument("--per-host", type=int, default=8)
    parser.add_argument("--days", type=float, default=54.0)
    parser.add_argument("--times", type=float, default=1.0, help="so much more often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    runs = [
        simulate(options.hosts, options.per_host, options.days, times, options.seed)
        for times in sorted({options.times, 16 * options.times})
    ]
    for run in runs:
        print(
            f"{run['losses']} losses of {run['ranks_lost']} ranks in {run['days']:g} days: goodput {run['goodput']:.4%}, "
            f"held {run['held_s']:g} s"
        )
        for cause, took in run["machines_ms_a_loss"].items():
            print(f"  {cause}: {took['losses']}, machines until masked, ms: {took['until_masked']}, until back: "
                  f"{took['until_back']}")  # fmt: skip
    write_result(options.out, {"pace_ms": asdict(Pace()), "runs": runs})


if __name__ == "__main__":
    main()
