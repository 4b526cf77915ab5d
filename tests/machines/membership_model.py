"""A model of the whole group around the real membership, rank and mailbox code, for exhaustive search.

A state of the world is a flat tuple of small integers and tuples: each distinct controller, rank and message is
kept once and named by a number, and what a real machine does on an event is computed once per (machine state,
event). So the machines are the real ones and a step of the search costs only a few tuples.

What is left out, and why that loses nothing:

* A step's end and the next boundary are one action. A step can end when all its peers have begun it; that stays
  true once it is true, and its end has no effect but to allow the next boundary.
* What was on its way from a dead rank is forgotten when its death is noticed: the controller ignores it then.
* `Beat`s are delivered only to a rank that lacks something: to all others they mean nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.wire.messages import (
    Beat,
    Member,
    Numbered,
    Prepare,
    Published,
    RankState,
    Snapshot,
    SnapshotRequest,
)
from tests.machines.model_rank import RankModel, Violation, lost_between

ALIVE, DOOMED, DEAD, NOTICED, GONE = range(5)
"""A process: running; running but fenced; dead and nobody knows; noticed; nothing left of it."""
DEATHS, TIMEOUTS, WORK_CHANGES, LOSSES = range(4)
LIFE = ("alive", "fenced", "dead", "noticed", "gone")
UNSUBSCRIBED = -1
FREE_TICKS = 4
"""Timeouts in a row that a state may need until something moves; more is called stuck."""


def copy_controller(machine: MembershipMachine) -> MembershipMachine:
    new = type(machine)(machine.num_ranks, machine.placement, machine.config)
    for name, value in vars(machine).items():
        if name not in ("_handlers", "_recent", "placement", "config"):
            setattr(new, name, value)
    new.records = {rank: copy.copy(record) for rank, record in machine.records.items()}
    for record in new.records.values():
        record.lifecycle = copy.copy(record.lifecycle)
    return new


class World(NamedTuple):
    """One state. Numbers name what `Model` keeps; one entry per rank in each tuple."""

    controller: int
    head: int
    """The number of the newest PUB message."""
    log: tuple[int, ...]
    """The PUB messages that somebody has not had yet, up to `head`."""
    ranks: tuple[int, ...]
    life: tuple[int, ...]
    cursors: tuple[int, ...]
    up: tuple[tuple[int, ...], ...]
    down: tuple[tuple[int, ...], ...]
    budget: tuple[int, ...]
    """Deaths, timeouts, changes of work and lost PUB messages that may still happen, and what others count."""
    free_ticks: int = 0
    drains: int = 0
    """How often a rank may still be asked to leave."""
    hosts: int = -1
    """The hosts' machine and the other hosts, where there are several (`hosts_model.py`)."""
    far: tuple[Any, ...] = ()
    born: tuple[Any, ...] = ()
    unended: tuple[Any, ...] = ()
    arrived: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """What the search may do, and how often."""

    max_step: int
    deaths: int = 0
    timeouts: int = 0
    work_changes: int = 0
    losses: int = 0
    drains: int = 0
    """How often an operator asks a rank to leave; whoever was asked may be asked back."""
    relaunch: bool = False
    """Whether processes that have died go, so that their ranks may be launched again."""


