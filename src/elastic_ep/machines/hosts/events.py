"""What goes into the hosts' machine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.machines.contract import Tick
from elastic_ep.wire.host_messages import (
    Fence,
    FromHost,
    GetReady,
    GiveUp,
    HostEvent,
    LaunchWith,
    Links,
    Reach,
    ToHost,
    Watch,
)

Order = LaunchWith | Watch | Fence
"""What the controller wants of a rank's host."""


@dataclass(frozen=True, slots=True)
class HostsConfig:
    """`hosts[rank]`, of all ranks that there may be; the group begins with `at_start` hosts. `needs` is what each
    host is told that wants to join. `address` is this host's.
    """

    hosts: tuple[int, ...]
    at_start: int
    address: str
    release: str
    needs: GetReady
    fused: str
    """The build of the engine in C++ that all ranks compute with; "": none."""
    carrier: Reach
    """Of this host."""
    machine: str = ""
    """All hosts must be on it: their GPUs reach each other's memory. "": they may be anywhere."""


# Events


@dataclass(frozen=True, slots=True)
class Heard:
    """`token` names one life of one host."""

    token: str
    message: FromHost


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection of `token` has ended; another may follow."""

    token: str


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    token: str
    why: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Every host should have been heard of since the last one."""


@dataclass(frozen=True, slots=True)
class Ordered:
    order: Order


@dataclass(frozen=True, slots=True)
class OwnLinks:
    """Of this host."""

    links: Links


@dataclass(frozen=True, slots=True)
class GroupOver:
    """All hosts may go."""


Event = Tick | Heard | Closed | NotUnderstood | Beat | Ordered | OwnLinks | GroupOver

# Effects


@dataclass(frozen=True, slots=True)
class Say:
    token: str
    message: ToHost


@dataclass(frozen=True, slots=True)
class Here:
    """For the keeper of this host."""

    message: Order | Reach | GiveUp


@dataclass(frozen=True, slots=True)
class Tell:
    """For the controller. Of what is the machine's own, `at_ns` is 0."""

    event: HostEvent


@dataclass(frozen=True, slots=True)
class Apart:
    """`host` has not reached `others` for a while, and its ranks wait for that. Said once."""

    host: int
    others: tuple[int, ...]


Effect = Say | Here | Tell | Apart
