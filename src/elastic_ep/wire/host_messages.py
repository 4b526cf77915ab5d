"""What the controller and the hosts of its group say to each other.

A host that wants to join says `Join`, and hears `Refuse`, or `GetReady`: it starts what ranks need, for a place that it
has at once (`Welcome`) or waits for (`Wait`). With both it says `HostReady`, and takes orders. From its `Welcome` on it
says `HostAlive` again and again, and lives on what it hears back: its lease ends so long after it has *sent* the last
one that was answered. Thus it never ends later than the controller thinks, however late an answer comes.

Of one member a host says `Launched`, `Died`, `Reaped`, in this order; or `LaunchFailed` alone. Times are
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


@dataclass(frozen=True, slots=True)
class HostUp:
    """A host has joined, under the number `host`, and takes orders. `rejoined`: so many lives it had before."""

    host: int
    name: str
    rejoined: int


@dataclass(frozen=True, slots=True)
class HostLost:
    """A host is taken for dead. Of each of `members`, which ran there, `Reaped` follows when it surely runs no more; the
    rank may be launched before, not admitted."""

    host: int
    members: tuple[Member, ...]
    why: str


RankEvent = Launched | LaunchFailed | Died | Reaped
HostEvent = ServerReady | ServerLost | AgentReady | AgentLost | HostUp | HostLost | RankEvent


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


@dataclass(frozen=True, slots=True)
class Join:
    """`address`: of the host, by which others dial it and by which it is told from them. `release`: of this package.

    `builds`: of the engine in C++, that its processors run. `machine`: a name of the kernel that it runs on.
    """

    address: str
    release: str
    builds: tuple[str, ...]
    machine: str = ""


@dataclass(frozen=True, slots=True)
class Wait:
    """There is no place yet; the host is asked again as soon as there is."""

    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """It will never do, as it is."""

    why: str


@dataclass(frozen=True, slots=True)
class GetReady:
    """What every host of the group needs. `config`: of ranks, as JSON, without what is each host's own.

    `vocabulary`: the file of this name; b"" if there is none. Ports are the run process's, but `carrier_port` is where
    the host's own carrier is to listen; 0: anywhere.
    """

    hosts: tuple[int, ...]
    """Of each rank."""
    config: str
    entry: str
    preload: tuple[str, ...]
    shape: tuple[int, int, int, int, int, int]
    """Of the exchange: the fields of `ExchangeShape`."""
    vocabulary: bytes
    run: str
    """What the run's folder of logs is called; "": nothing is logged."""
    pub_port: int
    rank_port: int
    carrier_port: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The host is number `host` in its life `incarnation`."""

    host: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class HostReady:
    """Ranks can be launched. The carrier listens at `carrier_port`."""

    carrier_port: int


@dataclass(frozen=True, slots=True)
class Links:
    """Its carrier has a connection with `hosts` now. Not `known`: there is no carrier, until the next agent is there."""

    hosts: tuple[int, ...]
    known: bool = True


@dataclass(frozen=True, slots=True)
class HostAlive:
    number: int


@dataclass(frozen=True, slots=True)
class Left:
    """All that ran there has ended, and nothing comes any more."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to the `HostAlive` of that number."""

    number: int


@dataclass(frozen=True, slots=True)
class Expelled:
    """The host was taken for dead: whatever it still has, it ends, and joins anew."""


@dataclass(frozen=True, slots=True)
class Leave:
    """The group stops, or the host was told to: it is over."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the carrier of `host` listens."""

    host: int
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """That life of `host`, and all before, are over: nothing of them is to be taken any more."""

    host: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class LaunchWith:
    """As `Launch`, with the configuration."""

    member: Member
    config: str


FromHost = Join | HostReady | Links | HostAlive | Left | Launched | LaunchFailed | Died | Reaped
ToHost = (
    GetReady
    | Wait
    | Refuse
    | Welcome
    | Lease
    | Expelled
    | Leave
    | Reach
    | GiveUp
    | LaunchWith
    | Watch
    | Fence
)
