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
            pool = living
            if placement.hosts and rank in active and len(set(placement.hosts)) > 1:
                pool = _near_or_wanting(placement, living, active, rank, logical)
            at = (rank + logical) % len(pool) if pool else 0
            chosen.append(own[0] if own else pool[at] if pool else NO_COPY)
        rows.append(chosen)
    return rows


def _near_or_wanting(
    placement: Placement, living: list[int], active: set[int], rank: int, logical: int
) -> list[int]:
    """The copies that `rank` picks from: those of its host, if its turn there is within what they have to serve; else
    those of hosts with fewer ranks than their copies have to serve, if there are any; else all."""
    if not living:
        return []
    host, each = placement.host_of(rank), len(active) / len(living)
    by_host: dict[int, list[int]] = {}
    for physical in living:
        by_host.setdefault(placement.host_of(placement.rank_of(physical)), []).append(physical)
    users = placement.by_host(sorted(active))
    turn = (users[host].index(rank) + logical) % len(users[host])
    if host in by_host and turn + 0.5 <= len(by_host[host]) * each:
        return by_host[host]
    wanting = [
        p for there, some in sorted(by_host.items()) if len(users[there]) < len(some) * each for p in some
    ]
    return sorted(wanting) or living
