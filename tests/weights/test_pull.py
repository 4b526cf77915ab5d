"""Weights from a peer that lives: the right bytes, or none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from elastic_ep.placement import EMPTY
from elastic_ep.weights.bank import Weights, blank_weights, dummy_source
from elastic_ep.weights.peers import ExpertPull, pull_dense, pull_experts
from elastic_ep.weights.transfer import PullFailed, Read, TransferPlane
from elastic_ep.wire.slot_messages import Region, StateAddress
from tests.kit.one_pull import pull_expert
from tests.weights.source import LONG_S, PLACEMENT, TINY, source, weights_of

WIDTH = PLACEMENT.slots_per_rank
FILLED = [slot for slot, logical in enumerate(PLACEMENT.on_rank(0, 0)) if logical != EMPTY]


def blank() -> Weights:
    return blank_weights(TINY, WIDTH, dummy_source(TINY, 0))


def snapshot(weights: Weights) -> list[torch.Tensor]:
    return [layer[part.name].clone() for layer in weights.layers for part in weights.spec.moe.parts]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_an_expert_arrives_in_its_slot_and_nowhere_else(plane: TransferPlane) -> None:
    mine, theirs = blank(), weights_of(0)
    with source() as peer:
        got = pull_expert(plane, mine, peer.address, 1, 1, 3, theirs.checksum(1, 1), LONG_S)
    assert got == theirs.checksum(1, 1) == mine.checksum(1, 3)
    assert torch.equal(mine.layers[1]["gate_up"][3], theirs.layers[1]["gate_up"][1])
    assert torch.equal(mine.layers[1]["down"][3], theirs.layers[1]["down"][1])
    for part in mine.slot(1, 3):
        part.zero_()
    assert same(snapshot(mine), snapshot(blank()))


def test_a_joiner_gets_all_its_weights(plane: TransferPlane) -> None:
    mine, theirs = blank(), weights_of(0)
    with source() as peer:
        assert pull_dense(plane, mine, peer.address, theirs.dense_checksum(), LONG_S) == mine.dense_checksum()
        pulls = [
            ExpertPull(peer.address, slot, layer, slot, theirs.checksum(layer, slot))
            for layer in range(TINY.moe_layers)
            for slot in range(WIDTH)
        ]
        outcomes = list(pull_experts(plane, mine, pulls, LONG_S))
    assert [outcome.pull for outcome in outcomes] == pulls
    assert [outcome.checksum for outcome in outcomes] == [pull.checksum for pull in pulls]
    for name, tensor in theirs.dense().items():
        assert torch.equal(mine.dense()[name], tensor), name
    assert same(snapshot(mine), snapshot(theirs))


def test_wrong_bytes_at_the_source_are_refused_and_the_slot_stays_as_it_was(plane: TransferPlane) -> None:
    mine, theirs = weights_of(1), weights_of(0)
    before = snapshot(mine)
    with source() as peer:
        peer.corrupt(0, FILLED[0])
        pulls = [ExpertPull(peer.address, slot, 0, 2, theirs.checksum(0, slot)) for slot in FILLED[:2]]
        bad, good = pull_experts(plane, mine, pulls[:1], LONG_S), pull_experts(plane, mine, pulls[1:], LONG_S)
        (refused,) = bad
        assert refused.checksum is None
        assert "instead of" in str(refused.failure)
        assert same(snapshot(mine), before)
        with pytest.raises(PullFailed, match=r"checksum [0-9a-f]{8} instead of"):
            pull_expert(plane, mine, peer.address, FILLED[0], 0, 2, theirs.checksum(0, FILLED[0]), LONG_S)
        (taken,) = good
    assert taken.failure is None
    assert mine.checksum(0, 2) == theirs.checksum(0, FILLED[1])


def test_small_experts_come_in_one_read_and_each_is_judged_by_itself(
    plane: TransferPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, first, second = blank(), weights_of(0), weights_of(1)
    asked: list[str] = []
    read = plane.read

    def counted(session: str, parts: Sequence[tuple[int, int]]) -> Read:
        asked.append(session)
        return read(session, parts)

    monkeypatch.setattr(plane, "read", counted)
    with source(0) as one, source(1) as other:
        one.corrupt(0, FILLED[0])
        pulls = [
            ExpertPull(one.address, FILLED[1], 0, 0, first.checksum(0, FILLED[1])),
            ExpertPull(one.address, FILLED[0], 0, 1, first.checksum(0, FILLED[0])),
            ExpertPull(one.address, FILLED[1], 1, 2, first.checksum(1, FILLED[1])),
            ExpertPull(one.address, WIDTH, 0, 1, 0),
            ExpertPull(other.address, 0, 0, 3, second.checksum(0, 0)),
        ]
        outcomes = list(pull_experts(plane, mine, pulls, LONG_S))
        assert asked == [one.address.session, other.address.session]
    assert [outcome.pull for outcome in outcomes] == pulls
    assert [outcome.checksum is None for outcome in outcomes] == [False, True, False, True, False]
    assert mine.checksum(0, 0) == first.checksum(0, FILLED[1])
    assert mine.checksum(0, 1) == blank().checksum(0, 1), "wrong bytes are not written"
    assert mine.checksum(1, 2) == first.checksum(1, FILLED[1])
    assert mine.checksum(0, 3) == second.checksum(0, 0)


def not_served(address: StateAddress) -> StateAddress:
    """The same process's, and memory that it does not serve."""
    regions = tuple(region._replace(address=region.address - (1 << 40)) for region in address.regions)
    return replace(address, regions=regions)


