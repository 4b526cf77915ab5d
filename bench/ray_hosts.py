"""Loses nodes of a Ray cluster under streams: raylets killed, and how long until the group is at full strength again.

Nodes are network namespaces, each with a raylet of its own; the first one has Ray's head and the run process. Each loss
kills a raylet that has an agent (SIGKILL), and Ray is left to find another node for it: `another`, one that is idle, or
`same`, where the raylet is started again after the kill, and there is no other. With `spare` an agent that Ray has
started waits already. Every text is compared with that of undisturbed streams. Needs root, and Ray 2.60:

    python -m bench.ray_hosts [--losses 3] [--how another same spare] [--out bench/results/ray_hosts.json]
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit.bound import Bound
from tests.kit.harness import title
from tests.kit.host_faults import notes, undisturbed, while_they_stream
from tests.kit.hosts import Group, group
from tests.kit.network import Namespace, Network, network, refused
from tests.kit.served import http, status, summary, write_result

from bench.kit.command_line import command_line

PORT = 6379
HOSTS = 3
RANKS_PER_HOST = 2
FULL_S = 120.0
READY_S = 180.0
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What docs/hosts.md asks for."""
WAITS = "this host is ready for a place"
HOW = ("another", "same", "spare")


def pids_in(namespace: Namespace) -> list[int]:
    """Of what runs there."""
    there = os.readlink(f"/proc/{namespace.pid}/ns/net")
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) not in (namespace.pid, os.getpid()):
            with suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/net") == there:
                    found.append(int(entry))
    return found


