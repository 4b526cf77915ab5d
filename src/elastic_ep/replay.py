"""`python -m elastic_ep.replay RUN`: feeds a run's event log to fresh machines and compares what they say.

Exit status: 0 everything came out the same, 1 something differs (the line is named), 2 the log cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ep.event_log.files import RANKS
from elastic_ep.event_log.reader import Differs, Line, Log, Unreadable
from elastic_ep.film.html import page
from elastic_ep.film.read import film_of
from elastic_ep.machines.membership.events import GroupState, RankMoved
from elastic_ep.machines.registry import MACHINES
from elastic_ep.machines.snapshot import to_plain as state_to_plain
from elastic_ep.wire.codec import from_plain, to_plain
from elastic_ep.wire.messages import Member, RankState
from elastic_ep.wire.privacy import without_text

SAME, DIFFERS, UNREADABLE = 0, 1, 2


@dataclass
class Loss:
    """A member that was in the view and went. `stalls` are the notes of what each survivor felt of it."""

    rank: int
    incarnation: int
    reason: str
    """The machine's; when the exit status is known, the cause."""
    epoch: int
    at_ns: int
    requests: int = 0
    back_ns: int | None = None
    stalls: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        cost = "no survivor was busy"
        if self.stalls:
            worst = max(self.stalls, key=lambda note: float(note["gap_s"]))
            gap_ms, steps = worst["gap_s"] * 1000, worst["steps"]
            cost = f"longest stall {gap_ms:.1f} ms ({steps:.1f} median steps, rank {worst['rank']})"
        back = "not back" if self.back_ns is None else f"back after {(self.back_ns - self.at_ns) / 1e9:.2f} s"
        moved = f"{self.requests} requests went on elsewhere, " if self.requests else ""
        name = f"loss of rank {self.rank}.{self.incarnation}"
        return f"{name} ({self.reason}, view {self.epoch}): {moved}{cost}, {back}"


