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

    def total(self, num_layers: int, num_experts: int) -> tuple[tuple[float, ...], ...]:
        """[layers][logical experts]: rows in the window, of all ranks; zeros before the first report."""
        total = [[0.0] * num_experts for _ in range(num_layers)]
        for reports in self._reports.values():
            for report in reports:
                for row, counts in zip(total, report, strict=True):
                    for expert, count in enumerate(counts):
                        row[expert] += count
        return tuple(tuple(row) for row in total)
