"""Evens out one layer: by a few changes where that is enough, else by packing anew, as much as possible where it was."""

from __future__ import annotations

import heapq

from elastic_ep.machines.experts.balance import Board

EVEN = 1.005
"""Max/mean at which nothing more is done."""
LIMITS = (1.0, 0.9, 0.7)
"""Shares of the mean up to which a rank keeps what it has, when it is packed anew."""
EDITS = 2
"""Single changes made at most on a board, for each rank."""
FEW = 0.2
"""As even as can be with so small a share of all experts moved is good enough."""
PRICE = 0.02
"""To move every expert is worth so much balance."""


def balanced(board: Board, max_moves: int) -> tuple[Board, int]:
    """The board to come to from `board`, and how many experts that moves: at most `max_moves`.

    Of what was tried the best in balance, up to that of a packing from nothing, less the price of the moves.
    """
    if board.total <= 0 or max_moves <= 0:
        return board, 0
    fresh = packed(board, 0.0)
    goal = max(EVEN, fresh.imbalance)
    slots = sum(board.room)
    best, spent, least = board, 0, max(1.0, board.imbalance / goal)
    for limit in (0.0, None, *LIMITS):
        if least < 1 + PRICE * FEW:
            break
        candidate = board.copy() if limit is None else packed(board, limit) if limit else fresh
        moves = board.moves_to(candidate)
        if moves > max_moves or 1 + PRICE * moves / slots >= least or candidate.short > board.short:
            continue
        candidate.balance(goal, max_moves - moves, EDITS * len(board.room))
        moves = board.moves_to(candidate)
        cost = max(1.0, candidate.imbalance / goal) + PRICE * moves / slots
        if cost < least:
            best, spent, least = candidate, moves, cost
        elif limit and cost > least + PRICE + 1 / len(
            board.room
        ):  # the fewer ranks, the more a single expert matters
            break
    return best, spent


def packed(board: Board, limit: float) -> Board:
    """All experts placed anew, the busiest first, each onto the least busy ranks.

    A rank that has the expert keeps it as long as its load does not come above `limit` of the mean.
    """
    counts = _counts(board)
    shares = [load / count for load, count in zip(board.loads, counts, strict=True)]
    most = limit * board.total / len(board.room)
    result = Board(board.loads, board.room, board.hosts)
    load = [0.0] * len(board.room)
    order = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
    for expert in order:
        if shares[expert] > most:
            continue
        for rank in sorted(board.where[expert], key=lambda rank: (load[rank], rank)):
            if len(result.where[expert]) == counts[expert]:
                break
            if (
                load[rank] + shares[expert] <= most
                and result.has_room(rank)
                and result.fits(expert, rank)
                and _far_enough(result, expert, rank, counts[expert])
            ):
                result.place(expert, rank)
                load[rank] += shares[expert]
    queue = [(at, rank) for rank, at in enumerate(load) if result.has_room(rank)]
    heapq.heapify(queue)
    for expert in order:
        popped = []
        holders = result.where[expert]
        while queue and len(holders) < counts[expert]:
            at, rank = heapq.heappop(queue)
            if rank not in holders and _far_enough(result, expert, rank, counts[expert]):
                result.place(expert, rank)
                at += shares[expert]
            if result.has_room(rank):
                popped.append((at, rank))
        for entry in popped:
            heapq.heappush(queue, entry)
    result.count_loads()
    result.restore()
    return result


def _far_enough(board: Board, expert: int, rank: int, copies: int) -> bool:
    """Whether the expert may share the host of `rank` with itself: only as many of its `copies` as it need not spread."""
    if board.spread == 1:
        return True
    hosts = board.hosts_of(expert)
    return board.hosts[rank] not in hosts or len(board.where[expert]) - len(hosts) < copies - board.spread


def _counts(board: Board) -> list[int]:
    """Copies of each expert: what tolerance needs, and the rest to those with the most load a copy."""
    counts = [board.least] * len(board.loads)
    queue = [(-load / board.least, expert) for expert, load in enumerate(board.loads)]
    heapq.heapify(queue)
    for _ in range(sum(board.room) - sum(counts)):
        if not queue:
            break
        _, expert = heapq.heappop(queue)
        counts[expert] += 1
        if counts[expert] < len(board.room):
            heapq.heappush(queue, (-board.loads[expert] / counts[expert], expert))
    return counts