@dataclass
class Timeline:
    """What an operator wants to know, in the order in which it happened."""

    lines: list[str] = field(default_factory=list)
    began_ns: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    cut_off: bool = False
    growing: bool = False
    """The run has written more since it was read."""
    segment: int = 1
    """The number of the first file that was left."""
    losses: list[Loss] = field(default_factory=list)
    epoch: int = 0
    members: frozenset[tuple[int, int]] = frozenset()
    """(rank, incarnation) of the newest view's seats."""
    parked: bool = False
    asked_to_stop: set[tuple[int, int]] = field(default_factory=set)

    def say(self, t_ns: int, text: str) -> None:
        self.lines.append(f"{(t_ns - self.began_ns) / 1e9:10.3f} s  {text}")

    def count(self, what: str, amount: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + amount


def replay(path: Path) -> Timeline:
    """The timeline of the log at `path` (the folder of a run, or a file of it). Raises `Unreadable`, `Differs`."""
    log = Log(path)
    machines = log.machines()
    timeline = _timeline(log, machines)
    effects = bytearray()  # whether each event had any
    try:
        for line in log.lines():
            if "machine" in line.fields:
                _check_cause(line, effects, from_the_start=log.segment == 1)
                effects.append(bool(line.fields.get("effects")))
                _step(machines, line, without_text if log.private else to_plain)
            elif "run" in line.fields:
                _compare_states(machines, line)
            try:
                _tell(timeline, line.fields)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise Differs(f"{line.where}: it is no line of a log: {error!r}") from error
    except Differs as error:
        raise Differs(f"{error}{log.of_another_version}") from error
    timeline.cut_off, timeline.growing = log.cut_off, log.growing
    return timeline


def replay_ranks(run: Path) -> int:
    """Of how many ranks' processes the log below `run` (a folder) replays. Raises as `replay`, naming the rank."""
    replayed = 0
    for folder in sorted((run / RANKS).glob("*")):
        try:
            if not any(file.stat().st_size for file in folder.iterdir()):
                continue  # it was killed before it could say anything
            replay(folder)
            replayed += 1
        except FileNotFoundError:
            continue  # a run that goes on deletes those of long ago
        except (Differs, Unreadable) as error:
            if folder.exists():
                raise type(error)(f"rank {folder.name}: {error}") from error
    return replayed


def _timeline(log: Log, machines: dict[str, Any]) -> Timeline:
    began_ns = log.run.get("began_ns", log.begins.fields["t_ns"])
    timeline = Timeline(began_ns=began_ns, segment=log.segment)
    if membership := machines.get("membership"):
        view = membership.view
        timeline.epoch, timeline.parked = view.epoch, view.park_at is not None
        timeline.members = frozenset((seat.rank, seat.incarnation) for seat in view.seats)
        timeline.asked_to_stop = {
            record.member for record in membership.records.values() if record.told_to_stop
        }
    return timeline


def _check_cause(line: Line, effects: bytearray, from_the_start: bool) -> None:
    """`effects`: of the events before it, whether each had any. A cause may lie in a file that is gone."""
    cause = line.fields.get("cause", 0)
    known = type(cause) is int and 0 <= cause <= len(effects)
    if (known and cause and not effects[-cause]) or (not known and from_the_start):
        raise Differs(f"{line.where}: its cause, {cause} events before, had no effect that could lead to it")


def _step(machines: dict[str, Any], line: Line, plain: Callable[[Any], Any]) -> None:
    """`plain` is what the log made of effects: of a text that is not there a machine says nothing either."""
    name, heard = line.fields["machine"], line.fields.get("heard")
    try:
        event = from_plain(heard, MACHINES[name].event)
        effects = [plain(effect) for effect in machines[name].step(event)]
    except Exception as error:  # a forged event may break a machine in any way, and it is this line's fault
        raise Differs(f"{line.where}: {name} cannot take {json.dumps(heard)}: {error!r}") from error
    now, logged = (
        json.dumps(effects),
        json.dumps(line.fields.get("effects")),
    )  # as text, in which 1 is not true
    if now != logged:
        raise Differs(f"{line.where}: {name} on {json.dumps(heard)}\n  log:    {logged}\n  replay: {now}")


def _compare_states(machines: dict[str, Any], line: Line) -> None:
    """A later file tells the machines' states as they were when it began."""
    for name, logged in line.fields.get("states", {}).items():
        now = json.loads(json.dumps(state_to_plain(machines[name].state())))
        for part in now.keys() | logged.keys():
            if now.get(part) != logged.get(part):
                told, found = json.dumps(logged.get(part)), json.dumps(now.get(part))
                raise Differs(
                    f"{line.where}: state of {name}, {part}\n  log:    {told[:500]}\n  replay: {found[:500]}"
                )


def _tell(timeline: Timeline, line: dict[str, Any]) -> None:
    t_ns, note = line["t_ns"], line.get("note")
    if line.get("machine") == "membership":
        for effect in line["effects"]:
            _tell_effect(timeline, t_ns, effect, line["heard"][0])
    elif line.get("machine") == "routing":
        timeline.count("events of the router")
        if line["heard"][0] == "TokensCommitted":
            timeline.count("steps reported")
            timeline.count("tokens", len(line["heard"][2]))
        timeline.count("requests replayed", sum(effect[0] == "Replayed" for effect in line["effects"]))
        timeline.count("requests moved", sum(effect[0] == "Moved" for effect in line["effects"]))
    elif note == "disturbance":
        what = "stall" if line["kind"] == "loss" else "pause"
        timeline.say(
            t_ns,
            f"rank {line['rank']}: {what} of {line['gap_s'] * 1000:.1f} ms around view {line['epoch']} "
            f"({line['steps']:.1f} median steps)",
        )
        for loss in timeline.losses:
            if line["kind"] == "loss" and loss.epoch == line["epoch"]:
                loss.stalls.append(line)
    elif note == "poisoned_step":
        timeline.count("poisoned steps")
    elif note == "death_notice":
        asked = (line["rank"], line["incarnation"]) in timeline.asked_to_stop
        what = "has ended, as asked" if asked else f"death noticed by {line['source']}"
        timeline.say(line["at_ns"], f"rank {line['rank']}.{line['incarnation']}: {what}")
    elif note == "loss":
        for loss in timeline.losses:
            if (loss.rank, loss.incarnation) == (line["rank"], line["incarnation"]):
                loss.reason, loss.requests = f"{line['cause']}: {line['why']}", line["requests"]
        timeline.say(t_ns, f"rank {line['rank']}.{line['incarnation']}: lost, {line['cause']}: {line['why']}")


def _tell_effect(timeline: Timeline, t_ns: int, effect: list[Any], cause: str) -> None:
    match effect:
        case ["RankMoved", [rank, incarnation], state, reason]:
            timeline.count("losses", RankMoved(Member(rank, incarnation), RankState(state), reason).is_loss)
            timeline.say(t_ns, f"rank {rank}.{incarnation}: {state}{f' ({reason})' if reason else ''}")
        case ["GroupMoved", state]:
            timeline.say(t_ns, f"group: {'idle' if state == GroupState.PAUSED else state}")
        case ["SendTo", [rank, incarnation], ["Shutdown", *_]]:
            timeline.asked_to_stop.add((rank, incarnation))
            timeline.say(t_ns, f"rank {rank}.{incarnation}: asked to stop")
        case ["Publish", ["View", *_] as view] | ["Publish", ["Commit", _, ["View", *_] as view]]:
            _tell_view(timeline, t_ns, view, cause)
        case ["MemberDown", [rank, incarnation], reason, *left] if (
            not any(left) and (rank, incarnation) not in timeline.asked_to_stop
        ):
            timeline.losses.append(Loss(rank, incarnation, reason, timeline.epoch, t_ns))
        case ["MemberUp", [rank, _]]:
            for loss in timeline.losses:
                if loss.rank == rank and loss.back_ns is None:
                    loss.back_ns = t_ns
        case ["Fence", [rank, incarnation], reason]:
            timeline.say(t_ns, f"rank {rank}.{incarnation}: fenced, {reason}")


def _tell_view(timeline: Timeline, t_ns: int, view: list[Any], cause: str) -> None:
    _, epoch, seats, park_at, *_ = view
    members = frozenset((rank, incarnation) for _, rank, incarnation, _ in seats)
    changes = [f"without {rank}.{incarnation}" for rank, incarnation in sorted(timeline.members - members)]
    changes += [f"with {rank}.{incarnation}" for rank, incarnation in sorted(members - timeline.members)]
    if timeline.parked is not (park_at is not None):
        changes.append("all go on" if park_at is None else f"all park before step {park_at}")
    shown = " ".join(f"{rank}.{incarnation}@{step}" for _, rank, incarnation, step in seats)
    timeline.count("views")
    what = ", ".join(changes) or "the same"
    timeline.say(t_ns, f"view {epoch}: {what}, because of {cause}; members@first step: {shown or 'nobody'}")
    timeline.epoch, timeline.members, timeline.parked = epoch, members, park_at is not None


def write_film(run: Path, file: Path) -> str:
    """Also of a log that differs further on, which the film then says. Why there is none, or "".

    Of a log that holds no loss there is one as well, and it says so.
    """
    try:
        film = film_of(run)
        file.write_text(page(film, f"{run.name}: {_losses(film)}"))
    except (Unreadable, Differs) as error:
        return f"no film: {error}"
    except OSError as error:
        return f"no film: {file}: {error.strerror}"
    if film["partial"]:
        print(f"the film is not whole: {film['partial']}", file=sys.stderr)
    print(f"film of {_losses(film)}: {file}")
    return ""


def _losses(film: dict[str, Any]) -> str:
    losses = sum(len(scene["losses"]) for scene in film["scenes"])
    return {0: "no loss", 1: "one loss"}.get(losses, f"{losses} losses")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic_ep.replay", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or one file of its event log")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a film of the losses: one HTML file")
    parser.add_argument("--quiet", action="store_true", help="no timeline")
    options = parser.parse_args(arguments)
    if options.html is not None and (why := write_film(options.run, options.html)):
        print(why, file=sys.stderr)
        return UNREADABLE
    try:
        timeline = replay(options.run)
        timeline.count("logs of ranks", replay_ranks(options.run))
    except Unreadable as error:
        print(f"cannot replay: {error}", file=sys.stderr)
        return UNREADABLE
    except Differs as error:
        print(f"differs: {error}", file=sys.stderr)
        return DIFFERS
    if not options.quiet:
        print("\n".join([*timeline.lines, *map(str, timeline.losses)]))
    totals = ", ".join(f"{amount} {what}" for what, amount in timeline.counts.items())
    print(f"same: every effect came out as logged. {totals}")
    if timeline.segment > 1:
        print(f"it begins with file {timeline.segment} of the run, and so do these figures")
    if timeline.growing:
        print("the run goes on; this is what its log held when it was read")
    elif timeline.cut_off:
        print("the log is cut off in mid-line; it was read up to there")
    return SAME


if __name__ == "__main__":
    sys.exit(main())
