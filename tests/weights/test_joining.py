"""A joiner's weights from its peers: all of them right, whatever peers do."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from elastic_ep.placement import EMPTY, launch_placement
from elastic_ep.timing import USUAL
from elastic_ep.weights.bank import Weights, blank_weights, dummy_source
from elastic_ep.weights.joining import fill_from_peers
from elastic_ep.weights.transfer import PullFailed, TransferPlane
from elastic_ep.wire.slot_messages import PeerAddress, PeerWeights
from tests.weights.source import PLACEMENT, TINY, Source, source, weights_of

WIDTH = PLACEMENT.slots_per_rank
JOINER = launch_placement(3, TINY.moe_layers, TINY.moe.experts, 4, num_spare=2)
"""Ranks 0 and 1 hold what `PLACEMENT` says; rank 2 is to hold two experts of each of them."""
ROW = (*PLACEMENT.slots[0], 0, 7, 3, 4, EMPTY, EMPTY)
JOINER = replace(JOINER, slots_per_rank=WIDTH, slots=(ROW,) * TINY.moe_layers)


def blank() -> Weights:
    return blank_weights(TINY, WIDTH, dummy_source(TINY, 0))


def expected() -> Weights:
    weights = blank()
    for layer in range(TINY.moe_layers):
        for slot, logical in enumerate(JOINER.on_rank(layer, 2)):
            weights.load_expert(layer, slot, logical)
    return weights


def known(*peers: Source, forget: int | None = None) -> PeerWeights:
    """Checksums of all experts but `forget`."""
    sums: list[list[int | None]] = [[None] * TINY.moe.experts for _ in range(TINY.moe_layers)]
    for rank in range(2):
        theirs = weights_of(rank)
        for layer, row in enumerate(sums):
            for slot, logical in enumerate(PLACEMENT.on_rank(layer, rank)):
                if logical not in (EMPTY, forget):
                    row[logical] = theirs.checksum(layer, slot)
    addresses = tuple(PeerAddress(rank, peer.address) for rank, peer in enumerate(peers))
    return PeerWeights(addresses, weights_of(0).dense_checksum(), tuple(map(tuple, sums)))


def check(weights: Weights) -> None:
    right = expected()
    layers, slots = range(TINY.moe_layers), range(WIDTH)
    assert [weights.checksum(layer, slot) for layer in layers for slot in slots] == [
        right.checksum(layer, slot) for layer in layers for slot in slots
    ]


def test_everything_comes_from_peers(plane: TransferPlane) -> None:
    mine = blank()
    with source(0) as first, source(1) as second:
        fill_from_peers(plane, mine, JOINER, 2, known(first, second), USUAL)
    check(mine)
    assert mine.dense_checksum() == weights_of(0).dense_checksum()
    assert mine.from_peers == 4 * TINY.moe_layers


def test_what_a_dead_peer_or_an_unknown_checksum_leaves_out_is_loaded(plane: TransferPlane) -> None:
    mine = blank()
    with source(0) as first, source(1) as second:
        second.signal(signal.SIGKILL)
        fill_from_peers(plane, mine, JOINER, 2, known(first, second, forget=0), USUAL)
        held = {logical for logical in PLACEMENT.on_rank(0, 0) if logical in (7, 3, 4)}
    check(mine)
    assert mine.dense_checksum() == weights_of(0).dense_checksum()
    assert mine.from_peers == len(held) * TINY.moe_layers


def test_wrong_bytes_are_not_taken(plane: TransferPlane) -> None:
    mine = blank()
    with source(0) as first, source(1) as second:
        for peer in (first, second):
            for slot, logical in enumerate(PLACEMENT.on_rank(0, peer.address == second.address)):
                if logical != EMPTY:
                    peer.corrupt(0, slot)
        fill_from_peers(plane, mine, JOINER, 2, known(first, second), USUAL)
    check(mine)
    assert mine.from_peers == 4 * (TINY.moe_layers - 1)


def test_without_dense_weights_there_is_nothing(plane: TransferPlane) -> None:
    with source(0) as peer:
        wrong = replace(known(peer), dense_sum=1)
        with pytest.raises(PullFailed, match="dense weights"):
            fill_from_peers(plane, blank(), JOINER, 2, wrong, USUAL)
    with pytest.raises(PullFailed, match="no peer"):
        fill_from_peers(plane, blank(), JOINER, 2, known(), USUAL)
