"""Where a rank's weights lie in its memory, as peers need to know it to read them. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_ep.wire.slot_messages import Region, StateAddress


def expert_region(layer: int, part: str) -> str:
    """The name of a part of a layer's experts, stacked by slot."""
    return f"{_experts(layer)}{part}"


def _experts(layer: int) -> str:
    return f"layers.{layer}.experts."


def region(address: StateAddress, name: str) -> Region:
    """Raises ValueError if there is none of that name."""
    for candidate in address.regions:
        if candidate.name == name:
            return candidate
    raise ValueError(f"{address.session} names no memory {name!r}")


def of_layer(address: StateAddress, layer: int) -> StateAddress:
    """What of `address` is needed to read experts of one layer."""
    prefix = _experts(layer)
    return StateAddress(address.session, tuple(r for r in address.regions if r.name.startswith(prefix)))


def slot_region(
    address: StateAddress, layer: int, slot: int, sizes: Mapping[str, int]
) -> list[tuple[int, int]]:
    """(address, bytes) of the parts of a slot, of which each has so many bytes as `sizes` says.

    Raises ValueError if the owner has no such slot, or experts of another size.
    """
    places = []
    for part, nbytes in sizes.items():
        whole = region(address, expert_region(layer, part))
        if whole.nbytes % nbytes or not 0 <= slot < whole.nbytes // nbytes:
            raise ValueError(
                f"{address.session} has no slot {slot} of {nbytes} bytes in {whole.nbytes} bytes of {whole.name}"
            )
        places.append((whole.address + slot * nbytes, nbytes))
    return places
