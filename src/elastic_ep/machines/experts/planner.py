"""The planner: which rank should hold which experts, given what they had to do of late. Pure, and deterministic.

First tolerance: every expert has as many copies as the slots allow, no two on a rank, nor on a host while there are hosts
enough. Then balance: what is left goes to the experts with the most load a copy, and copies change places until the
busiest rank is no busier than in a placement made from nothing. It starts from what the ranks hold, and takes of all
changes the one that gains most for each expert moved: a moved expert costs its bytes.

Replicating the busiest experts and packing them onto the least busy ranks is DeepSeek's idea (EPLB, 2025).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_ep.machines.experts.balance import Board
from elastic_ep.machines.experts.packing import balanced
from elastic_ep.placement import EMPTY, Placement

Loads = Sequence[Sequence[float]]
"""[layers][logical experts], in any unit"""


@dataclass(frozen=True, slots=True)
class PlanInput:
    """`ranks` are the living ones.

    `spare` slots of every rank and layer stay empty. At most `max_moves` experts are moved for balance, in all layers
    together; those that tolerance needs come on top.
    """

    placement: Placement
    ranks: tuple[int, ...]
    loads: Loads
    spare: int = 0
    max_moves: int | None = None

    def __post_init__(self) -> None:
        placement, shape = self.placement, (len(self.loads), {len(row) for row in self.loads})
        if shape != (len(placement.slots), {placement.num_experts}):
            raise ValueError(
                f"loads of {len(placement.slots)} layers of {placement.num_experts} experts are needed"
            )
        if not self.ranks:
            raise ValueError("at least one rank is needed")
        if not 0 <= self.spare < placement.slots_per_rank:
            raise ValueError(f"{self.spare} spare slots of {placement.slots_per_rank}")


@dataclass(frozen=True, slots=True)
class Plan:
    """`slots` as in a placement: those of living ranks as planned, the others as they were.

    `moves` experts come to ranks that did not hold them. `imbalance` is the largest max/mean of any layer's expected
    load of a rank, `imbalance_before` that of what is there.
    """

    slots: tuple[tuple[int, ...], ...]
    moves: int
    imbalance: float
    imbalance_before: float


def plan(given: PlanInput) -> Plan:
    """Every layer for itself, those with the worst balance first, as long as there are moves to spend."""
    placement = given.placement
    layers = range(len(placement.slots))
    boards = [_board(given, layer) for layer in layers]
    before = [board.imbalance for board in boards]
    for board in boards:
        board.restore()
    budget = given.max_moves if given.max_moves is not None else sys.maxsize
    for layer in sorted(layers, key=lambda layer: -boards[layer].imbalance):
        boards[layer], spent = balanced(boards[layer], budget)
        budget -= spent
    slots = tuple(_row(given, layer, boards[layer]) for layer in layers)
    moves = sum(
        len(set(_on_rank(slots[layer], rank, placement)) - {*placement.on_rank(layer, rank), EMPTY})
        for layer in layers
        for rank in given.ranks
    )
    return Plan(slots, moves, max(board.imbalance for board in boards), max(before))


def _board(given: PlanInput, layer: int) -> Board:
    placement = given.placement
    room = placement.slots_per_rank - given.spare
    hosts = [placement.host_of(rank) for rank in given.ranks]
    board = Board(given.loads[layer], [room] * len(given.ranks), hosts)
    for index, rank in enumerate(given.ranks):
        for expert in placement.on_rank(layer, rank):
            if expert != EMPTY:
                board.place(expert, index)
    board.count_loads()
    return board


def _row(given: PlanInput, layer: int, board: Board) -> tuple[int, ...]:
    """What stays keeps its slot."""
    placement = given.placement
    row = list(placement.slots[layer])
    for index, rank in enumerate(given.ranks):
        start = rank * placement.slots_per_rank
        new = sorted(board.holds[index] - set(placement.on_rank(layer, rank)), reverse=True)
        seen: set[int] = set()
        for slot in range(start, start + placement.slots_per_rank):
            if row[slot] not in board.holds[index] or row[slot] in seen:
                row[slot] = EMPTY
            seen.add(row[slot])
        for slot in range(start, start + placement.slots_per_rank):
            if row[slot] == EMPTY and new:
                row[slot] = new.pop()
    return tuple(row)


def _on_rank(row: Sequence[int], rank: int, placement: Placement) -> Sequence[int]:
    return row[rank * placement.slots_per_rank : (rank + 1) * placement.slots_per_rank]
