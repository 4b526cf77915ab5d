"""One expert's bytes out of a peer's memory, for tests and benches."""

from __future__ import annotations

from elastic_ep.weights.bank import Weights
from elastic_ep.weights.peers import ExpertPull, pull_experts
from elastic_ep.weights.transfer import TransferPlane
from elastic_ep.wire.slot_messages import StateAddress


def pull_expert(
    plane: TransferPlane,
    weights: Weights,
    source: StateAddress,
    source_slot: int,
    layer: int,
    slot: int,
    expected_checksum: int | None,
    deadline_s: float,
) -> int:
    """Overwrite `slot` of `layer` with a peer's slot, and return the checksum of the bytes. No step may be using it.

    Raises PullFailed, and then the slot is as it was: the bytes are checked before the first is written.
    """
    order = ExpertPull(source, source_slot, layer, slot, expected_checksum)
    (outcome,) = pull_experts(plane, weights, [order], deadline_s)
    if outcome.failure is not None:
        raise outcome.failure
    assert outcome.checksum is not None
    return outcome.checksum
