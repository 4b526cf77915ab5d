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
    rows = [_row(given, layer, boards[layer]) for layer in layers]
    slots, moves = tuple(row for row, _ in rows), sum(moves for _, moves in rows)
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


def _row(given: PlanInput, layer: int, board: Board) -> tuple[tuple[int, ...], int]:
    """What stays keeps its slot. And how many experts come to a rank."""
    placement = given.placement
    row, width, moves = list(placement.slots[layer]), placement.slots_per_rank, 0
    for experts, rank in zip(board.holds, given.ranks, strict=True):
        stay: set[int] = set()
        empty = []
        for slot in range(rank * width, (rank + 1) * width):
            if row[slot] in experts and row[slot] not in stay:
                stay.add(row[slot])
            else:
                row[slot] = EMPTY
                empty.append(slot)
        new = sorted(experts - stay)
        moves += len(new)
        for slot, expert in zip(empty, new, strict=False):
            row[slot] = expert
    return tuple(row), moves
