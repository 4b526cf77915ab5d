"""Draws the longest gaps of clients' streams around kills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

_COLOURS = {"old": "#d7263d", "new": "#4d9de0"}


def draw_gaps(gaps: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """`gaps`: by side and kill, the longest of each stream, ms. Left: which share waits longer; right: kill by kill."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    shares: Any = axes[0]
    kills: Any = axes[1]
    for name, by_kill in gaps.items():
        ordered = sorted(gap for of_kill in by_kill for gap in of_kill)
        if not ordered:
            continue
        left = [1 - place / len(ordered) for place in range(len(ordered))]
        shares.step(ordered, left, where="post", color=_COLOURS.get(name), label=name)
        for share, style in ((1.0, "-"), (0.5, ":")):
            longest = [sorted(one)[int(share * (len(one) - 1))] if one else float("nan") for one in by_kill]
            label = f"{name}, {'longest' if share == 1 else 'median'}"
            kills.plot(range(1, len(longest) + 1), longest, style, color=_COLOURS.get(name), label=label)
    shares.set_xscale("log")
    shares.xaxis.set_minor_formatter(NullFormatter())
    shares.set_yscale("log")
    shares.set_xlabel("longest gap in a client's stream after a kill, ms")
    shares.set_ylabel("share of streams with one as long")
    kills.set_yscale("log")
    kills.set_xlabel("kill")
    kills.set_ylabel("ms")
    kills.set_ylim(bottom=1)
    for axis in (shares, kills):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
