"""What the launcher and the fork server say to each other: a message a packet, over a SEQPACKET socket.

The fork server says `Imported` first. To it go its `LaunchOptions` then, with the file of the mutexes and the
`SharedFiles`, and `Fork`s. It says `ServerReady` once; `Launched`, with a pidfd taken before the child could be reaped,
or `LaunchFailed` to each `Fork`; and `Exited` of each child. To `Resync`, from a new agent, it says `Launched` again of
each child that lives, and `Resynced`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_ep.config import LogConfig
from elastic_ep.timing import USUAL, Timing
from elastic_ep.wire.host_messages import Launched, LaunchFailed, ServerReady
from elastic_ep.wire.messages import Member

PACKET_BYTES = 64 << 10


class SharedFiles(NamedTuple):
    """Descriptors of memory that all ranks have: exchange/windows.py, kv/shelf_file.py. Of /dev/null if there is none."""

    windows: int
    shelf: int


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Of a run: what the launcher and all its fork servers need to know.

    `entry` is "module:function", called in each rank as function(config_json, files, life_fd) -> exit status; a
    fork server imports `preload` for it. `nice` is added to the ranks' niceness, so that the run process preempts them.
    """

    entry: str
    preload: tuple[str, ...]
    directory: str
    """The run's, private (mode 0700); it is removed at the end, however the end comes."""
    timing: Timing = USUAL
    nice: int = 5
    log: LogConfig = field(default_factory=LogConfig)
    """The fork server's; what a rank logs is in its configuration."""

    @property
    def mutexes(self) -> int:
        """More than ranks: a dead incarnation's is in use until its watcher has run."""
        return 4 * self.timing.ranks


@dataclass(frozen=True, slots=True)
class Imported:
    """What the command line names is imported. Nothing may be sent to the fork server before: see `life_line.bind`."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Become this rank. Travels with the read end of the rank's life line, and a file with its configuration.

    A file, because the placement of a large model is larger than a packet may be.
    """

    member: Member
    slot: int
    """Of the rank's mutex."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The child is reaped; nothing of it is left."""

    member: Member
    status: str


@dataclass(frozen=True, slots=True)
class Resync:
    """Say what was said before to somebody who may not have heard it."""


@dataclass(frozen=True, slots=True)
class Resynced:
    """All that was to be said is said."""


FromServer = Imported | ServerReady | Launched | LaunchFailed | Exited | Resynced
ToServer = Fork | Resync


def status_text(returncode: int) -> str:
    """In words, from a return code as `subprocess` and `os.waitstatus_to_exitcode` give it."""
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