def is_raylet(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").resolve().name == "raylet"
    return False


@dataclass
class Cluster:
    """Ray, with its head on the first host of `network`."""

    network: Network
    folder: Path

    def start(self, number: int) -> None:
        """Returns when the node is in the cluster."""
        address, here = self.network.addresses[0], self.network.addresses[number]
        which = ["--head", f"--port={PORT}", "--include-dashboard=false"] if number == 0 else [
            f"--address={address}:{PORT}"
        ]  # fmt: skip
        scratch = tempfile.mkdtemp(prefix=f"{number}-", dir=self.folder)
        with open(self.folder / f"{number}.log", "w") as log:
            done = Bound(
                [
                    *self.network.hosts[number].prefix,
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", *which),
                    *(f"--node-ip-address={here}", "--num-cpus=1", f"--temp-dir={scratch}"),
                    *("--object-store-memory=80000000", "--disable-usage-stats"),
                ],
                env={**os.environ, **SETTINGS},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            ).wait(READY_S)
        if done:
            raise OSError(f"ray start: {(self.folder / f'{number}.log').read_text()}")

    def kill(self, number: int) -> None:
        """Its raylet: all else there is of it dies by that."""
        for pid in pids_in(self.network.hosts[number]):
            if is_raylet(pid):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for host in reversed(self.network.hosts):
            for pid in pids_in(host):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def has(self, rank: int) -> int | None:
        """Which node that rank runs on."""
        for number, host in enumerate(self.network.hosts):
            if any(f": rank {rank}." in title(pid) for pid in pids_in(host)):
                return number
        return None


@contextmanager
def serving(folder: Path, nodes: int, agents: int) -> Iterator[tuple[Cluster, Group]]:
    """A group of `HOSTS` on a cluster of so many nodes beside the first one."""
    with (
        network(nodes + 1) as made,
        made.hosts[0].entered(),
        tempfile.TemporaryDirectory(prefix="r") as scratch,
    ):
        cluster = Cluster(made, Path(scratch))
        try:
            for number in range(nodes + 1):
                cluster.start(number)
            arguments = [
                *("--hosts", str(HOSTS), "--ray", f"{made.addresses[0]}:{PORT}", "--ray-agents", str(agents)),
                *("--event-log", "full"),
            ]
            os.environ.update(SETTINGS)
            with group(folder, made.addresses[:1], RANKS_PER_HOST, arguments, [()]) as running:
                yield cluster, running
        finally:
            cluster.close()


async def until_back(url: str, before: dict[int, int], ranks: list[int]) -> float:
    """When those ranks serve in a later incarnation, and all others, too; CLOCK_MONOTONIC seconds."""
    async with asyncio.timeout(FULL_S), http() as session:
        while True:
            engines = (await status(session, url))["engines"]
            if all(engine["state"] == "Serving" for engine in engines) and all(
                engine["incarnation"] > before[engine["id"]] for engine in engines if engine["id"] in ranks
            ):
                return time.monotonic()
            await asyncio.sleep(0.02)


async def lose(cluster: Cluster, running: Group, index: int, how: str) -> dict[str, Any]:
    host = 1 + index % (HOSTS - 1)
    ranks = [host * RANKS_PER_HOST + at for at in range(RANKS_PER_HOST)]
    node = cluster.has(ranks[0])
    assert node is not None, f"rank {ranks[0]} runs nowhere"
    async with http() as session:
        engines = (await status(session, running.server.url))["engines"]
    before = {engine["id"]: engine["incarnation"] for engine in engines}
    killed_ns = time.monotonic_ns()

    async def back() -> float:
        await asyncio.to_thread(cluster.kill, node)
        waits = asyncio.create_task(until_back(running.server.url, before, ranks))
        if how == "same":
            await asyncio.to_thread(cluster.start, node)
        at_s = await waits
        print(f"{how}: at full strength after {at_s - killed_ns / 1e9:.3f} s", flush=True)
        return at_s

    waves, at_s = await while_they_stream(running.server.url, back())
    lost = [note["t_ns"] for note in notes(running, "host_lost") if note["t_ns"] > killed_ns]
    if how != "same":
        await asyncio.to_thread(cluster.start, node)
    return {
        "how": how,
        "node": node,
        "then": cluster.has(ranks[0]),
        "hosts_lost": len(lost),
        "notice_s": round((lost[0] - killed_ns) / 1e9, 3),
        "full_strength_s": round(at_s - killed_ns / 1e9, 3),
        "texts": waves,
    }


def losses(scratch: Path, how: str, count: int) -> list[dict[str, Any]]:
    """`spare`: as many agents as nodes."""
    nodes = HOSTS - 1 + (how != "same")
    agents = HOSTS - 1 + (how == "spare")
    with serving(scratch, nodes, agents) as (cluster, running):
        expected = undisturbed(running.server.url)
        found = []
        for index in range(count):
            if how == "spare":
                running.lines.await_line(WAITS, FULL_S)
            one = asyncio.run(lose(cluster, running, index, how))
            texts = one.pop("texts")
            one["streams"] = sum(map(len, texts))
            one["different"] = sum(
                text != of for wave in texts for text, of in zip(wave, expected, strict=True)
            )
            print(one, flush=True)
            found.append(one)
        return found


def main() -> int:
    parser = command_line(__doc__, "ray_hosts")
    parser.add_argument("--losses", type=int, default=3, help="of each kind (default: %(default)s)")
    parser.add_argument("--how", nargs="+", choices=HOW, default=HOW)
    options = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        print("needs Ray: pip install 'elastic-ep[ray]'", file=sys.stderr)
        return 2
    if why := refused():
        print(why, file=sys.stderr)
        return 2
    import ray

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ray-hosts-") as name:
        for how in options.how:
            folder = Path(name, how)
            folder.mkdir()
            found += losses(folder, how, options.losses)
    by_how = {
        how: {
            key: summary([one[key] for one in found if one["how"] == how])
            for key in ("notice_s", "full_strength_s")
        }
        for how in options.how
    }
    result = {
        "ray": ray.__version__,
        "hosts": HOSTS,
        "ranks_per_host": RANKS_PER_HOST,
        **by_how,
        "losses": found,
    }
    write_result(options.out, result)
    print(by_how)
    return 0


if __name__ == "__main__":
    sys.exit(main())
