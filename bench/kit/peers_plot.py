"""Draws engines side by side, case by case: tokens a second, and gaps within a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {"new": "#4d9de0", "old": "#a9c9e8"}
_OTHERS = ("#d7263d", "#e8998d")


def draw_sides(sides: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """`sides`: by name, the rows of each case as `bench.peers` has them. Who lacks one of the first is not in it."""
    cases = [_case(row) for row in next(iter(sides.values()))]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    spare = iter(_OTHERS * len(sides))
    width = 0.8 / len(sides)
    for place, (name, rows) in enumerate(sides.items()):
        colour = _COLOURS.get(name) or next(spare)
        known = {_case(row): row for row in rows}
        at = [index for index, case in enumerate(cases) if case in known]
        shifted = [index + (place - (len(sides) - 1) / 2) * width for index in at]
        tokens = [known[cases[index]]["tokens_per_s"] for index in at]
        gaps = [known[cases[index]]["gap_ms"] for index in at]
        panels: tuple[Any, Any] = tuple(axes)
        panels[0].bar(shifted, tokens, width, color=colour, label=name)
        panels[1].bar(shifted, [gap["p50"] for gap in gaps], width, color=colour, label=f"{name}, p50")
        panels[1].plot(shifted, [gap["p99"] for gap in gaps], "_", color="black", markersize=10)
    for axis, title in zip(axes, ("tokens a second", "gap within a stream, ms (line: p99)"), strict=True):
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _case(row: Mapping[str, Any]) -> str:
    return f"{row['streams']} streams, {row['prompt_tokens']} + {row['tokens']}"
