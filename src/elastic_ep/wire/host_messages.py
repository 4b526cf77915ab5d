"""What the controller and a host's agent say to each other.

Of one member the agent says `Launched`, `Died`, `Reaped`, in this order; or `LaunchFailed` alone. Times are
CLOCK_MONOTONIC nanoseconds of that host.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.wire.messages import Member


@dataclass(frozen=True, slots=True)
class ServerReady:
    """The fork server has imported everything. `threads` is 1 unless a preloaded module started some."""

    pid: int
    threads: int


@dataclass(frozen=True, slots=True)
class ServerLost:
    """The fork server exited. Its ranks live on; a new one is started, unless it never got ready."""

    pid: int
    status: str


@dataclass(frozen=True, slots=True)
class AgentLost:
    """The agent exited, or was ended since it did not answer. Its ranks live on; the next one adopts them."""

    pid: int
    status: str


@dataclass(frozen=True, slots=True)
class AgentReady:
    """The agent runs. `adopted`: so many ranks were there before it."""

    pid: int
    adopted: int


@dataclass(frozen=True, slots=True)
class Launched:
    """The process exists. It can be fenced; it cannot be watched before its Hello. `fork_us`: microseconds."""

    member: Member
    pid: int
    fork_us: int = 0


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """There is no such process, or the kernel is killing it. The rank may be launched again."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The process is dead or surely dying. `cause`: "mutex", "mutex released", "pidfd" or "reaped"."""

    member: Member
    cause: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Reaped:
    """Its memory, files and device work are gone. `status`: "signal 9", "exit status 1" or "unknown"."""

    member: Member
    status: str
    at_ns: int


RankEvent = Launched | LaunchFailed | Died | Reaped
HostEvent = ServerReady | ServerLost | AgentReady | AgentLost | RankEvent


@dataclass(frozen=True, slots=True)
class Launch:
    """Have a rank of this name forked; its configuration travels beside. `Launched` or `LaunchFailed` follows."""

    member: Member


@dataclass(frozen=True, slots=True)
class Watch:
    """The rank says that it runs, so it holds its mutex."""

    member: Member


@dataclass(frozen=True, slots=True)
class Fence:
    """Kill the rank, in whatever state it is. One that is unknown is no error."""

    member: Member


Order = Launch | Watch | Fence
