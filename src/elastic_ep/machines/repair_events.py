"""What the repair machine hears and says."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.machines.contract import Tick
from elastic_ep.messages import CopySlot, Member, PlacementChanged


@dataclass(frozen=True, slots=True)
class RepairConfig:
    """`copies_in_flight` per rank; a copy that is not reported after `copy_deadline_ms` is planned elsewhere."""

    copies_in_flight: int = 4
    copy_deadline_ms: int = 10_000
    retry_ms: int = 1_000


# Events


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """The seats of the newest view."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """This member routes by `version` or a newer one."""

    member: Member
    version: int


@dataclass(frozen=True, slots=True)
class Copied:
    member: Member
    ticket: int
    checksum: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Summed:
    """The member's memory: (layer, physical, checksum) of each of its slots."""

    member: Member
    sums: tuple[tuple[int, int, int], ...]


Event = MembersChanged | Seen | Copied | Summed | Tick

# Effects


@dataclass(frozen=True, slots=True)
class Order:
    member: Member
    copy: CopySlot


@dataclass(frozen=True, slots=True)
class Replace:
    """Publish these changes of the placement."""

    changed: PlacementChanged


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The slot's bytes are not what the other copies, or the same slot before, amounted to."""

    layer: int
    physical: int


Effect = Order | Replace | Corrupt
