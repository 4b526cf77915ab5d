"""What a film shows, from the lines of an event log. Pure.

A film has scenes: a loss with what led to it and came of it; losses that overlap share one. Times are milliseconds since
the run began. Nothing of a client's text is in it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from elastic_ep.wire.privacy import masked

FORMAT = 1
BEFORE_MS = 1_000.0
AFTER_MS = 1_000.0
NOT_BACK_MS = 10_000.0
"""A scene whose rank does not come back ends so long after the loss."""
LONGEST_MS = 120_000.0
MOST_STREAMS = 300
"""In a scene: those that moved first, then those that were silent for longest."""
MOST_TOKENS = 200_000
"""In a scene: of streams that would take it beyond, none is shown."""
MOST_MARKS = 2_000
_OWN_WORDS = ("exception", "protocol")
"""Causes whose reason may quote what a client has sent."""


@dataclass
class _Loss:
    rank: int
    incarnation: int
    at_ms: float
    why: str
    cause: str = ""
    requests: int = 0
    stall_ms: float | None = None
    epoch: int | None = None
    """Of the first view without it."""
    back_ms: float | None = None

    @property
    def window(self) -> tuple[float, float]:
        end = self.at_ms + NOT_BACK_MS if self.back_ms is None else self.back_ms + AFTER_MS
        return self.at_ms - BEFORE_MS, min(end, self.at_ms + LONGEST_MS)

    def shown(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "incarnation": self.incarnation,
            "at": self.at_ms,
            "cause": self.cause,
            "why": masked(self.why) if self.cause in _OWN_WORDS else self.why,
            "requests": self.requests,
            "stall": self.stall_ms,
            "back": self.back_ms,
        }


@dataclass
class _Stream:
    """`owners`: (time, rank or -1 while nobody has it). `tokens`: when some were delivered."""

    request: int
    began_ms: float | None
    """None: before what was read."""
    owners: list[tuple[float, int]] = field(default_factory=list)
    tokens: array[float] = field(default_factory=lambda: array("d"))
    end_ms: float | None = None
    end: str = ""

    def owned_by(self, at_ms: float, rank: int) -> None:
        if not self.owners or self.owners[-1][1] != rank:
            self.owners.append((at_ms, rank))


@dataclass
class _Reel:
    """All that was read."""

    began_ns: int
    losses: list[_Loss] = field(default_factory=list)
    streams: dict[int, _Stream] = field(default_factory=dict)
    states: dict[int, list[tuple[float, int, str]]] = field(default_factory=dict)
    """By rank: (time, incarnation, state)."""
    group: list[tuple[float, str]] = field(default_factory=list)
    marks: list[tuple[float, str, int, str]] = field(default_factory=list)
    """(time, kind, rank or -1, words)."""
    asked_to_stop: set[tuple[int, int]] = field(default_factory=set)
    deaths: dict[tuple[int, int], float] = field(default_factory=dict)
    """When each was noticed."""
    left: dict[tuple[int, int], int] = field(default_factory=dict)
    """The first view without it."""
    members: frozenset[tuple[int, int]] = frozenset()
    last_ms: float = 0.0

    def ms(self, t_ns: int) -> float:
        return round((t_ns - self.began_ns) / 1e6, 3)

    def mark(self, at_ms: float, kind: str, rank: int, words: str) -> None:
        self.marks.append((at_ms, kind, rank, words))


def film(
    run: Mapping[str, Any], lines: Iterable[Mapping[str, Any]], only: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The film of a log's `lines`, whose first one says `run`; of the loss of `only` (rank, incarnation) if it is given.

    Lines that are none of a log end it: `partial` says so. So does whatever `lines` raises as a `ValueError`.
    """
    reel = _Reel(int(run.get("began_ns", 0)))
    partial = ""
    try:
        for line in lines:
            _hear(reel, line)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        partial = f"the log could be read up to {reel.last_ms / 1000:.3f} s: {error}"
    losses = [loss for loss in reel.losses if only in (None, (loss.rank, loss.incarnation))]
    config = run.get("config") or {}
    return {
        "format": FORMAT,
        "version": str(run.get("version", "")),
        "started": str(run.get("started", "")),
        "ranks": sorted(reel.states) or list(range(int(config.get("ranks", 0)))),
        "partial": partial,
        "scenes": [_scene(reel, *window) for window in _windows(losses, reel.last_ms)],
    }


# Reading


def _hear(reel: _Reel, line: Mapping[str, Any]) -> None:
    at_ms = reel.ms(line["t_ns"])
    reel.last_ms = max(reel.last_ms, at_ms)
    machine = line.get("machine")
    if machine == "membership":
        for effect in line["effects"]:
            _membership(reel, at_ms, effect)
    elif machine == "routing":
        _routing(reel, at_ms, line["heard"], line["effects"])
    elif "note" in line:
        _note(reel, at_ms, line)


