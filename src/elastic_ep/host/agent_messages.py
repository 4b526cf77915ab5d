"""What an agent and its keeper on the same host say to each other, besides what any controller would: see keeper.py.

`AgentStarted` is answered by `Begin`, which travels with the file of the mutexes and the `SharedFiles`; then comes the
fork server (`ServerBegun`, with its control socket and a pidfd), an `Adopt` for each rank, and `AllAdopted`.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.host.fork_messages import LaunchOptions
from elastic_ep.wire.host_messages import (
    AgentReady,
    Died,
    Fence,
    GiveUp,
    Launch,
    Launched,
    LaunchFailed,
    Links,
    Reach,
    Reaped,
    ServerReady,
    Watch,
)
from elastic_ep.wire.messages import Member


@dataclass(frozen=True, slots=True)
class Begin:
    """`carries`: a `Carry` comes, now or when the host has a place."""

    options: LaunchOptions
    carries: bool


@dataclass(frozen=True, slots=True)
class ServerBegun:
    """`ready`: an agent before this one has had it, and it forks."""

    pid: int
    ready: bool


@dataclass(frozen=True, slots=True)
class ServerFailed:
    """There is no fork server to be had."""

    reason: str


@dataclass(frozen=True, slots=True)
class ServerExited:
    pid: int
    status: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """A rank that was asked for before this agent was there. Its life line and its pidfd come along, as far as known."""

    member: Member
    slot: int
    server_pid: int
    """Of the fork server that was asked."""
    pid: int
    """0: it is not known whether it was forked."""
    fds: tuple[bool, bool]
    """Which of the two come."""


@dataclass(frozen=True, slots=True)
class AllAdopted:
    pass


@dataclass(frozen=True, slots=True)
class Carry:
    """Ranks of other hosts take part: carry what they say to each other. The socket that listens comes along.

    As in `CarrierConfig`.
    """

    hosts: tuple[int, ...]
    own: int
    incarnation: int
    key: bytes
    shape: ExchangeShape | None
    """None: the ranks are on GPUs, which reach each other's memory; what they say of their steps is carried alone."""


def carried_shape(device: str, shape: ExchangeShape) -> ExchangeShape | None:
    """As in `Carry`."""
    return shape if device == "cpu" else None


@dataclass(frozen=True, slots=True)
class Ping:
    """`Alive` follows, or the agent is ended."""


@dataclass(frozen=True, slots=True)
class Close:
    """Kill all ranks, let the fork server go, and end."""


@dataclass(frozen=True, slots=True)
class AgentStarted:
    pid: int


@dataclass(frozen=True, slots=True)
class ServerWanted:
    """The one there was is gone."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The fork server is about to be asked for this rank. The write end of its life line comes along."""

    member: Member
    slot: int
    server_pid: int


@dataclass(frozen=True, slots=True)
class Alive:
    pass


ToAgent = (
    Begin
    | ServerBegun
    | ServerFailed
    | ServerExited
    | Adopt
    | AllAdopted
    | Launch
    | Watch
    | Fence
    | Carry
    | Reach
    | GiveUp
    | Ping
    | Close
)
FromAgent = (
    AgentStarted
    | AgentReady
    | ServerWanted
    | Asked
    | Alive
    | ServerReady
    | Launched
    | LaunchFailed
    | Died
    | Reaped
    | Links
)
