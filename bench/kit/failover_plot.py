"""Draws tokens/s and each rank's state over time around kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from bench.kit.failover_analysis import Curves

_COLOURS = {
    "Launching": "#bbbbbb", "InitCUDA": "#f2c14e", "InitDist": "#f78154", "Joining": "#5fad56",
    "Serving": "#4d9de0", "Draining": "#b388eb", "Failed": "#d7263d", "Stopped": "#666666",
}  # fmt: skip
_BIN_S = 0.05


def draw(curves: Curves, stamps: list[float], struck: list[dict[str, Any]], path: Path) -> None:
    """Above: tokens/s at the clients, kills marked. Below: every rank's state. Left: all; right: the first kill."""
    if not stamps or not struck:
        return
    kills = [sent["at_ns"] / 1e9 for kill in struck for sent in kill["sent"]]
    begin, end = stamps[0], stamps[-1]
    single = next(
        (k["sent"][0]["at_ns"] / 1e9 for k in struck if not k["stop"] and not k["joiner_state"]), kills[0]
    )
    figure, axes = plt.subplots(
        2, 2, figsize=(15, 6), sharex="col", width_ratios=[2, 1], layout="constrained"
    )
    for column, (low, high, width) in enumerate(((begin, end, 0.25), (single - 1.0, single + 2.0, _BIN_S))):
        _throughput(axes[0][column], stamps, low, high, width)
        _states(axes[1][column], curves, low, high)
        for at in kills:
            if low <= at <= high:
                for row in (0, 1):
                    axes[row][column].axvline(at - low, color="#d7263d", linewidth=0.7, linestyle="--")
        axes[1][column].set_xlabel("seconds")
    axes[0][0].set_title(f"{len(kills)} kills under load")
    axes[0][1].set_title("one SIGKILL, close")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, _COLOURS.keys(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _throughput(axis: Any, stamps: list[float], low: float, high: float, width: float) -> None:
    counts = [0] * (int((high - low) / width) + 1)
    for stamp in stamps:
        if low <= stamp < high:
            counts[int((stamp - low) / width)] += 1
    axis.step(
        [i * width for i in range(len(counts))], [c / width for c in counts], where="post", linewidth=0.9
    )
    axis.set_ylabel("tokens/s at the clients")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, high - low)


def _states(axis: Any, curves: Curves, low: float, high: float) -> None:
    by_rank: dict[int, list[tuple[float, str]]] = {}
    for t_ns, rank, _incarnation, state in curves.states:
        by_rank.setdefault(rank, []).append((t_ns / 1e9, state))
    for rank, moves in by_rank.items():
        for (at, state), (until, _next) in zip(moves, [*moves[1:], (high, "")], strict=True):
            left, right = max(at, low), min(until, high)
            if right > left:
                axis.barh(rank, right - left, left=left - low, height=0.7, color=_COLOURS[state], linewidth=0)
    axis.set_ylabel("rank")
    axis.set_yticks(sorted(by_rank))
    axis.invert_yaxis()
