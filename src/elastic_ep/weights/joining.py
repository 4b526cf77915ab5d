"""All weights of a joiner from its peers: dense ones from one of them, each expert from one that holds it."""

from __future__ import annotations

from collections import Counter

from elastic_ep.placement import EMPTY, Placement
from elastic_ep.timing import Timing
from elastic_ep.weights.bank import Weights
from elastic_ep.weights.peers import ExpertPull, pull_dense, pull_experts
from elastic_ep.weights.transfer import PullFailed, TransferPlane
from elastic_ep.wire.slot_messages import PeerAddress, PeerWeights


def fill_from_peers(
    plane: TransferPlane,
    weights: Weights,
    placement: Placement,
    rank: int,
    known: PeerWeights,
    timing: Timing,
) -> None:
    """Fill blank `weights` of `rank` as `placement` says. What no peer gives is loaded from the checkpoint.

    Raises PullFailed if no peer gives the dense weights; `weights` are then of no use.
    """
    _fill_dense(plane, weights, rank, known, timing.dense_pull_ms / 1000)
    missing = [
        (layer, slot, logical)
        for layer in range(len(placement.slots))
        for slot, logical in enumerate(placement.on_rank(layer, rank))
        if logical != EMPTY
    ]
    wanted, asked = len(missing), set[tuple[int, int, int]]()
    while orders := _orders(missing, placement, known, asked):
        for outcome in pull_experts(plane, weights, orders.keys(), timing.expert_pull_ms / 1000):
            if outcome.failure is None:
                missing.remove(orders[outcome.pull])
    for place in missing:
        weights.load_expert(*place)
    weights.from_peers = wanted - len(missing)


def _fill_dense(
    plane: TransferPlane, weights: Weights, rank: int, known: PeerWeights, deadline_s: float
) -> None:
    """From another peer than the next joiner's, as far as there are others."""
    failure = PullFailed("there is no peer")
    for attempt in range(len(known.peers)):
        source = known.peers[(rank + attempt) % len(known.peers)].address
        try:
            pull_dense(plane, weights, source, known.dense_sum, deadline_s)
            return
        except PullFailed as error:
            failure = error
    raise failure


def _orders(
    missing: list[tuple[int, int, int]],
    placement: Placement,
    known: PeerWeights,
    asked: set[tuple[int, int, int]],
) -> dict[ExpertPull, tuple[int, int, int]]:
    """A pull for each expert with an owner not asked yet, the least busy of them; notes them in `asked`."""
    orders = {}
    pulls: Counter[int] = Counter()
    for layer, slot, logical in missing:
        checksum = known.checksums[layer][logical]
        owners = [
            (peer, physical)
            for peer in known.peers
            for physical, held in _held(placement, layer, peer)
            if held == logical and (layer, logical, peer.rank) not in asked
        ]
        if checksum is None or not owners:
            continue
        peer, physical = min(owners, key=lambda owner: (pulls[owner[0].rank], owner[0].rank))
        pulls[peer.rank] += 1
        asked.add((layer, logical, peer.rank))
        source_slot = physical % placement.slots_per_rank
        orders[ExpertPull(peer.address, source_slot, layer, slot, checksum)] = (layer, slot, logical)
    return orders


def _held(placement: Placement, layer: int, peer: PeerAddress) -> list[tuple[int, int]]:
    """(physical, logical) of the peer's slots."""
    start = peer.rank * placement.slots_per_rank
    return list(enumerate(placement.on_rank(layer, peer.rank), start))
