"""Which copy of each expert a rank addresses and what load that gives, found by walking through everything: for tests
and benches."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_ep.engine.routing_table import NO_COPY
from elastic_ep.placement import EMPTY, Placement


def rank_loads(placement: Placement, layer: int, ranks: Sequence[int], loads: Sequence[float]) -> list[float]:
    """The expected load of each of `ranks` in `layer`: an expert's load is shared evenly by its living copies."""
    copies = placement.copies(layer, ranks)
    return [
        sum(loads[expert] / copies[expert] for expert in set(placement.on_rank(layer, rank)) - {EMPTY})
        for rank in ranks
    ]


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
