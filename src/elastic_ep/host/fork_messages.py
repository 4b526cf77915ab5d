"""What the launcher and the fork server say to each other: one JSON object a packet, over a SEQPACKET socket.

The first, to the fork server, are its `LaunchOptions`, with the files of the mutexes and of the windows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_ep.config import LogConfig
from elastic_ep.timing import USUAL, Timing

PACKET_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Of a run: what the launcher and all its fork servers need to know.

    `entry` is "module:function", called in each rank as function(config_json, windows_fd, life_fd) -> exit status; a
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
class Fork:
    """Become this rank. Travels with the read end of the rank's life line, and a file with its configuration.

    A file, because the placement of a large model is larger than a packet may be.
    """

    rank: int
    incarnation: int
    slot: int
    """Of the rank's mutex."""


@dataclass(frozen=True, slots=True)
class Ready:
    """All is imported. `threads` should be 1: only a single-threaded process forks safely."""

    pid: int
    threads: int


@dataclass(frozen=True, slots=True)
class Forked:
    """Travels with a pidfd, taken before the child could be reaped. `fork_us`: how long the fork took."""

    rank: int
    incarnation: int
    pid: int
    fork_us: int


@dataclass(frozen=True, slots=True)
class Refused:
    rank: int
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The child is reaped; nothing of it is left."""

    rank: int
    incarnation: int
    status: str


ForkMessage = Fork | Ready | Forked | Refused | Exited
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Fork, Ready, Forked, Refused, Exited)}


def pack(message: ForkMessage) -> bytes:
    return json.dumps({"is": type(message).__name__, **asdict(message)}, ensure_ascii=False).encode()


def unpack(data: bytes) -> ForkMessage:
    """Raises ValueError, KeyError or TypeError on anything that `pack` did not make."""
    fields = json.loads(data)
    message: ForkMessage = _KINDS[fields.pop("is")](**fields)
    return message


def status_text(returncode: int) -> str:
    """In words, from a return code as `subprocess` and `os.waitstatus_to_exitcode` give it."""
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