class Model:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.controllers: list[MembershipMachine] = []
        self.ranks: list[RankModel] = []
        self.messages: list[Any] = []
        self._controller_ids: dict[Any, int] = {}
        self._rank_ids: dict[Any, int] = {}
        self._message_ids: dict[Any, int] = {}
        self._controller_steps: dict[tuple[int, Any], tuple[int, tuple[Any, ...]]] = {}
        self._rank_steps: dict[tuple[int, int, int], tuple[int, tuple[int, ...]] | Violation] = {}

    # Keeping things once

    def keep_controller(self, machine: MembershipMachine) -> int:
        return keep(machine, machine.state(), self._controller_ids, self.controllers)

    def keep_rank(self, rank: RankModel) -> int:
        return keep(rank, rank.key(), self._rank_ids, self.ranks)

    def keep_message(self, message: Any) -> int:
        return keep(message, message, self._message_ids, self.messages)

    # The real machines, each transition computed once

    def _step_controller(self, controller: int, event: Any) -> tuple[int, tuple[Any, ...]]:
        key = (controller, event)
        if key not in self._controller_steps:
            machine = copy_controller(self.controllers[controller])
            effects = tuple(machine.step(event))
            try:
                machine.check()
            except AssertionError as error:
                raise Violation(f"controller: {error}") from error
            self._controller_steps[key] = (self.keep_controller(machine), effects)
        return self._controller_steps[key]

    def _step_rank(self, rank: int, message: int, number: int) -> tuple[int, tuple[int, ...]]:
        """`message` None-like -1: the forward thread's boundary; number -1: a direct message."""
        key = (rank, message, number)
        if key not in self._rank_steps:
            model = self.ranks[rank].copy()
            try:
                if message == -1:
                    model.boundary()
                elif number == -1:
                    model.hear(self.messages[message])
                else:
                    model.hear(Numbered(number, self.messages[message]))
                out = tuple(self.keep_message(item) for item in model.out)
                model.out = []
                self._rank_steps[key] = (self.keep_rank(model), out)
            except Violation as violation:
                self._rank_steps[key] = violation
            except AssertionError as error:
                self._rank_steps[key] = Violation(f"rank: {error}")
        found = self._rank_steps[key]
        if isinstance(found, Violation):
            raise found
        return found

    # Actions

    def successors(self, world: World) -> Iterator[tuple[Any, Callable[[], World]]]:
        """Every enabled action: a label and what to call for the state after it (may raise `Violation`)."""
        deaths, timeouts, work_changes, losses = world.budget[:4]
        for rank in range(len(world.ranks)):
            life = world.life[rank]
            if life in (ALIVE, DOOMED):
                yield from self._rank_actions(world, rank, losses)
                if life == DOOMED or deaths:
                    yield ("dies", rank), lambda rank=rank: self._die(world, rank)  # type: ignore[misc]  # bound now
            if life == DEAD:
                yield ("death noticed", rank), lambda rank=rank: self._notice(world, rank)  # type: ignore[misc]  # bound now
            if life == NOTICED and self.bounds.relaunch:
                yield ("gone", rank), lambda rank=rank: self._gone(world, rank)  # type: ignore[misc]  # bound now
            if world.up[rank]:
                yield ("heard from", rank), lambda rank=rank: self._hear(world, rank)  # type: ignore[misc]  # bound now
        machine = self.controllers[world.controller]
        if timeouts and machine.attempt is not None:
            yield ("timeout", -1), lambda: self._tick(world, free=False)
        yield from self._wishes(world, machine)
        if work_changes:
            yield ("work", not machine.has_work), lambda: self._change_work(world)

    def _wishes(self, world: World, machine: MembershipMachine) -> Iterator[tuple[Any, Callable[[], World]]]:
        """What an operator may ask for, and what the router says of a rank that drains."""
        for rank, record in machine.records.items():
            if rank in machine.retired:
                back = ev.ReturnRequested((rank,))
                yield ("asked back", rank), lambda back=back: self._tell_controller(world, back)  # type: ignore[misc]  # bound now
            elif world.drains and len(machine.retired) + 1 < len(machine.records):
                retire = ev.RetireRequested((rank,), 1)
                yield (
                    ("drain", rank),
                    lambda retire=retire: self._tell_controller(
                        world._replace(drains=world.drains - 1), retire
                    ),  # type: ignore[misc]  # bound now
                )
            if rank in machine.leaving:
                drained = ev.RankDrained(record.member)
                yield ("drained", rank), lambda drained=drained: self._tell_controller(world, drained)  # type: ignore[misc]  # bound now

    def _rank_actions(
        self, world: World, rank: int, losses: int
    ) -> Iterator[tuple[Any, Callable[[], World]]]:
        cursor = world.cursors[rank]
        if self._may_step(world, rank):
            yield ("boundary", rank), lambda: self._boundary(world, rank)
        if cursor == UNSUBSCRIBED:
            yield ("subscribes", rank), lambda: self._with_cursor(world, rank, world.head)
        elif cursor < world.head:
            yield ("PUB", rank), lambda: self._deliver(world, rank)
            if losses:
                yield ("PUB lost", rank), lambda: self._lose(world, rank)
        elif self._lacks(world, rank):
            yield ("beat", rank), lambda: self._beat(world, rank)
        if world.down[rank]:
            yield ("snapshot", rank), lambda: self._direct(world, rank)

    def _may_step(self, world: World, rank: int) -> bool:
        model = self.ranks[world.ranks[rank]]
        if not model.in_step:
            return model.step <= self.bounds.max_step
        if model.step >= self.bounds.max_step:
            return False
        return all(
            self._has_sent(world, peer, model)
            for peer in model.begun[-1].active - model.machine.masked
            if peer != model.machine.me
        )

    def _has_sent(self, world: World, peer: Member, to: RankModel) -> bool:
        model = self.ranks[world.ranks[peer.rank]]
        if model.machine.me != peer:
            return False
        return any(each.step == to.step and to.machine.me in each.active for each in model.begun)

    def _boundary(self, world: World, rank: int) -> World:
        after, _ = self._step_rank(world.ranks[rank], -1, -1)
        model = self.ranks[after]
        if model.in_step:
            self._check_no_split(world, rank, model)
        return world._replace(ranks=with_item(world.ranks, rank, after))

    def _check_no_split(self, world: World, rank: int, model: RankModel) -> None:
        """Whoever runs this step too runs it with the same members, but for those that one of the two holds for lost.

        Checked when a step begins, which is sooner than its commit: masks only grow. A rank that missed both the
        coming and the going of a member never masks it, but its newer view says the same.
        """
        step, active = model.begun[-1]
        for other, life in enumerate(world.life):
            if other == rank or life not in (ALIVE, DOOMED):
                continue
            peer = self.ranks[world.ranks[other]]
            excused = (
                model.machine.masked
                | peer.machine.masked
                | lost_between(model, peer)
                | lost_between(peer, model)
            )
            me, it = model.machine.me, peer.machine.me
            for theirs in peer.begun:
                if theirs.step == step and not (active ^ theirs.active) <= excused:
                    raise Violation(
                        f"split: step {step} runs with {sorted(active)} on {me} "
                        f"and with {sorted(theirs.active)} on {it}"
                    )
            past = bool(peer.begun) and peer.begun[0].step > step
            # Who is lost with its host may run on for a while, and begin what others have had without it.
            if past and it in active - excused and me not in lost_between(model, peer):
                raise Violation(f"split: {it} is past step {step}, which {me} begins with it")

    def _deliver(self, world: World, rank: int) -> World:
        number = world.cursors[rank] + 1
        body = world.log[number - world.head - 1]
        after, out = self._step_rank(world.ranks[rank], body, number)
        return self._with_cursor(self._rank_moved(world, rank, after, out), rank, number)

    def _lose(self, world: World, rank: int) -> World:
        world = spent(world, LOSSES)
        return self._with_cursor(world, rank, world.cursors[rank] + 1)

    def _lacks(self, world: World, rank: int) -> bool:
        """Whether a beat would tell this rank something, and no answer is on its way already."""
        model = self.ranks[world.ranks[rank]]
        if model.machine._subscribed and model.machine.number == world.head:
            return False
        asked = any(isinstance(self.messages[item], SnapshotRequest) for item in world.up[rank])
        return not model.machine._subscribed or not (asked or world.down[rank])

    def _beat(self, world: World, rank: int) -> World:
        after, out = self._step_rank(world.ranks[rank], self.keep_message(Beat()), world.head)
        return self._rank_moved(world, rank, after, out)

    def _direct(self, world: World, rank: int) -> World:
        first, *rest = world.down[rank]
        after, out = self._step_rank(world.ranks[rank], first, -1)
        world = world._replace(down=with_item(world.down, rank, tuple(rest)))
        return self._rank_moved(world, rank, after, out)

    def _rank_moved(self, world: World, rank: int, after: int, out: tuple[int, ...]) -> World:
        world = world._replace(
            ranks=with_item(world.ranks, rank, after),
            up=with_item(world.up, rank, world.up[rank] + out),
            free_ticks=0,
        )
        if self.ranks[after].stopping:
            return self.fence(world, self.ranks[after].machine.me)  # it may run on for a while, and ends
        return self.expelled(world, rank) if self.ranks[after].expelled else world

    def expelled(self, world: World, rank: int) -> World:
        """Such a rank ends; and it should not be: whoever is not in the view any more is dead."""
        raise Violation(f"{self.ranks[world.ranks[rank]].machine.me} lives and is expelled")

    def _die(self, world: World, rank: int) -> World:
        if world.life[rank] == ALIVE:
            world = spent(world, DEATHS)
        world = world._replace(life=with_item(world.life, rank, DEAD), down=with_item(world.down, rank, ()))
        return self._with_cursor(world, rank, UNSUBSCRIBED)

    def _notice(self, world: World, rank: int) -> World:
        member = self.ranks[world.ranks[rank]].machine.me
        world = world._replace(life=with_item(world.life, rank, NOTICED), up=with_item(world.up, rank, ()))
        return self._tell_controller(world, ev.DeathNoticed(member, "killed"))

    def _gone(self, world: World, rank: int) -> World:
        member = self.ranks[world.ranks[rank]].machine.me
        world = world._replace(life=with_item(world.life, rank, GONE))
        return self._tell_controller(world, ev.ProcessGone(member, "SIGKILL"))

    def _hear(self, world: World, rank: int) -> World:
        first, *rest = world.up[rank]
        world = world._replace(up=with_item(world.up, rank, tuple(rest)))
        message = self.messages[first]
        if not isinstance(message, SnapshotRequest):
            return self._tell_controller(world, message)
        if world.life[rank] == DEAD:
            return world
        machine = self.controllers[world.controller]
        attempt = machine.attempt
        prepare = Prepare(attempt.number, tuple(sorted(attempt.joiners))) if attempt else None
        snapshot = self.keep_message(Snapshot(world.head, machine.view, prepare))
        return world._replace(down=with_item(world.down, rank, (*world.down[rank], snapshot)))

    def _tick(self, world: World, free: bool) -> World:
        deadline = self.controllers[world.controller].next_deadline_ms()
        assert deadline is not None
        world = world._replace(free_ticks=world.free_ticks + 1) if free else spent(world, TIMEOUTS)
        return self._tell_controller(world, Tick(deadline))

    def _change_work(self, world: World) -> World:
        began = not self.controllers[world.controller].has_work
        world = spent(world, WORK_CHANGES)
        return self._tell_controller(world, ev.WorkBegan() if began else ev.WorkEnded())

    def _tell_controller(self, world: World, event: Any) -> World:
        before = self.controllers[world.controller].view.epoch
        controller, effects = self._step_controller(world.controller, event)
        if self.controllers[controller].view.epoch < before:
            raise Violation("the epoch went back")
        world = world._replace(controller=controller)
        for effect in effects:
            match effect:
                case ev.Publish(body):
                    world = self._publish(world, body)
                case ev.Fence(member, _):
                    world = self.fence(world, member)
                case ev.Launch(member):
                    world = self.launch(world, member)
        return world

    def fence(self, world: World, member: Member) -> World:
        if world.life[member.rank] == ALIVE:
            world = world._replace(life=with_item(world.life, member.rank, DOOMED))
        return world

    def _publish(self, world: World, body: Published) -> World:
        return world._replace(head=world.head + 1, log=(*world.log, self.keep_message(body)))

    def launch(self, world: World, member: Member) -> World:
        """A new process that has initialised its device and has not spoken to anybody yet."""
        rank = member.rank
        world = world._replace(
            ranks=with_item(world.ranks, rank, self.keep_rank(RankModel(member))),
            life=with_item(world.life, rank, ALIVE),
            cursors=with_item(world.cursors, rank, UNSUBSCRIBED),
            up=with_item(world.up, rank, (self.keep_message(SnapshotRequest()),)),
            down=with_item(world.down, rank, ()),
        )
        world = self._tell_controller(world, ev.ProcessStarted(member))
        return self._tell_controller(world, ev.Reported(member, RankState.INIT_DIST))

    def _with_cursor(self, world: World, rank: int, cursor: int) -> World:
        """Moves a rank's place in the log and forgets what everybody has had."""
        cursors = with_item(world.cursors, rank, cursor)
        oldest = min((each for each in cursors if each != UNSUBSCRIBED), default=world.head)
        keep = world.head - oldest
        return world._replace(cursors=cursors, log=world.log[-keep:] if keep else ())

    # The end of a path

    def after_quiet(self, world: World) -> World | None:
        """Where a world goes in which nothing but time can pass; None: it may stay. Raises `Violation`: stuck."""
        wrong = self._unfinished(world)
        if not wrong:
            return None
        if (
            world.free_ticks < FREE_TICKS
            and self.controllers[world.controller].next_deadline_ms() is not None
        ):
            return self._tick(world, free=True)
        raise Violation(f"stuck: {wrong}")

    def _unfinished(self, world: World) -> str:
        """What is wrong with staying in this world for ever; empty if nothing is."""
        machine = self.controllers[world.controller]
        if machine.config.relaunch_limit == 0:
            left = world.life.count(ALIVE) * machine.placement.slots_per_rank
            if (machine.verdict is not None) != (left < machine.placement.num_experts):
                return f"slots for {left} experts are left, and the verdict is {machine.verdict}"
            if machine.verdict:
                return ""
        if machine.attempt is not None:
            return f"attempt {machine.attempt.number} does not end"
        parked = machine.view.park_at is not None
        if parked and machine.has_work and machine.covered:
            return "parked with work to do"
        if not parked and not machine.has_work and machine.view.seats:
            return "never parks"
        for rank, life in enumerate(world.life):
            if life != ALIVE:
                continue
            model = self.ranks[world.ranks[rank]]
            me = model.machine.me
            if me not in machine.view.members:
                return f"{me} is never admitted"
            if model.step < self.bounds.max_step and not (parked and model.mailbox.waiting_at is not None):
                return f"{me} does not get past step {model.step}"
        return ""

    # Showing

    def describe(self, world: World) -> str:
        machine = self.controllers[world.controller]
        lines = [f"controller: {machine.view}, attempt {machine.attempt}, work {machine.has_work}"]
        for rank, (key, life) in enumerate(zip(world.ranks, world.life, strict=True)):
            model = self.ranks[key]
            lines.append(
                f"  rank {rank} {LIFE[life]}: step {model.step} in_step {model.in_step} "
                f"hold_at {model.mailbox.hold_at} promised {model.promised} epoch {model.view.epoch}"
            )
        return "\n".join(lines)


def spent(world: World, what: int) -> World:
    return world._replace(budget=with_item(world.budget, what, world.budget[what] - 1))


def with_item(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def keep(thing: Any, key: Any, ids: dict[Any, int], things: list[Any]) -> int:
    number = ids.get(key)
    if number is None:
        number = ids[key] = len(things)
        things.append(thing)
    return number
