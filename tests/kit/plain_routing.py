"""Which copy of each expert a rank addresses, found by walking through everything: an oracle for tests and benches."""

from __future__ import annotations

from elastic_ep.engine.routing_table import NO_COPY
from elastic_ep.placement import EMPTY, Placement


def choose_plainly(placement: Placement, active: set[int], rank: int) -> list[list[int]]:
    rows, width = [], placement.slots_per_rank
    for row in placement.slots:
        copies: list[list[int]] = [[] for _ in range(placement.num_experts)]
        for physical, logical in enumerate(row):
            if logical != EMPTY and physical // width in active:
                copies[logical].append(physical)
        chosen = []
        for logical, living in enumerate(copies):
            own = [physical for physical in living if physical // width == rank]
            at = (rank + logical) % len(living) if living else 0
            chosen.append(own[0] if own else living[at] if living else NO_COPY)
        rows.append(chosen)
    return rows