def _membership(reel: _Reel, at_ms: float, effect: Any) -> None:
    match effect:
        case ["RankMoved", [rank, incarnation], state, _]:
            reel.states.setdefault(rank, []).append((at_ms, incarnation, state))
        case ["GroupMoved", state]:
            reel.group.append((at_ms, state))
        case ["SendTo", [rank, incarnation], ["Shutdown"]]:
            reel.asked_to_stop.add((rank, incarnation))
        case ["Launch", [rank, incarnation]]:
            reel.mark(at_ms, "launch", rank, f"rank {rank}.{incarnation} is launched")
        case ["Fence", [rank, incarnation], reason]:
            reel.mark(at_ms, "fence", rank, f"rank {rank}.{incarnation} is fenced: {masked(reason)}")
        case ["Publish", ["View", *_] as view] | ["Publish", ["Commit", _, ["View", *_] as view]]:
            _view(reel, at_ms, view)
        case ["MemberDown", [rank, incarnation], reason] if (rank, incarnation) not in reel.asked_to_stop:
            member = (rank, incarnation)
            loss = _Loss(rank, incarnation, reel.deaths.get(member, at_ms), masked(reason))
            loss.epoch = reel.left.get(member)
            reel.losses.append(loss)
        case ["MemberUp", [rank, incarnation]]:
            for loss in reel.losses:
                if loss.rank == rank and loss.back_ms is None:
                    loss.back_ms = at_ms
                    reel.mark(at_ms, "back", rank, f"rank {rank}.{incarnation} serves again")


def _view(reel: _Reel, at_ms: float, view: list[Any]) -> None:
    _, epoch, seats, _ = view
    members = frozenset((rank, incarnation) for _, rank, incarnation, _ in seats)
    if members == reel.members:
        return
    out = ", ".join(f"{rank}.{incarnation}" for rank, incarnation in sorted(reel.members - members))
    new = ", ".join(f"{rank}.{incarnation}" for rank, incarnation in sorted(members - reel.members))
    reel.left.update(dict.fromkeys(reel.members - members, epoch))
    what = " ".join(filter(None, [out and f"without {out}", new and f"with {new}"]))
    reel.mark(at_ms, "view", -1, f"view {epoch} {what}: {len(members)} members")
    reel.members = members


def _routing(reel: _Reel, at_ms: float, heard: list[Any], effects: list[Any]) -> None:
    if heard[0] == "Submitted":
        request = heard[1][1]
        reel.streams[request] = _Stream(request, at_ms, [(at_ms, -1)])
    for effect in effects:
        match effect:
            case ["Deliver", request, *_]:
                stream = _stream(reel, request)
                stream.tokens.append(at_ms)
                if heard[0] == "TokensCommitted":
                    stream.owned_by(at_ms, heard[1][0])
            case ["Send", [rank, _], "Assign", request, *_]:
                _stream(reel, request).owned_by(at_ms, rank)
            case ["Replayed" | "Moved", request, *_]:
                _stream(reel, request).owned_by(at_ms, -1)
            case ["Finish", request, finish, code, *_]:
                stream = _stream(reel, request)
                stream.end_ms, stream.end = at_ms, str(code or finish or "cancelled")
            case ["Refuse", request, *_]:
                reel.streams.pop(request, None)
    if heard[0] == "CancelRequested" and heard[1] in reel.streams:
        stream = reel.streams[heard[1]]
        if stream.end_ms is None:
            stream.end_ms, stream.end = at_ms, "cancelled"


def _stream(reel: _Reel, request: int) -> _Stream:
    return reel.streams.setdefault(request, _Stream(request, None))


def _note(reel: _Reel, at_ms: float, line: Mapping[str, Any]) -> None:
    match line["note"]:
        case "death_notice":
            rank, incarnation = line["rank"], line["incarnation"]
            if (rank, incarnation) not in reel.asked_to_stop:
                words = f"death of rank {rank}.{incarnation} noticed by {line['source']}"
                reel.deaths[rank, incarnation] = reel.ms(line["at_ns"])
                reel.mark(reel.ms(line["at_ns"]), "death", rank, words)
        case "poisoned_step":
            masked_ranks = ", ".join(str(rank) for rank in line["masked"])
            when = reel.ms(line["mask_ns"]) if line.get("mask_ns") else at_ms
            words = f"rank {line['rank']} masks rank {masked_ranks} in step {line['step']}"
            reel.mark(when, "mask", line["rank"], words)
        case "disturbance" if line["kind"] == "loss":
            words = f"rank {line['rank']}: longest step gap {line['gap_s'] * 1000:.1f} ms"
            reel.mark(at_ms, "stall", line["rank"], words)
            stall_ms = round(line["beyond_s"] * 1000, 2)
            for loss in reel.losses:
                if loss.epoch == line["epoch"]:
                    loss.stall_ms = max(loss.stall_ms or 0.0, stall_ms)
        case "loss":
            for loss in reel.losses:
                if (loss.rank, loss.incarnation) == (line["rank"], line["incarnation"]):
                    loss.cause, loss.why = str(line["cause"]), str(line["why"])
                    loss.requests = line["requests"]


