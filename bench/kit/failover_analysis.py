"""Reads a run's event log and computes what each kill cost."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.kit.served import summary

_AROUND_NS = 3_000_000_000
_BEFORE_NS = 3_000_000_000


@dataclass
class Curves:
    """`steps[rank]`: end of each committed step, ns. `states`: (t_ns, rank, incarnation, state)."""

    steps: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    states: list[tuple[int, int, int, str]] = field(default_factory=list)
    notices: dict[tuple[int, int], int] = field(default_factory=dict)
    gains: list[tuple[int, int]] = field(default_factory=list)
    """(t_ns, first step) of each commit with a joiner."""
    step_ends: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    poisoned: list[tuple[int, int, int, tuple[int, ...]]] = field(default_factory=list)
    """(end of the step, when a mask was last issued before it, rank, masked ranks), ns."""


def analyse(events: Path, struck: list[dict[str, Any]]) -> tuple[dict[str, Any], Curves]:
    curves = read(events)
    notice: list[float] = []
    hang: list[float] = []
    stall: list[float] = []
    stall_ms: list[float] = []
    stall_hang: list[float] = []
    full: list[float | None] = []
    starts: list[dict[str, float]] = []
    for kill, following in zip(struck, [*struck[1:], None], strict=True):
        first_ns = kill["sent"][0]["at_ns"]
        until_ns = first_ns + _AROUND_NS
        if following is not None:
            until_ns = min(until_ns, following["sent"][0]["at_ns"])
        for sent in kill["sent"]:
            noticed = curves.notices.get((sent["rank"], sent["incarnation"]))
            if noticed is not None:
                (hang if kill["stop"] else notice).append((noticed - sent["at_ns"]) / 1e6)
        victims = {sent["rank"] for sent in kill["sent"]}
        for rank in curves.steps.keys() - victims:
            gap = _longest_gap(curves.steps[rank], first_ns, until_ns)
            typical = _median_gap(curves.steps[rank], first_ns)
            if gap is None or typical is None:
                continue
            (stall_hang if kill["stop"] else stall).append(gap / typical)
            if not kill["stop"]:
                stall_ms.append(gap / 1e6)
        if not kill["stop"] and not kill["joiner_state"]:
            back = [_states_after(curves, sent) for sent in kill["sent"]]
            full.extend(states.get("Serving") for states in back)
            starts.extend(back)
    rejoin, rejoin_ms = _rejoins(curves)
    phases = [
        _phases(curves, kill["sent"][0]) for kill in struck if not kill["stop"] and len(kill["sent"]) == 1
    ]
    steps = [b - a for ends in curves.steps.values() for a, b in pairwise(ends)]
    return {
        "median_step_ms": round(median(steps) / 1e6, 3) if steps else None,
        "notice_ms": summary(notice),
        "hang_notice_ms": summary(hang),
        "stall_steps": summary(stall),
        "stall_ms": summary(stall_ms),
        "phases_ms": {
            name: summary([phase[name] for phase in phases if name in phase])
            for name in ("mask_issued", "in_flight_step_ended", "committed")
        },
        "stall_steps_hang": summary(stall_hang),
        "full_strength_s": summary([value for value in full if value is not None]),
        "replacement_reaches_s": {
            state: summary([states[state] for states in starts if state in states])["p50"]
            for state in ("Launching", "InitCUDA", "InitDist", "Joining", "Serving")
        },
        "rejoin_steps": summary(rejoin),
        "rejoin_ms": summary(rejoin_ms),
    }, curves


def client_gaps_ms(streams: list[list[float]], struck: list[dict[str, Any]]) -> list[float]:
    """Of each stream in mid-answer at a kill: the longest time between two pieces of its text, up to the next kill."""
    kills = [kill["sent"][0]["at_ns"] / 1e9 for kill in struck]
    return [
        1000 * max(b - a for a, b in pairwise(stamps) if b >= kill and a < until)
        for kill, until in pairwise([*kills, float("inf")])
        for stamps in streams
        if stamps and stamps[0] < kill <= stamps[-1]
    ]


def read(events: Path) -> Curves:
    curves = Curves()
    for line in _lines(events):
        note = line.get("note")
        if line.get("machine") == "routing" and line["heard"][0] == "TokensCommitted":
            _, (rank, _), _, step, _, ended_ns, *_ = line["heard"]
            curves.steps[rank].append(ended_ns)
            curves.step_ends[rank][step] = ended_ns
        elif note == "poisoned_step":
            times = (line["ended_ns"], line["mask_ns"])
            curves.poisoned.append((*times, line["rank"], tuple(line["masked"])))
        elif note == "death_notice":
            curves.notices[line["rank"], line["incarnation"]] = line["at_ns"]
        elif line.get("machine") == "membership":
            _read_effects(curves, line)
    return curves


def _read_effects(curves: Curves, line: dict[str, Any]) -> None:
    for effect in line["effects"]:
        if effect[0] == "RankMoved":
            (rank, incarnation), state = effect[1], effect[2]
            curves.states.append((line["t_ns"], rank, incarnation, state))
        elif effect[0] == "Publish" and effect[1][0] == "Commit":
            epoch, seats = effect[1][2][1], effect[1][2][2]
            newest = max(seat[3] for seat in seats)
            if epoch > 1 and any(seat[3] == newest for seat in seats):
                curves.gains.append((line["t_ns"], newest))


def _lines(events: Path) -> Iterator[dict[str, Any]]:
    with events.open() as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)


def _phases(curves: Curves, sent: dict[str, Any]) -> dict[str, float]:
    """From the signal, ms, each the last survivor's: mask issued, its step ended, its next step committed."""
    killed, until = sent["at_ns"], sent["at_ns"] + _AROUND_NS
    phases: dict[str, float] = {}
    for ended, issued, rank, masked in curves.poisoned:
        if not (killed <= ended < until and sent["rank"] in masked):
            continue
        ends = curves.steps[rank]
        following = bisect_left(ends, ended)
        seen = {"in_flight_step_ended": ended, "mask_issued": issued}
        if following < len(ends):
            seen["committed"] = ends[following]
        for name, at_ns in seen.items():
            phases[name] = max(phases.get(name, 0.0), (at_ns - killed) / 1e6)
    return phases


