"""Hosts as network namespaces: each has an address of its own, and a router between them cuts links and mends them.

Namespaces live as long as processes that hold them, and these are bound to the life of the one that made them: whatever
becomes of it, a kill included, nothing is left. Needs root and iproute2 (`refused` says what is missing).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.kit.bound import Bound

_CLONE_NEWNET = 0x40000000
_READY_S = 10.0
_MASK = 24


class Namespace:
    """A network namespace, held by a process."""

    def __init__(self) -> None:
        self._holder = Bound(
            ["unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        until = time.monotonic() + _READY_S
        while not self._is_there():
            if self._holder.poll() is not None or time.monotonic() > until:
                why = self._holder.stderr.read() if self._holder.stderr and self._holder.poll() else ""
                self.close()
                raise OSError(f"no network namespace: {why.strip()}")
            time.sleep(0.002)
        self.ip("link", "set", "lo", "up")

    def _is_there(self) -> bool:
        try:
            return os.readlink(self._path) != os.readlink("/proc/self/ns/net") and self._name == "sleep"
        except OSError:
            return False

    @property
    def _name(self) -> str:
        with open(f"/proc/{self.pid}/comm") as file:
            return file.read().strip()

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def _path(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    @property
    def prefix(self) -> list[str]:
        """Before a command that is to run there."""
        return ["nsenter", f"--net={self._path}"]

    def ip(self, *words: str) -> str:
        """`ip WORDS` there. Raises OSError."""
        return _run(*self.prefix, "ip", *words)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread opens and starts meanwhile is there; what it has is where it was."""
        with open("/proc/thread-self/ns/net") as here, open(self._path) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        if self._holder.stderr:
            self._holder.stderr.close()


class Network:
    """`hosts[i]` has `addresses[i]`; all that goes between two of them goes through `router`."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        """Until `stack` ends. Raises OSError."""
        self.router = self._namespace(stack)
        self.hosts = [self._namespace(stack) for _ in range(count)]
        self.addresses = [f"10.77.{number}.2" for number in range(count)]
        self._rules = itertools.count(10)
        for number, host in enumerate(self.hosts):
            gateway = f"10.77.{number}.1"
            self.router.ip(
                *("link", "add", f"to{number}", "type", "veth"),
                *("peer", "name", "eth0", "netns", str(host.pid)),
            )
            self.router.ip("addr", "add", f"{gateway}/{_MASK}", "dev", f"to{number}")
            self.router.ip("link", "set", f"to{number}", "up")
            host.ip("addr", "add", f"{self.addresses[number]}/{_MASK}", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            host.ip("route", "add", "default", "via", gateway)
        with self.router.entered(), open("/proc/sys/net/ipv4/ip_forward", "w") as forward:
            forward.write("1")

    @staticmethod
    def _namespace(stack: ExitStack) -> Namespace:
        made = Namespace()
        stack.callback(made.close)
        return made

    @contextmanager
    def cut(
        self, one: int, other: int | None = None, port: int | None = None, back: bool = True
    ) -> Iterator[None]:
        """Meanwhile no packet goes from host `one` to `other` (to any), nor back; nobody is told that it was dropped.

        With `port`: of TCP connections to it alone, at whichever end it is. Without `back` packets go the other way.
        """
        here = self.addresses[one]
        there = "0.0.0.0/0" if other is None else self.addresses[other]
        ways = [(here, there), (there, here)] if back else [(here, there)]
        ends = [()] if port is None else [("ipproto", "tcp", end, str(port)) for end in ("dport", "sport")]
        made = []
        try:
            for (sender, receiver), end in itertools.product(ways, ends):
                rule = str(next(self._rules))
                self.router.ip(
                    *("rule", "add", "pref", rule, "from", sender, "to", receiver, *end, "blackhole")
                )
                made.append(rule)
            yield
        finally:
            for rule in made:
                self.router.ip("rule", "del", "pref", rule)

    @contextmanager
    def slow(self, one: int, rate: str) -> Iterator[None]:
        """Meanwhile no more than `rate` (as `tc` has it: 10mbit) goes to host `one`. Later than that packets cannot be
        made: not every kernel has netem."""
        device = ("dev", f"to{one}", "root", "tbf")
        _run(
            *(*self.router.prefix, "tc", "qdisc", "add", *device),
            *("rate", rate, "burst", "16k", "latency", "200ms"),
        )
        try:
            yield
        finally:
            _run(*self.router.prefix, "tc", "qdisc", "del", *device[:-1])


@contextmanager
def network(count: int) -> Iterator[Network]:
    """So many hosts, that reach each other. Raises OSError."""
    with ExitStack() as stack:
        yield Network(stack, count)


@functools.cache
def refused() -> str:
    """Why there can be none here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"network namespaces need iproute2 and util-linux: no {', '.join(missing)}"
    try:
        with network(1):
            pass
    except OSError as error:
        return f"this machine refuses network namespaces: {error}"
    return ""


def _enter(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_READY_S)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


_LIBC = ctypes.CDLL(None, use_errno=True)
