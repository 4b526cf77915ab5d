"""Who holds which expert, and whether the bytes are right: what operators ask of placement and audit."""

from __future__ import annotations

from collections.abc import Collection

import anyio.lowlevel

from elastic_ep.group.audit import Audit
from elastic_ep.group.port import CorruptSlot, ExpertsStatus, Layer, LayerStatus, SlotStatus, Verification
from elastic_ep.placement import EMPTY, Placement
from elastic_ep.wire.messages import Member


async def experts_status(placement: Placement, ranks: Collection[int], audit: Audit) -> ExpertsStatus:
    """`ranks` take part now. Others have their turn of the event loop between each two layers."""
    layers, hosts = [], []
    for layer in range(len(placement.slots)):
        layers.append(_layer(placement, layer, ranks, audit))
        hosts.append(min(placement.host_copies(layer, ranks)))
        await anyio.lowlevel.checkpoint()
    tolerates = min(layer.tolerates for layer in layers)
    return ExpertsStatus(placement.version, tolerates, tuple(layers), max(0, min(hosts) - 1))


async def layer_status(placement: Placement, layer: int, ranks: Collection[int]) -> Layer | None:
    """None: there is no such layer. Others have their turn of the event loop between each two layers."""
    if not 0 <= layer < len(placement.slots):
        return None
    least = []
    for each in range(len(placement.slots)):
        least.append(min(placement.copies(each, ranks)))
        await anyio.lowlevel.checkpoint()
    shape = (placement.num_experts, placement.slots_per_rank)
    return Layer(placement.version, layer, *shape, placement.slots[layer], tuple(least))


def _layer(placement: Placement, layer: int, ranks: Collection[int], audit: Audit) -> LayerStatus:
    slots = []
    for physical, logical in enumerate(placement.slots[layer]):
        rank = placement.rank_of(physical)
        known = audit.sums.get((layer, physical)) if logical != EMPTY and rank in ranks else None
        slots.append(
            SlotStatus(
                physical,
                rank,
                None if logical == EMPTY else logical,
                rank in ranks,
                None if known is None else f"{known:08x}",
            )
        )
    return LayerStatus(layer, max(0, min(placement.copies(layer, ranks)) - 1), tuple(slots))


async def verify(
    placement: Placement, members: Collection[Member], audit: Audit, deadline_s: float
) -> Verification:
    """Ask all members; what differs was taken out of the placement when their answers came in.

    Whoever dies before it answers is silent, and nobody waits for it any longer; so is whoever has not in `deadline_s`.
    """
    found_before = len(audit.corrupt)
    silent = await audit.ask_and_wait(members, deadline_s)
    answered = {member.rank for member in members} - {member.rank for member in silent}
    checked = sum(
        logical != EMPTY
        for row in placement.slots
        for p, logical in enumerate(row)
        if placement.rank_of(p) in answered
    )
    differ = tuple(CorruptSlot(*place, placement.rank_of(place[1])) for place in audit.corrupt[found_before:])
    return Verification(checked, differ, tuple(sorted(member.rank for member in silent)))
