"""Loses hosts under load: network namespaces with a spare that waits, killed in one blow or cut off and mended.

48 streams answer word problems, half greedy, half sampled with a seed. Every text is compared with the same request in a
run without losses. Beside it, the step of two hosts of four ranks against one of eight. Needs root.

    python -m bench.hosts [--losses 20] [--ranks-per-host 2] [--out bench/results/hosts.json]
"""

from __future__ import annotations

import asyncio
import os
import select
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from tests.kit.harness import title
from tests.kit.host_faults import notes
from tests.kit.hosts import Group, group
from tests.kit.network import Network, network
from tests.kit.served import http, server, summary, until_full, write_result
from train.problems import held_out

from bench.kit.command_line import command_line
from bench.kit.failover_analysis import Curves, read
from bench.kit.failover_plot import draw
from bench.kit.kills import SETTLE_S, Load, compare

HOSTS = 3
STREAMS = 48
ENDED_S = 10.0
WAITS = "this host waits for a place"


@dataclass(frozen=True)
class Target:
    """`network` has a host more than the group."""

    network: Network
    group: Group
    ranks_per_host: int

    def has(self, rank: int) -> int:
        """Which namespace that rank is in: a spare has its place after a loss."""
        for number, address in enumerate(self.network.addresses):
            host = self.group.hosts.get(address)
            if host is not None and any(f": rank {rank}." in title(pid) for pid in host.pids):
                return number
        raise LookupError(f"rank {rank} is on no host that has joined")

    def start(self, number: int) -> None:
        """Returns when it waits, as a spare."""
        host = self.group.start(self.network.addresses[number], self.network.hosts[number].prefix)
        host.lines.await_line(WAITS)


@contextmanager
def hosts(folder: Path, count: int, ranks_per_host: int, spare: bool) -> Iterator[Target]:
    with network(count + spare) as made, made.hosts[0].entered():
        prefixes = [(), *(host.prefix for host in made.hosts[1:count])]
        with group(
            folder, made.addresses[:count], ranks_per_host, ["--event-log", "full"], prefixes
        ) as running:
            yield Target(made, running, ranks_per_host)


async def lose(target: Target, session: aiohttp.ClientSession, index: int, cut: bool) -> dict[str, Any]:
    """A host, and have the spare take its place, and the lost one be the next spare."""
    of = 1 + index % (HOSTS - 1)
    first = of * target.ranks_per_host
    ranks = list(range(first, first + target.ranks_per_host))
    number = target.has(first)
    host = target.group.hosts[target.network.addresses[number]]
    before = {
        engine["id"]: engine for engine in (await until_full(session, target.group.server.url))["engines"]
    }
    told: dict[str, Any] = {
        "stop": False, "joiner_state": None, "ranks": ranks, "how": "cut" if cut else "killed",
    }  # fmt: skip
    with ExitStack() as stack:
        pids = [os.pidfd_open(pid) for pid in host.pids if ": rank " in title(pid)]
        at_ns = time.monotonic_ns()
        if cut:
            await asyncio.to_thread(stack.enter_context, target.network.cut(number))
            at_ns = time.monotonic_ns()
            ended = asyncio.create_task(asyncio.to_thread(until_ended, pids))
        else:
            await asyncio.to_thread(host.kill)
        told["sent"] = [
            {"rank": rank, "incarnation": before[rank]["incarnation"], "at_ns": at_ns} for rank in ranks
        ]
        await until_full(
            session, target.group.server.url, beyond={rank: before[rank]["incarnation"] for rank in ranks}
        )
        if cut:
            told["ended_s"] = (await ended - at_ns) / 1e9
        for fd in pids:
            os.close(fd)
    if cut:
        await asyncio.to_thread(host.lines.await_line, WAITS)
    else:
        await asyncio.to_thread(target.start, number)
    return told


def until_ended(pidfds: list[int]) -> int:
    """When all these processes have; CLOCK_MONOTONIC nanoseconds."""
    for fd in pidfds:
        if not select.select([fd], [], [], ENDED_S)[0]:
            raise TimeoutError("a rank of a host that is cut off lives on")
    return time.monotonic_ns()


async def under_load(target: Target, questions: list[str], losses: int) -> tuple[Load, list[dict[str, Any]]]:
    load = Load(target.group.server, questions, at_once=STREAMS)
    lost = []
    async with http() as session:
        running = asyncio.create_task(load.run(session, None))
        await asyncio.sleep(SETTLE_S)
        for index in range(losses):
            lost.append(await lose(target, session, index, cut=index % 4 >= 2))
            print(
                f"\r{index + 1}/{losses} hosts lost, {load.finished} streams finished, {len(load.errors)} errors ",
                end="", flush=True,
            )  # fmt: skip
            await asyncio.sleep(SETTLE_S)
        load.stopping = True
        await running
    print()
    return load, lost


