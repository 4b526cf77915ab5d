"""What ranks and the controller tell each other about expert slots: placement, copies, checksums, load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Region(NamedTuple):
    """Memory of a rank that others may read: a tensor's name, its first byte, its length in bytes."""

    name: str
    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StateAddress:
    """Where a rank's weights lie: the transfer session "host:port", and each tensor's place in its memory."""

    session: str
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class StateReady:
    """The rank's weights are whole, and peers may read them at `address`. `dense_sum` is the CRC-32 of the dense ones.

    None if nobody can read them and this rank can read nobody's, for the `reason` given.
    """

    address: StateAddress | None
    dense_sum: int
    reason: str = ""
    pulled: int = 0
    """Experts that came from peers at this launch."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where the weights of a rank lie."""

    rank: int
    address: StateAddress


@dataclass(frozen=True, slots=True)
class PeerWeights:
    """Where a joiner finds its weights: `peers` hold what the placement says. What it reads is checked before use.

    `checksums[layer][logical]` is None where that is not known yet.
    """

    peers: tuple[PeerAddress, ...]
    dense_sum: int
    checksums: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True, slots=True)
class PlacementSeen:
    """The forward thread has passed a boundary with this version: it addresses no slot by an older one."""

    version: int


@dataclass(frozen=True, slots=True)
class CopySlot:
    """Fill the slot `physical` of `layer`, which nobody addresses, with `logical`.

    From physical expert `origin`, whose rank's memory is at `source`; from the checkpoint if there is none.
    `checksum` is what the bytes must amount to, None if it is not known yet.
    """

    ticket: int
    layer: int
    physical: int
    logical: int
    checksum: int | None = None
    origin: int | None = None
    source: StateAddress | None = None


@dataclass(frozen=True, slots=True)
class SlotCopied:
    """The outcome of `CopySlot`: the checksum of the bytes now in the slot, or why there are none.

    Bytes with another checksum than ordered were not written.
    """

    ticket: int
    checksum: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class SumSlots:
    """Compute the checksums of all your slots anew."""

    ticket: int


class SlotSum(NamedTuple):
    """What the memory of slot `physical` of `layer` amounts to: CRC-32 of its float32 bytes."""

    layer: int
    physical: int
    checksum: int


@dataclass(frozen=True, slots=True)
class SlotSums:
    ticket: int
    sums: tuple[SlotSum, ...]


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """Rows that the rank's slots computed since its last such report, `loads[layer][logical expert]`."""

    loads: tuple[tuple[int, ...], ...]
