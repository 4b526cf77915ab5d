"""Evens out one layer: by a few changes where that is enough, else by packing anew, as much as possible where it was."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import chain, repeat

from elastic_ep.machines.experts.balance import NOBODY, Board

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
MOVES_EACH = 1.5
"""So many experts are moved for each rank that is to become less busy, beside the busiest: some are exchanged."""


def balanced(board: Board, max_moves: int) -> tuple[Board, int]:
    """The board to come to from `board`, and how many experts that moves: at most `max_moves`.

    Of what was tried the best in balance, up to that of a packing from nothing, less the price of the moves.
    """
    if board.total <= 0 or max_moves <= 0:
        return board, 0
    fresh = packed(board, 0.0)
    seat_again(fresh, board)
    goal = max(EVEN, fresh.imbalance)
    slots, short = sum(board.room), board.short
    best, spent, least = board, 0, max(1.0, board.imbalance / goal)
    for limit in (0.0, None, *LIMITS):
        if least < 1 + PRICE * FEW:
            break
        candidate = board.copy() if limit is None else packed(board, limit) if limit else fresh
        moves = board.moves_to(candidate)
        useful = goal * (least - PRICE * moves / slots)
        expected = moves + MOVES_EACH * max(0, candidate.above(useful) - 1)
        if 1 + PRICE * expected / slots >= least:
            if limit:
                break
            continue
        if moves > max_moves or candidate.short > short:
            continue
        candidate.balance(goal, max_moves - moves, EDITS * len(board.room), useful)
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
    order = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
    result = Board(board.loads, board.room, board.hosts)
    most = limit * board.total / len(board.room)
    load = _kept(result, board, [(expert, shares[expert], counts[expert]) for expert in order], most)
    free = [room - len(held) for room, held in zip(result.room, result.holds, strict=True)]
    queue = [(at, rank) for rank, at in enumerate(load) if free[rank] > 0]
    heapq.heapify(queue)
    anywhere = result.spread == 1
    for expert in order:
        popped = []
        share, count, holders = shares[expert], counts[expert], result.where[expert]
        while queue and len(holders) < count:
            at, rank = heapq.heappop(queue)
            if rank not in holders and (anywhere or _far_enough(result, expert, rank, count)):
                result.place(expert, rank)
                free[rank] -= 1
                at += share
            if free[rank] > 0:
                popped.append((at, rank))
        for entry in popped:
            heapq.heappush(queue, entry)
    result.count_loads()
    result.restore()
    return result


def _kept(result: Board, board: Board, experts: Sequence[tuple[int, float, int]], most: float) -> list[float]:
    """Leave copies where they are in `board` as long as a rank's load stays within `most`. Returns the load of each rank.

    `experts`: (expert, load of a copy, copies), in the order in which they are looked at.
    """
    load = [0.0] * len(board.room)
    for expert, share, count in experts:
        if share > most:
            continue
        holders = result.where[expert]
        for rank in sorted(sorted(board.where[expert]), key=load.__getitem__):
            if len(holders) == count:
                break
            if (
                load[rank] + share <= most
                and result.has_room(rank)
                and _far_enough(result, expert, rank, count)
            ):
                result.place(expert, rank)
                load[rank] += share
    return load


def seat_again(new: Board, old: Board) -> None:
    """Let ranks of `new` that are alike change places, so that more of them keep more of what they have in `old`."""
    ranks = len(new.room)
    both: list[int] = []
    for hand, experts in enumerate(new.holds):
        for expert in experts:
            both += [hand * ranks + rank for rank in old.where[expert]]
    common = Counter(both)
    pairs: list[list[int]] = [[] for _ in range(max(common.values(), default=0) + 1)]
    for pair, count in common.items():
        pairs[count].append(pair)
    kinds = [*zip(new.hosts, new.room, strict=True)]
    seats = [NOBODY] * ranks
    free = [True] * ranks
    for hand, rank in map(divmod, chain.from_iterable(reversed(pairs)), repeat(ranks)):
        if seats[hand] == NOBODY and free[rank] and kinds[hand] == kinds[rank]:
            seats[hand], free[rank] = rank, False
    left: dict[tuple[int, int], list[int]] = {}
    for rank in range(ranks):
        if free[rank]:
            left.setdefault(kinds[rank], []).append(rank)
    new.rename([left[kinds[hand]].pop() if seat == NOBODY else seat for hand, seat in enumerate(seats)])


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