async def undisturbed(target: Target, questions: list[str]) -> Load:
    load = Load(target.group.server, questions, at_once=STREAMS)
    async with http() as session:
        await until_full(session, target.group.server.url)
        await load.run(session, 1)
    return load


def figures(group: Group, lost: list[dict[str, Any]]) -> tuple[dict[str, Any], Curves]:
    curves = read(group.server.events)
    noticed = [note["t_ns"] for note in notes(group, "host_lost")]
    step_ns = median(b - a for ends in curves.steps.values() for a, b in pairwise(ends))
    by_how: dict[str, Any] = {}
    for how in ("killed", "cut"):
        cases = [case for case in lost if case["how"] == how]
        seen = [(case, next(at for at in noticed if at > case["sent"][0]["at_ns"])) for case in cases]
        stalls = [
            (ends, at)
            for case, at in seen
            for rank, ends in curves.steps.items()
            if rank not in case["ranks"]
        ]
        waits = [ends[found] - at for ends, at in stalls if (found := bisect_right(ends, at)) < len(ends)]
        by_how[how] = {
            "notice_ms": summary([(at - case["sent"][0]["at_ns"]) / 1e6 for case, at in seen]),
            "next_step_after_notice_steps": summary([wait / step_ns for wait in waits]),
            "next_step_after_notice_ms": summary([wait / 1e6 for wait in waits]),
            "full_strength_s": summary([full_s(curves, case) for case in cases]),
        }
    by_how["cut"]["own_ranks_ended_s"] = summary([case["ended_s"] for case in lost if "ended_s" in case])
    return {"median_step_ms": round(step_ns / 1e6, 3), **by_how}, curves


def full_s(curves: Curves, case: dict[str, Any]) -> float:
    """From the loss until the last of its ranks serves elsewhere."""
    return float(
        max(
            min(
                at - sent["at_ns"]
                for at, rank, incarnation, state in curves.states
                if (rank, state) == (sent["rank"], "Serving") and incarnation > sent["incarnation"]
            )
            for sent in case["sent"]
        )
        / 1e9
    )


def step_ms(events: Path) -> dict[str, float | int]:
    steps = read(events).steps.values()
    return summary([(b - a) / 1e6 for ends in steps for a, b in pairwise(ends)])


def steps_of_one_and_two(scratch: Path, questions: Sequence[str]) -> dict[str, Any]:
    """Of eight ranks on one host, and on two."""
    found: dict[str, Any] = {}
    with hosts(scratch / "two", 2, 4, spare=False) as two:
        load = asyncio.run(undisturbed(two, list(questions)))
        found["two_hosts_of_4"] = step_ms(two.group.server.events) | {"failed": len(load.errors)}

    async def run(one: Load) -> None:
        async with http() as session:
            await one.run(session, 1)

    with server(["--ranks", "8", "--event-log", "full"], scratch) as target:
        load = Load(target, list(questions), at_once=STREAMS)
        asyncio.run(run(load))
        found["one_host_of_8"] = step_ms(target.events) | {"failed": len(load.errors)}
    return found


def main() -> None:
    parser = command_line(__doc__, "hosts")
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--questions", type=int, default=64)
    options = parser.parse_args()
    questions = [problem.question for problem in held_out(options.questions)]
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        scratch = Path(name)
        for folder in ("two", "three"):
            (scratch / folder).mkdir()
        with hosts(scratch / "three", HOSTS, options.ranks_per_host, spare=True) as target:
            reference = asyncio.run(undisturbed(target, questions))
            target.start(HOSTS)
            load, lost = asyncio.run(under_load(target, questions, options.losses))
            time.sleep(0.3)  # the log is flushed at most so often
            found, curves = figures(target.group, lost)
        step = steps_of_one_and_two(scratch, questions)
    result = {
        "hosts": HOSTS,
        "ranks_per_host": options.ranks_per_host,
        "streams": STREAMS,
        "reference_errors": reference.errors[:5],
        **compare(load, reference),
        **found,
        "step_ms": step,
        "losses": lost,
    }
    write_result(options.out, result)
    draw(curves, load.stamps, lost, options.out.with_suffix(".png"))
    for key in ("failed_requests", "texts_different", "median_step_ms", "killed", "cut", "step_ms"):
        print(f"{key:16} {result[key]}")


if __name__ == "__main__":
    main()
