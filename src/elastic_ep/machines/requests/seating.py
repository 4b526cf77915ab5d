"""Which rank a request goes to: a free seat, room for its pages, the beginning of its prompt, and little load."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from elastic_ep.machines.requests.events import RoutingConfig
from elastic_ep.machines.requests.lifecycle import RequestState
from elastic_ep.machines.requests.prefixes import Prefixes
from elastic_ep.machines.requests.records import Rank, Request
from elastic_ep.wire.messages import Member

Move = tuple[Request, Rank, Rank]
"""Which request, from where, where to."""


def rank_for(
    request: Request, limit: int, ranks: Collection[Rank], prefixes: Prefixes, config: RoutingConfig
) -> Rank | None:
    """Of those with fewer requests than `limit`, one with a free seat and room for its pages, if there is any.

    A new request goes to one that was given the longest beginning of its prompt, unless that is loaded too much more than
    the least. One that lost its rank goes by load alone: any rank finds its pages on the shelf, and where many come
    together all of them wait.
    """
    seats = config.max_num_seqs
    free = [rank for rank in ranks if rank.accepting and len(rank.requests) < limit]
    roomy = [rank for rank in free if len(rank.requests) < seats and rank.has_room(request)]
    if roomy and request.asked.marks and request.life.state is RequestState.QUEUED:
        most = min([rank.load(seats) for rank in roomy]) + config.tolerance
        near = [rank for rank in roomy if rank.load(seats) <= most]
        bits = sum([1 << rank.member.rank for rank in near])
        best = prefixes.best(request.asked.marks, bits, config.least_shared)
        roomy = [rank for rank in near if best >> rank.member.rank & 1]
    return _least_loaded(roomy or free, seats)


def moves(ranks: Collection[Rank], config: RoutingConfig) -> Iterator[Move]:
    """What waits in a rank and can go elsewhere, each request once. Whoever asks performs one before the next.

    Streams in mid-answer first, from the most loaded first. Who gives has more requests than seats, who gets has fewer.
    Or they wait for pages: then who gets is loaded less than who gives, even with them, by more than is tolerated for
    the sake of a prefix. So nothing moves to and fro: as long as nobody comes or goes, there are ever fewer requests
    without a seat, and then the load of the fuller of two falls and that of the other stays below it. A draining rank
    gives like any other, and is done the sooner.
    """
    again, moved = True, set[int]()
    while again:
        again = False
        for request, giver, receiver in _one_round(ranks, config, moved):
            moved.add(request.asked.request_id)
            again |= len(giver.requests) <= config.max_num_seqs  # it may have room for others then
            yield request, giver, receiver


def _one_round(ranks: Collection[Rank], config: RoutingConfig, moved: set[int]) -> Iterator[Move]:
    seats = config.max_num_seqs
    queues: dict[Member, tuple[Rank, list[Request]]] = {}
    for rank in ranks:
        if len(rank.requests) > seats or rank.held:
            queue = [request for request in movable(rank, config) if request.asked.request_id not in moved]
            if queue:
                queues[rank.member] = rank, queue
    if not queues:
        return

    def urgency(member: Member) -> tuple[bool, float]:
        rank, queue = queues[member]
        return bool(queue[-1].emitted), rank.load(seats)

    while queues and any(rank.accepting and len(rank.requests) < seats for rank in ranks):
        giver, queue = queues[first := max(queues, key=urgency)]
        request = queue.pop()
        if not queue:
            del queues[first]
        receiver = receiver_of(request, giver, ranks, config)
        if receiver is not None:
            yield request, giver, receiver


def receiver_of(request: Request, giver: Rank, ranks: Collection[Rank], config: RoutingConfig) -> Rank | None:
    """Which rank takes over a request that waits in `giver`: one where none waits."""
    seats = config.max_num_seqs
    if len(giver.requests) <= seats and request.asked.request_id not in giver.held:
        return None  # the seat that it waited for is free: another has moved
    roomy = [
        rank
        for rank in ranks
        if rank is not giver
        and rank.accepting
        and len(rank.requests) < seats
        and rank.held.isdisjoint(rank.requests)
        and rank.has_room(request)
    ]
    if len(giver.requests) <= seats:
        most = giver.load(seats) - config.tolerance
        roomy = [rank for rank in roomy if rank.load(seats, request) < most]
    return _least_loaded(roomy, seats)


def movable(rank: Rank, config: RoutingConfig) -> list[Request]:
    """The requests that wait in the rank; those to be moved first are last.

    It has said which wait. As that may be off by what is on its way, there are more: ranks admit first come, first
    served, so those that came last wait, as many as there are more than seats. Who runs already may be moved all the
    same, and is computed once more.

    One that lost several ranks in a row stays: a rank that dies whenever it is back would take it again and again, until
    it has lost so many that it fails.
    """
    excess = len(rank.requests) - config.max_num_seqs
    waiting = [
        request
        for place, (request_id, request) in enumerate(reversed(rank.requests.items()))
        if (place < excess or request_id in rank.held) and request.fruitless <= config.max_fruitless_moves
    ]
    waiting.sort(key=lambda request: bool(request.emitted))
    return waiting


def _least_loaded(ranks: Collection[Rank], seats: int) -> Rank | None:
    """Then that with the fewest requests, that which was not chosen for longest, that with the lowest number."""
    return min(
        ranks,
        key=lambda rank: (rank.load(seats), len(rank.requests), rank.last_assigned, rank.member),
        default=None,
    )
