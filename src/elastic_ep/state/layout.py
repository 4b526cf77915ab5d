"""Where a rank's weights lie in its memory, as peers need to know it to read them. Standard library only."""

from __future__ import annotations

from elastic_ep.slot_messages import Region, StateAddress

EXPERT_PARTS = ("gate_up", "down")
"""The stacked tensors of a layer, slot after slot, in the order in which a slot's checksum runs over them."""


def expert_region(layer: int, part: str) -> str:
    """The name of a layer's stacked experts, all slots."""
    return f"layers.{layer}.{part}"


def region(address: StateAddress, name: str) -> Region:
    """Raises ValueError if there is none of that name."""
    for candidate in address.regions:
        if candidate.name == name:
            return candidate
    raise ValueError(f"{address.session} names no memory {name!r}")


def of_layer(address: StateAddress, layer: int) -> StateAddress:
    """What of `address` is needed to read experts of one layer."""
    names = {expert_region(layer, part) for part in EXPERT_PARTS}
    return StateAddress(address.session, tuple(r for r in address.regions if r.name in names))


def slot_region(
    address: StateAddress, layer: int, slot: int, sizes: tuple[int, int]
) -> list[tuple[int, int]]:
    """(address, bytes) of both parts of a slot, whose parts have `sizes` bytes.

    Raises ValueError if the owner has no such slot, or experts of another size.
    """
    parts = []
    for part, nbytes in zip(EXPERT_PARTS, sizes, strict=True):
        whole = region(address, expert_region(layer, part))
        if whole.nbytes % nbytes or not 0 <= slot < whole.nbytes // nbytes:
            raise ValueError(
                f"{address.session} has no slot {slot} of {nbytes} bytes in {whole.nbytes} bytes of {whole.name}"
            )
        parts.append((whole.address + slot * nbytes, nbytes))
    return parts
