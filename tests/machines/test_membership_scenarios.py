"""Golden transcripts of the membership machine: `tests/scenarios/membership/*.txt`.

Lines that begin with `> ` are events, the indented lines after each are its effects; `#` begins a comment. To
write the effects anew after a deliberate change, and then to read the difference in git:

    python tests/machines/test_membership_scenarios.py --update

The words of the events (a member is rank/incarnation):

    config ranks=3 redundant=3 park_after_ms=300     any field of MembershipConfig; first line only; one expert a rank
    start
    started 0/1, report 0/1 Joining, report 0/1 Failed no memory
    ready 0/1                                        it is launched and reports everything up to Joining
    promise 0/1 1 7                                  attempt and step
    dead 0/1 killed, gone 0/1 signal 9, suspect 0/1 hang
    relaunch 0 1                                     an operator wants these ranks back
    retire 500 0 1, back 0 1, drained 0/1            ranks are to go within so many milliseconds, and to come back
    work, idle, seen 7, tick 1000                    tick: milliseconds since the start
    stop, stop ranks, stop forced
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.placement import launch_placement
from elastic_ep.timing import MembershipConfig
from elastic_ep.wire.messages import Abort, Commit, Member, Prepare, Published, RankState, View

FOLDER = Path(__file__).parents[1] / "scenarios" / "membership"


def parse_events(text: str) -> list[ev.Event]:
    word, *rest = text.split()
    match word, rest:
        case "start", []:
            return [ev.Start()]
        case "started", [member]:
            return [ev.ProcessStarted(_member(member))]
        case "report", [member, state, *reason]:
            return [ev.Reported(_member(member), RankState(state), " ".join(reason))]
        case "ready", [member]:
            states = (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING)
            return [ev.Reported(_member(member), state) for state in states]
        case "promise", [member, attempt, step]:
            return [ev.Promised(_member(member), int(attempt), int(step))]
        case "dead", [member, *cause]:
            return [ev.DeathNoticed(_member(member), " ".join(cause))]
        case "gone", [member, *status]:
            return [ev.ProcessGone(_member(member), " ".join(status))]
        case "relaunch", ranks:
            return [ev.RelaunchRequested(tuple(map(int, ranks)))]
        case "retire", [patience_ms, *ranks]:
            return [ev.RetireRequested(tuple(map(int, ranks)), int(patience_ms))]
        case "back", ranks:
            return [ev.ReturnRequested(tuple(map(int, ranks)))]
        case "drained", [member]:
            return [ev.RankDrained(_member(member))]
        case "suspect", [member, *reason]:
            return [ev.Suspected(_member(member), " ".join(reason))]
        case "seen", [step]:
            return [ev.StepSeen(int(step))]
        case "tick", [now_ms]:
            return [Tick(int(now_ms))]
    plain: dict[str, ev.Event] = {
        "work": ev.WorkBegan(),
        "idle": ev.WorkEnded(),
        "stop": ev.StopRequested(),
        "stop ranks": ev.StopRanks(),
        "stop forced": ev.StopForced(),
    }
    return [plain[text]]


def show(effect: ev.Effect) -> str:
    match effect:
        case ev.Launch(member):
            return f"launch {_name(member)}"
        case ev.Fence(member, reason):
            return f"fence {_name(member)}: {reason}"
        case ev.Publish(body):
            return f"publish {_published(body)}"
        case ev.SendTo(member, message):
            return f"send {_name(member)} {type(message).__name__.lower()}"
        case ev.MemberUp(member):
            return f"member up {_name(member)}"
        case ev.MemberDown(member, reason, left):
            return f"member down {_name(member)}{', as it has left' if left else ''}: {reason}"
        case ev.MemberResumed(member, reason):
            return f"member resumed {_name(member)}" + (f": {reason}" if reason else "")
        case ev.RankMoved(member, state, reason):
            return f"rank {_name(member)} {state}" + (f": {reason}" if reason else "")
        case ev.GroupMoved(state):
            return f"group {state}"
        case ev.NothingWillServe(reason):
            return f"nothing will serve: {reason}"
        case ev.StartFailed(reason):
            return f"start failed: {reason}"
        case ev.AllStopped():
            return "all stopped"


def _published(body: Published) -> str:
    match body:
        case Prepare(attempt, joiners):
            return f"prepare {attempt}: " + (_names(joiners) or "park")
        case Commit(attempt, view):
            return f"commit {attempt}: {_view(view)}"
        case Abort(attempt):
            return f"abort {attempt}"
        case View():
            return _view(body)
    raise ValueError(f"the machine does not publish {body}")


def _view(view: View) -> str:
    """A seat is shown as rank/incarnation@first step."""
    seats = " ".join(f"{_name(seat.member)}@{seat.first_step}" for seat in view.seats) or "nobody"
    parks = f", park at {view.park_at}" if view.park_at is not None else ""
    return f"view {view.epoch}: {seats}{parks}" + (f", left {_names(view.left)}" if view.left else "")


def play(script: str) -> str:
    """The script with every event's effects as they are now."""
    machine: MembershipMachine | None = None
    lines: list[str] = []
    for line in script.splitlines():
        if line.startswith("> config"):
            machine = _machine({name: int(value) for name, value in (w.split("=") for w in line.split()[2:])})
            lines.append(line)
        elif line.startswith("> "):
            assert machine is not None, "the first event must be config"
            lines.append(line)
            for event in parse_events(line[2:]):
                lines += [f"    {show(effect)}" for effect in machine.step(event)]
                machine.check()
        elif not line.startswith("    "):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _machine(options: dict[str, int]) -> MembershipMachine:
    ranks = options.pop("ranks")
    placement = launch_placement(ranks, 1, ranks, options.pop("redundant"))
    return MembershipMachine(ranks, placement, MembershipConfig(**options))


def _member(text: str) -> Member:
    rank, incarnation = text.split("/")
    return Member(int(rank), int(incarnation))


def _names(members: Iterable[Member]) -> str:
    return ", ".join(map(_name, members))


def _name(member: Member) -> str:
    return f"{member.rank}/{member.incarnation}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    script = path.read_text()
    assert play(script) == script


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 10


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    for path in sorted(FOLDER.glob("*.txt")):
        path.write_text(play(path.read_text()))