# Cutting


def _windows(losses: list[_Loss], last_ms: float) -> list[tuple[float, float, list[_Loss]]]:
    """Of losses in order of time; those that overlap together, as long as that is not too long."""
    found: list[tuple[float, float, list[_Loss]]] = []
    for loss in losses:
        begin, end = loss.window
        end = min(end, last_ms)
        if found and begin < found[-1][1] and end - found[-1][0] <= LONGEST_MS:
            before = found[-1]
            found[-1] = (before[0], max(before[1], end), [*before[2], loss])
        else:
            found.append((max(0.0, begin), end, [loss]))
    return found


def _scene(reel: _Reel, begin: float, end: float, losses: list[_Loss]) -> dict[str, Any]:
    lost_ms = losses[0].at_ms
    streams = [shown for each in reel.streams.values() if (shown := _cut(each, begin, end, lost_ms))]
    streams.sort(key=lambda each: (not each["moved"], -each["silence"]["ms"]))
    taken: list[dict[str, Any]] = []
    room = MOST_TOKENS
    for stream in streams[:MOST_STREAMS]:
        room -= len(stream["tokens"])
        if room < 0:
            break
        taken.append(stream)
    marks = sorted(mark for mark in reel.marks if begin <= mark[0] <= end)
    return {
        "from": begin,
        "to": end,
        "losses": [loss.shown() for loss in losses],
        "states": [[rank, _span(moves, begin, end)] for rank, moves in sorted(reel.states.items())],
        "group": _span(reel.group, begin, end),
        "marks": marks[:MOST_MARKS],
        "streams": sorted(taken, key=lambda each: each["id"]),
        "streams_left_out": len(streams) - len(taken),
    }


def _span(moves: list[Any], begin: float, end: float) -> list[Any]:
    """Those within, and the last one before."""
    times = [move[0] for move in moves]
    return moves[max(0, bisect_right(times, begin) - 1) : bisect_right(times, end)]


def _cut(stream: _Stream, begin: float, end: float, lost_ms: float) -> dict[str, Any] | None:
    """None: it has nothing to do with this scene. `silence`: the longest time without a token that ended after the
    loss; its client waited for so long."""
    first = stream.began_ms if stream.began_ms is not None else _first(stream, begin)
    if first > end or (stream.end_ms is not None and stream.end_ms < begin):
        return None
    tokens = stream.tokens[bisect_left(stream.tokens, begin) : bisect_right(stream.tokens, end)]
    owners = _span(stream.owners, begin, end)
    return {
        "id": stream.request,
        "from": first,
        "owners": owners,
        "moved": any(owner >= 0 for _, owner in owners[:-1]),
        "tokens": tokens.tolist(),
        "to": stream.end_ms if stream.end_ms is not None and stream.end_ms <= end else None,
        "end": stream.end if stream.end_ms is not None and stream.end_ms <= end else "",
        "silence": _silence(stream, begin, end, lost_ms),
    }


def _first(stream: _Stream, otherwise: float) -> float:
    return stream.owners[0][0] if stream.owners else otherwise


def _silence(stream: _Stream, begin: float, end: float, lost_ms: float) -> dict[str, float]:
    """From the last token (or the request) before to the next one, the longest that touches the time after the loss."""
    points = [] if stream.began_ms is None else [stream.began_ms]
    points += stream.tokens
    stop = stream.end_ms if stream.end_ms is not None else end
    if not points or points[-1] < stop:
        points = [*points, stop]
    best = (0.0, lost_ms)
    start = max(0, bisect_left(points, lost_ms) - 1)
    for before, after in zip(points[start:], points[start + 1 :], strict=False):
        if before > end:
            break
        best = max(best, (min(after, end) - max(before, begin), max(before, begin)))
    usual = sorted(b - a for a, b in pairwise(points))
    return {
        "ms": round(best[0], 3),
        "from": best[1],
        "usual": round(usual[len(usual) // 2], 3) if usual else 0.0,
    }
