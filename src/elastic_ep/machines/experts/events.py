"""What the repair machine hears and says."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.machines.contract import Tick
from elastic_ep.wire.messages import Member, PlacementChanged

# Events


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """The seats of the newest view. Experts need copies on those that are not `leaving`."""

    members: tuple[Member, ...]
    leaving: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """This member routes by `version` or a newer one."""

    member: Member
    version: int


@dataclass(frozen=True, slots=True)
class Reachable:
    """Others can pull weights out of this member's memory."""

    member: Member


@dataclass(frozen=True, slots=True)
class Copied:
    """The slot's bytes amount to `checksum`. With an `error`, or another checksum than ordered, nothing was written."""

    member: Member
    ticket: int
    checksum: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Summed:
    """The member's memory: (layer, physical, checksum) of each of its slots."""

    member: Member
    sums: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """What these members should hold: per layer and slot as in a placement; the order within a rank is free.

    `plan` is for the asker, to know its end by.
    """

    members: tuple[Member, ...]
    slots: tuple[tuple[int, ...], ...]
    plan: int = 0


Event = MembersChanged | Seen | Reachable | Copied | Summed | Planned | Tick

# Effects


@dataclass(frozen=True, slots=True)
class Origin:
    """A living copy to pull from."""

    member: Member
    physical: int


@dataclass(frozen=True, slots=True)
class Order:
    """Have `member` fill a slot of its that nobody addresses; from the checkpoint if `origin` is None.

    `checksum` is what the bytes must amount to, None if that is not known yet.
    """

    member: Member
    ticket: int
    layer: int
    physical: int
    logical: int
    checksum: int | None
    origin: Origin | None


@dataclass(frozen=True, slots=True)
class Replace:
    """Publish these changes of the placement."""

    changed: PlacementChanged


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The slot's bytes are not what the other copies, or the same slot before, amounted to."""

    layer: int
    physical: int


@dataclass(frozen=True, slots=True)
class Recheck:
    """This member gave wrong bytes: have it sum its slots."""

    member: Member


@dataclass(frozen=True, slots=True)
class PlanEnded:
    """`made` copies of a plan were made, `left` were not: it was overtaken, or would have cost tolerance."""

    made: int
    left: int
    plan: int = 0


Effect = Order | Replace | Corrupt | Recheck | PlanEnded
