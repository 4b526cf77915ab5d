"""`python -m elastic_ep.replay RUN`: feeds a run's event log to fresh machines and compares what they say.

Exit status: 0 everything came out the same, 1 something differs (the line is named), 2 the log cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ep.codec import MalformedMessage, from_plain, to_plain
from elastic_ep.machines.membership_events import GroupState, RankMoved
from elastic_ep.machines.registry import MACHINES
from elastic_ep.messages import Member, RankState

SAME, DIFFERS, UNREADABLE = 0, 1, 2


class Unreadable(Exception):
    """There is no log to replay."""


class Differs(Exception):
    """A line is not what the run wrote, or not what the machines say."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")


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
    """The timeline of the log at `path` (a file, or the folder of a run). Raises `Unreadable`, `Differs`."""
    file = path / "events.jsonl" if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Unreadable(f"{file}: {error.strerror}") from error
    timeline = Timeline(cut_off=not data.endswith(b"\n"))
    lines = checked_lines(data)
    first = next(lines, None)
    if first is None or "run" not in first[1]:
        raise Unreadable(f"{file}: no first line that says what the run was")
    timeline.began_ns = first[1]["t_ns"]
    try:
        machines = {name: MACHINES[name].build(plain) for name, plain in first[1]["run"]["machines"].items()}
    except (KeyError, MalformedMessage, TypeError, ValueError) as error:
        raise Unreadable(f"{file}: the first line does not describe the machines: {error!r}") from error
    for number, line in lines:
        if "machine" in line:
            _step(machines, number, line)
        _tell(timeline, line)
    return timeline


def checked_lines(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, line) of every whole line. Raises `Differs` where a byte is not what was written."""
    checksum = 0
    for index, raw in enumerate(data.split(b"\n")[:-1]):
        body, found, end = raw.rpartition(b',"crc":')
        checksum = zlib.crc32(body + b"}", checksum)
        if not found or end != b"%d}" % checksum:
            raise Differs(
                index + 1, "the checksum does not match: this line was changed, or one before it is missing"
            )
        line: dict[str, Any] = json.loads(raw)
        if line["n"] != index:
            raise Differs(index + 1, f"its number is {line['n']}, expected {index}")
        yield index + 1, line


def _step(machines: dict[str, Any], number: int, line: dict[str, Any]) -> None:
    name = line["machine"]
    try:
        event = from_plain(line["heard"], MACHINES[name].event)
        effects = [to_plain(effect) for effect in machines[name].step(event)]
    except Exception as error:  # a forged event may break a machine in any way, and it is this line's fault
        raise Differs(number, f"{name} cannot take {json.dumps(line['heard'])}: {error!r}") from error
    now, logged = json.dumps(effects), json.dumps(line["effects"])  # as text, in which 1 is not true
    if now != logged:
        heard = json.dumps(line["heard"])
        raise Differs(number, f"{name} on {heard}\n  log:    {logged}\n  replay: {now}")


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
        case ["SendTo", [rank, incarnation], _]:
            timeline.asked_to_stop.add((rank, incarnation))
            timeline.say(t_ns, f"rank {rank}.{incarnation}: asked to stop")
        case ["Publish", ["View", *_] as view] | ["Publish", ["Commit", _, ["View", *_] as view]]:
            _tell_view(timeline, t_ns, view, cause)
        case ["MemberDown", [rank, incarnation], reason] if (rank, incarnation) not in timeline.asked_to_stop:
            timeline.losses.append(Loss(rank, incarnation, reason, timeline.epoch, t_ns))
        case ["MemberUp", [rank, _]]:
            for loss in timeline.losses:
                if loss.rank == rank and loss.back_ns is None:
                    loss.back_ns = t_ns
        case ["Fence", [rank, incarnation], reason]:
            timeline.say(t_ns, f"rank {rank}.{incarnation}: fenced, {reason}")


def _tell_view(timeline: Timeline, t_ns: int, view: list[Any], cause: str) -> None:
    _, epoch, seats, park_at = view
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic_ep.replay", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or its events.jsonl")
    parser.add_argument("--quiet", action="store_true", help="no timeline")
    options = parser.parse_args(arguments)
    try:
        timeline = replay(options.run)
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
    if timeline.cut_off:
        print("the log is cut off in mid-line; it was read up to there")
    return SAME


if __name__ == "__main__":
    sys.exit(main())
