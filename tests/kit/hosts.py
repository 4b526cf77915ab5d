"""A group on several hosts: the run process with its ranks, and `python -m elastic_ep.agent` for each further host.

Hosts are addresses of the loopback interface, or whatever `prefix` makes of a command (a network namespace, say). Every
process ends with the one that started it.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.kit.bound import Bound
from tests.kit.served import Server, await_ready

LINE_S = 60.0
END_S = 40.0
_EXITING = 0x4
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Lines:
    """What a process writes to a pipe, line by line, kept."""

    def __init__(self, pipe: IO[str]) -> None:
        self.seen: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._pipe = pipe
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._pipe:
            self._new.put(_ANSI.sub("", line))
        self._new.put(None)

    def close(self) -> None:
        """When all who write have ended."""
        self._thread.join(END_S)
        self._pipe.close()

    def await_line(self, pattern: str, seconds: float = LINE_S) -> re.Match[str]:
        """The first line that was not looked at yet and has it."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{pattern!r} not within {seconds:g} s: {''.join(self.seen)}") from None
            if line is None:
                self._new.put(None)
                raise EOFError(f"the process ended before {pattern!r}: {''.join(self.seen)}")
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found


def processes_of(session: int) -> list[int]:
    """Of the session that began with this process: it and all that it has started."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append(int(entry))
    return found


def may_run(pid: int) -> bool:
    """Whether a thread of it may execute anything yet: it is neither over, nor ends, nor has SIGKILL before it."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        waiting = re.findall(r"^(?:SigPnd|ShdPnd):\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        killed = any(int(each, 16) >> signal.SIGKILL - 1 & 1 for each in waiting)
        return fields[0] not in "ZX" and not int(fields[6]) & _EXITING and not killed
    return False


class Host:
    """`python -m elastic_ep.agent`, and what it starts."""

    def __init__(self, arguments: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.process = Bound(
            [*prefix, sys.executable, "-m", "elastic_ep.agent", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self.lines = Lines(self.process.stderr)

    @property
    def pids(self) -> list[int]:
        return processes_of(self.process.pid)

    def signal(self, number: int) -> None:
        """To all its processes, the agent's first."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """As if its power failed."""
        self.signal(signal.SIGKILL)
        self.process.wait(END_S)
        self.lines.close()

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
        self.lines.close()


@dataclass
class Group:
    """`server` is the first host's."""

    server: Server
    lines: Lines
    join: str
    key_file: Path
    log_dir: Path
    hosts: dict[str, Host] = field(default_factory=dict)
    """By address."""

    def start(self, address: str, prefix: Sequence[str] = (), key_file: Path | None = None) -> Host:
        given = ["--join", self.join, "--key-file", str(key_file or self.key_file), "--address", address]
        host = Host([*given, "--log-dir", str(self.log_dir)], prefix)
        self.hosts[address] = host
        return host

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


@contextmanager
def group(
    folder: Path,
    addresses: Sequence[str] = ("127.0.0.1", "127.0.0.2"),
    ranks_per_host: int = 2,
    arguments: Sequence[str] = (),
    prefixes: Sequence[Sequence[str]] = ((), ()),
    module: str = "elastic_ep.run",
    port: int = 0,
) -> Iterator[Group]:
    """A host at each address, each with its prefix, that serve; ended at exit. `folder` is empty.

    `port`: where they join.
    """
    key, logs = folder / "key", folder / "runs"
    started = time.monotonic()
    with ExitStack() as stack:
        process = Bound(
            [
                *prefixes[0],
                *(sys.executable, "-m", module),
                *("--port", "0", "--host", addresses[0], "--served-model-name", "default"),
                *("--hosts", str(len(addresses)), "--ranks-per-host", str(ranks_per_host)),
                *("--hosts-address", f"{addresses[0]}:{port}", "--key-file", str(key)),
                *("--log-dir", str(logs), "--event-log-max-mb", "0", *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        lines = Lines(process.stderr)
        stack.callback(_end, process, lines)
        join = lines.await_line(r"join=(\S+)")[1]
        made = Group(Server(process, "", folder, 0.0), lines, join, key, logs)
        stack.callback(made.close)
        for address, prefix in zip(addresses[1:], prefixes[1:], strict=True):
            made.start(address, prefix)
        url, run_dir = await_ready(process)
        made.server = Server(process, url, run_dir, time.monotonic() - started)
        yield made


def _end(process: subprocess.Popen[str], lines: Lines) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    lines.close()
    if process.stdout is not None:
        process.stdout.close()