def test_all_that_one_read_was_to_bring_fails_with_it(plane: TransferPlane) -> None:
    mine = weights_of(1)
    before = snapshot(mine)
    with source() as peer:
        elsewhere = not_served(peer.address)
        outcomes = list(
            pull_experts(plane, mine, [ExpertPull(elsewhere, slot, 0, slot) for slot in (0, 1)], LONG_S)
        )
    assert ["refused" in str(outcome.failure) for outcome in outcomes] == [True, True]
    assert same(snapshot(mine), before)


def test_other_dense_weights_are_refused(plane: TransferPlane) -> None:
    mine = blank()
    with source() as peer, pytest.raises(PullFailed, match="dense"):
        pull_dense(plane, mine, peer.address, 1, LONG_S)


def test_memory_that_is_not_served_is_refused(plane: TransferPlane) -> None:
    mine = weights_of(1)
    before = snapshot(mine)
    with source() as peer:
        elsewhere = not_served(peer.address)
        with pytest.raises(PullFailed, match="refused"):
            pull_expert(plane, mine, elsewhere, 0, 0, 0, None, LONG_S)
        with pytest.raises(PullFailed, match="no slot"):
            pull_expert(plane, mine, peer.address, WIDTH, 0, 0, None, LONG_S)
        with pytest.raises(PullFailed, match="names no memory"):
            pull_dense(plane, mine, replace(peer.address, regions=()), None, LONG_S)
    assert same(snapshot(mine), before)


def test_many_pulls_at_once_from_several_sources(plane: TransferPlane) -> None:
    ranks = [weights_of(rank) for rank in (0, 1)]
    targets = [blank() for _ in range(4)]
    failures: list[BaseException] = []

    def pull_all(target: Weights, rank: int, address: StateAddress) -> None:
        try:
            for slot in range(WIDTH):
                pull_expert(
                    plane,
                    target,
                    address,
                    slot,
                    0,
                    slot,
                    ranks[rank].checksum(0, slot),
                    LONG_S,
                )
        except BaseException as failure:
            failures.append(failure)

    with ExitStack() as stack:
        peers = [stack.enter_context(source(rank)) for rank in (0, 1)]
        threads = [
            threading.Thread(target=pull_all, args=(target, index % 2, peers[index % 2].address))
            for index, target in enumerate(targets)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
    assert not failures
    for index, target in enumerate(targets):
        assert torch.equal(target.layers[0]["gate_up"], ranks[index % 2].layers[0]["gate_up"])
        assert torch.equal(target.layers[0]["down"], ranks[index % 2].layers[0]["down"])


def test_the_address_of_this_machine_is_announced(plane: TransferPlane) -> None:
    other = TransferPlane("127.0.0.2")
    memory = torch.arange(4096, dtype=torch.int32)
    other.register([Region("memory", memory.data_ptr(), memory.nbytes)])
    target = torch.zeros_like(memory)
    assert other.session.startswith("127.0.0.2:")
    plane.pull(other.session, memory.data_ptr(), target.data_ptr(), memory.nbytes, LONG_S)
    assert torch.equal(target, memory)
    other.close()