def _longest_gap(ends: list[int], at_ns: int, until_ns: int) -> int | None:
    """The longest time between two commits from the last one before the kill on, up to the next kill."""
    start = max(0, bisect_left(ends, at_ns) - 1)
    stop = bisect_left(ends, until_ns)
    around = ends[start:stop]
    return max((b - a for a, b in pairwise(around)), default=None)


def _median_gap(ends: list[int], at_ns: int) -> float | None:
    before = ends[bisect_left(ends, at_ns - _BEFORE_NS) : bisect_left(ends, at_ns)]
    gaps = [b - a for a, b in pairwise(before)]
    return median(gaps) if len(gaps) >= 5 else None


def _states_after(curves: Curves, sent: dict[str, Any]) -> dict[str, float]:
    """When a later incarnation was first in each state, seconds after the signal."""
    found: dict[str, float] = {}
    for t_ns, rank, incarnation, state in curves.states:
        if rank == sent["rank"] and incarnation > sent["incarnation"]:
            found.setdefault(state, (t_ns - sent["at_ns"]) / 1e9)
    return found


def _rejoins(curves: Curves) -> tuple[list[float], list[float]]:
    """Around each gain, per member: the gap that ends with the first step of the new view, in median steps and ms."""
    in_steps, in_ms = [], []
    for t_ns, first in {first: (t, first) for t, first in curves.gains}.values():
        for rank, ends in curves.step_ends.items():
            before, after = ends.get(first - 1), ends.get(first)
            typical = _median_gap(curves.steps[rank], t_ns)
            if before is not None and after is not None and typical:
                in_steps.append((after - before) / typical)
                in_ms.append((after - before) / 1e6)
    return in_steps, in_ms


def beyond_a_step(figures: dict[str, Any], times: dict[str, float]) -> dict[str, float]:
    """The percentiles less one median step, ms."""
    step = figures["median_step_ms"] or 0.0
    return {share: round(value - step, 3) for share, value in times.items() if share != "count"}
