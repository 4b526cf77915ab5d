"""What a film shows, from the lines of an event log. Pure.

A film has scenes: a loss with what led to it and came of it; losses that overlap share one. Times are milliseconds since
the run began. Nothing of a client's text is in it.

A scene is cut as soon as nothing more can come into it, and what is older than any scene to come is forgotten. So memory
is bounded by what happens in a few minutes, however long the log is, and by what a film may hold.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
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
MOST_FILM_TOKENS = 1_000_000
"""In all scenes: beyond that the oldest are left out."""
MOST_SCENES = 500
MOST_MARKS = 2_000
LATE_MS = 3_000.0
"""Lines that belong to a scene come so long after it at most, and a death is in the log so long after it was noticed."""
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
    shot: bool = False
    """It is in a scene."""

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

    def forget(self, before_ms: float) -> None:
        """But its last token before stays: a silence may begin with it."""
        past = bisect_left(self.tokens, before_ms) - 1
        del self.tokens[: max(0, past)]
        _forget(self.owners, before_ms)


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

    def forget(self, before_ms: float) -> None:
        """What is of no use for scenes that begin at `before_ms` or later."""
        self.streams = {
            request: stream
            for request, stream in self.streams.items()
            if stream.end_ms is None or stream.end_ms >= before_ms
        }
        for stream in self.streams.values():
            stream.forget(before_ms)
        for moves in self.states.values():
            _forget(moves, before_ms)
        _forget(self.group, before_ms)
        self.marks = [mark for mark in self.marks if mark[0] >= before_ms]
        self.losses = [
            loss for loss in self.losses if not loss.shot or loss.at_ms >= before_ms or loss.back_ms is None
        ]
        self.deaths = {member: at_ms for member, at_ms in self.deaths.items() if at_ms >= before_ms}


def film(
    run: Mapping[str, Any], lines: Iterable[Mapping[str, Any]], only: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The film of a log's `lines`, whose first one says `run`; of the loss of `only` (rank, incarnation) if it is given.

    Lines that are none of a log end it: `partial` says so. So does whatever `lines` raises as a `ValueError`.
    """
    reel = _Reel(int(run.get("began_ns", 0)))
    scenes = _Scenes(reel, only)
    partial = ""
    try:
        for line in lines:
            _hear(reel, line)
            if reel.last_ms >= scenes.due_ms and scenes.cut():
                break
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        partial = f"the log could be read up to {reel.last_ms / 1000:.3f} s: {error}"
    scenes.cut(at_the_end=True)
    if scenes.left_out:
        partial = f"the first {scenes.left_out} scenes are left out" + (f"; {partial}" if partial else "")
    config = run.get("config") or {}
    return {
        "format": FORMAT,
        "version": str(run.get("version", "")),
        "started": str(run.get("started", "")),
        "ranks": sorted(reel.states) or list(range(int(config.get("ranks", 0)))),
        "partial": partial,
        "scenes": [
            {**scene, "losses": [loss.shown() for loss in losses]} for scene, losses in scenes.finished
        ],
    }


class _Scenes:
    """Cuts what `reel` has heard into scenes, and has it forget the rest."""

    def __init__(self, reel: _Reel, only: tuple[int, int] | None) -> None:
        self.finished: deque[tuple[dict[str, Any], list[_Loss]]] = deque()
        self.left_out = 0
        self.due_ms = float("-inf")
        """When to look next."""
        self._reel = reel
        self._only = only
        self._tokens = 0
        """In those that are finished."""

    def cut(self, at_the_end: bool = False) -> bool:
        """Whether all that was wanted is there."""
        reel, now_ms = self._reel, self._reel.last_ms
        self.due_ms = now_ms + LATE_MS
        for group in _windows(self._wanted(), now_ms):
            if not at_the_end and not _complete(group, now_ms):
                break  # its end is not known yet, and those after it may overlap it
            self._finish(*group)
        if at_the_end:
            return True
        open_ms = [loss.window[0] for loss in self._wanted()]
        reel.forget(min([now_ms - LATE_MS - BEFORE_MS, *open_ms]))
        return self._only is not None and bool(self.finished)

    def _wanted(self) -> list[_Loss]:
        return [
            loss
            for loss in self._reel.losses
            if not loss.shot and self._only in (None, (loss.rank, loss.incarnation))
        ]

    def _finish(self, begin: float, end: float, losses: list[_Loss]) -> None:
        for loss in losses:
            loss.shot = True
        scene = _scene(self._reel, begin, end, losses)
        self.finished.append((scene, losses))
        self._tokens += _tokens(scene)
        while len(self.finished) > 1 and (
            self._tokens > MOST_FILM_TOKENS or len(self.finished) > MOST_SCENES
        ):
            self._tokens -= _tokens(self.finished.popleft()[0])
            self.left_out += 1


def _tokens(scene: Mapping[str, Any]) -> int:
    return sum(len(stream["tokens"]) for stream in scene["streams"])


def _complete(group: tuple[float, float, list[_Loss]], now_ms: float) -> bool:
    """Nothing that is yet to come belongs into this scene, and no loss to come overlaps it."""
    _, end, losses = group
    settled = all(loss.back_ms is not None or now_ms - loss.at_ms > LONGEST_MS for loss in losses)
    return settled and now_ms > end + BEFORE_MS + LATE_MS


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
        case ["MemberDown", [rank, incarnation], reason, *left] if (
            not any(left) and (rank, incarnation) not in reel.asked_to_stop
        ):
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
    _, epoch, seats, *_ = view
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


def _forget(moves: list[Any], before_ms: float) -> None:
    """All but the last before that time."""
    del moves[: max(0, bisect_left([move[0] for move in moves], before_ms) - 1)]


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
