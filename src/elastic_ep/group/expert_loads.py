"""How much each expert had to do lately, summed over all ranks."""

from __future__ import annotations

from collections import defaultdict, deque

Loads = tuple[tuple[int, ...], ...]
"""[layers][logical experts], rows computed"""

REPORTS_KEPT = 8
"""The window slides by one report of a rank."""


class LoadWindow:
    def __init__(self) -> None:
        self._reports: dict[int, deque[Loads]] = defaultdict(lambda: deque(maxlen=REPORTS_KEPT))

    def add(self, rank: int, loads: Loads) -> None:
        self._reports[rank].append(loads)

    def of_layer(self, layer: int, num_experts: int) -> tuple[float, ...]:
        """[logical experts]: rows in the window, of all ranks; zeros before the first report.

        A layer at a time: of a large model all of them together would hold up the event loop.
        """
        rows = [report[layer] for reports in self._reports.values() for report in reports]
        return tuple(map(float, map(sum, zip(*rows, strict=True)))) if rows else (0.0,) * num_experts
