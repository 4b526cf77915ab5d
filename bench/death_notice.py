"""How long after a SIGKILL the run process knows: the robust mutex against pidfd, idle and with all cores busy.

``python -m bench.death_notice``. Ranks are the real launcher's, with torch in memory and a resident block of
their own; a second thread of theirs computes without end, as a rank's forward thread may. The busy processes are
as nice as ranks are, or not nice at all (the worst case: a machine shared with others).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from tests.kit.bound import Bound
from tests.kit.served import write_result

from bench.kit.command_line import command_line
from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles
from elastic_ep.host.keeper import Keeper
from elastic_ep.host.scheduling import make_prompt
from elastic_ep.wire.host_messages import Died, HostEvent, Launched, Reaped
from elastic_ep.wire.messages import Member

RANK_NICE = 5
SWITCH_INTERVAL_S = 0.0005
SETTLE_S = 0.02
"""For the watcher's thread to block before the kill."""
DEADLINE_S = 30.0
_PAGE = 4096
_RANK_ENTRY = "bench.death_notice:victim"


def victim(config_json: str, files: SharedFiles, life_fd: int) -> int:
    """The rank: touch memory, say hello into the pipe `files.windows`, sleep."""
    block = bytearray(int(json.loads(config_json)["resident_mib"]) << 20)
    block[::_PAGE] = b"x" * len(block[::_PAGE])
    os.write(files.windows, b"%d\n" % time.monotonic_ns())
    threading.Thread(target=compute, daemon=True).start()
    while True:
        signal.pause()


def compute() -> None:
    while True:
        sum(range(10_000))


HOG = """
import os
from elastic_ep.host.scheduling import make_ordinary
make_ordinary()
os.nice({})
print(flush=True)
while True:
    pass
"""


@dataclass
class Samples:
    """Milliseconds, one value a kill (or launch)."""

    mutex: list[float] = field(default_factory=list)
    """From the kill until the watcher's stamp; only kills that the mutex reported first."""
    event: list[float] = field(default_factory=list)
    """From the kill until the notice is handled on the event loop, whatever its cause."""
    pidfd: list[float] = field(default_factory=list)
    """From the kill until the process is known to be gone."""
    fork: list[float] = field(default_factory=list)
    hello: list[float] = field(default_factory=list)
    """From the launch until the rank runs."""


class Bench:
    def __init__(self) -> None:
        self.seen: dict[tuple[type[HostEvent], Member], tuple[HostEvent, int]] = {}
        self._changed = anyio.Event()

    def on_event(self, event: HostEvent) -> None:
        if isinstance(event, (Died, Launched, Reaped)):
            self.seen[type(event), event.member] = (event, time.monotonic_ns())
            self._changed.set()
            self._changed = anyio.Event()

    async def until(self, kind: type[HostEvent], member: Member) -> tuple[Any, int]:
        with anyio.fail_after(DEADLINE_S):
            while (kind, member) not in self.seen:
                await self._changed.wait()
        return self.seen[kind, member]


async def one_kill(
    bench: Bench, launcher: Keeper, member: Member, hellos: int, mib: int, to: Samples
) -> None:
    began_ns = time.monotonic_ns()
    launcher.launch(member, json.dumps({"resident_mib": mib}))
    launched, _ = await bench.until(Launched, member)
    with anyio.fail_after(DEADLINE_S):
        await anyio.wait_readable(hellos)
    to.fork.append(launched.fork_us / 1e3)
    to.hello.append((int(os.read(hellos, 100)) - began_ns) / 1e6)
    launcher.watch(member)
    await anyio.sleep(SETTLE_S)
    killed_ns = time.monotonic_ns()
    os.kill(launched.pid, signal.SIGKILL)
    notice, handled_ns = await bench.until(Died, member)
    gone, _ = await bench.until(Reaped, member)
    if notice.cause == "mutex":
        to.mutex.append((notice.at_ns - killed_ns) / 1e6)
    to.event.append((handled_ns - killed_ns) / 1e6)
    to.pidfd.append((gone.at_ns - killed_ns) / 1e6)


@contextmanager
def busy(processes: int, niceness: int) -> Iterator[None]:
    """`processes` that never sleep."""
    command = [sys.executable, "-c", HOG.format(niceness)]
    hogs = [Bound(command, stdout=subprocess.PIPE) for _ in range(processes)]
    try:
        for hog in hogs:
            assert hog.stdout is not None
            hog.stdout.readline()
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    hellos, hello_writer = os.pipe()
    settings = LaunchOptions(
        entry=_RANK_ENTRY,
        preload=(*filter(None, options.preload.split(",")), "bench.death_notice"),
        directory=tempfile.mkdtemp(prefix="eep-bench-"),
        nice=RANK_NICE,
    )
    bench = Bench()
    incarnation = 0
    async with Keeper(settings, SharedFiles(hello_writer, hello_writer)) as launcher:
        await launcher.start(bench.on_event)
        for name, processes, niceness in (
            ("idle", 0, 0),
            ("busy, nice as ranks", options.busy, RANK_NICE),
            ("busy, not nice", options.busy, 0),
        ):
            samples = Samples()
            with busy(processes, niceness):
                for _ in range(options.kills):
                    incarnation += 1
                    await one_kill(
                        bench, launcher, Member(0, incarnation), hellos, options.resident_mib, samples
                    )
            results[name] = report(name, samples, options.kills)
    os.close(hellos)
    os.close(hello_writer)
    return results


def report(name: str, samples: Samples, kills: int) -> dict[str, Any]:
    print(f"{name}: the mutex was first in {len(samples.mutex)} of {kills} kills")
    rows = {
        "kill to mutex": samples.mutex,
        "kill to event": samples.event,
        "kill to pidfd": samples.pidfd,
        "fork": samples.fork,
        "launch to running": samples.hello,
    }
    out: dict[str, Any] = {"mutex_first": len(samples.mutex)}
    for row, values in rows.items():
        out[f"{row.replace(' ', '_')}_ms"] = numbers = quantiles(values)
        print(f"  {row:18}", *(f"{key} {value:9.3f}" for key, value in numbers.items()), "ms")
    return out


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "min": round(ordered[0], 3),
        "p50": round(statistics.median(ordered), 3),
        "p90": round(ordered[int(0.9 * (len(ordered) - 1))], 3),
        "max": round(ordered[-1], 3),
    }


def main() -> None:
    parser = command_line(__doc__, "death_notice")
    parser.add_argument("--kills", type=int, default=40, help="per condition")
    parser.add_argument("--busy", type=int, default=8, help="busy processes")
    parser.add_argument("--resident-mib", type=int, default=100, help="memory of a rank's own")
    parser.add_argument("--preload", default="torch")
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    make_prompt()
    results = anyio.run(measure, options)
    write_result(
        options.out, {"kills": options.kills, "resident_mib": options.resident_mib, "notice": results}
    )


if __name__ == "__main__":
    main()
