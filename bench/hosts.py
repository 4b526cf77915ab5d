"""Loses hosts under load: network namespaces with a spare that waits, killed in one blow or cut off and mended.

48 streams answer word problems, half greedy, half sampled with a seed. Every text is compared with the same request in a
run without losses. Beside it, the step of two hosts of four ranks against one of eight. Needs root.

    python -m bench.hosts [--losses 20] [--ranks-per-host 4] [--minutes 10] [--out bench/results/hosts.json]

`--minutes`: after so long under load no further host is lost, and what was seen is written. Instead of all that, each
into the `--out` given:

    --false-alarms MINUTES [--busy 16]   nobody is lost on purpose, beside so many busy processes: who is all the same
    --old TREE                           one host of eight ranks, of this tree and that one by turns: throughput, stalls
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import aiohttp
from tests.kit.bound import Bound
from tests.kit.harness import title
from tests.kit.host_faults import notes
from tests.kit.hosts import Group, group, may_run
from tests.kit.network import Network, network
from tests.kit.served import http, server, summary, until_full, write_result
from train.problems import held_out

from bench.kit.command_line import command_line, source_tree
from bench.kit.failover_analysis import Curves, read
from bench.kit.failover_plot import draw
from bench.kit.kills import SETTLE_S, Case, Load, compare, disturbed_run

HOSTS = 3
STREAMS = 48
ENDED_S = 10.0
READY_S = 90.0
WAITS = "this host is ready for a place"


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
        host.lines.await_line(WAITS, READY_S)


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
        running = [pid for pid in host.pids if ": rank " in title(pid)]
        pids = [os.pidfd_open(pid) for pid in running]
        at_ns = time.monotonic_ns()
        if cut:
            await asyncio.to_thread(stack.enter_context, target.network.cut(number))
            at_ns = time.monotonic_ns()
            halted = asyncio.create_task(asyncio.to_thread(until_halted, running))
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
            told["halted_s"] = (await halted - at_ns) / 1e9
            told["ended_s"] = (await ended - at_ns) / 1e9
        for fd in pids:
            os.close(fd)
    if cut:
        await asyncio.to_thread(host.lines.await_line, WAITS, READY_S)
    else:
        await asyncio.to_thread(target.start, number)
    return told


def until_halted(pids: list[int]) -> int:
    """When the kernel has killed all these, and nothing of them runs any more; CLOCK_MONOTONIC nanoseconds."""
    limit = time.monotonic() + ENDED_S
    while any(map(may_run, pids)):
        if time.monotonic() > limit:
            raise TimeoutError("a rank of a host that is cut off runs on")
        time.sleep(0.005)
    return time.monotonic_ns()


def until_ended(pidfds: list[int]) -> int:
    """When all these processes have; CLOCK_MONOTONIC nanoseconds."""
    for fd in pidfds:
        if not select.select([fd], [], [], ENDED_S)[0]:
            raise TimeoutError("a rank of a host that is cut off lives on")
    return time.monotonic_ns()


async def under_load(
    target: Target, questions: list[str], losses: int, minutes: float
) -> tuple[Load, list[dict[str, Any]]]:
    load = Load(target.group.server, questions, at_once=STREAMS)
    lost = []
    async with http() as session:
        running = asyncio.create_task(load.run(session, None))
        await asyncio.sleep(SETTLE_S)
        limit = time.monotonic() + 60 * minutes
        for index in range(losses):
            if time.monotonic() > limit:
                break
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
    by_how["cut"]["own_ranks_run_no_more_s"] = summary(
        [case["halted_s"] for case in lost if "halted_s" in case]
    )
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


@contextmanager
def busy(count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            process = Bound([sys.executable, "-c", "while True: pass"], stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def false_alarms(questions: list[str], minutes: float, processes: int, ranks_per_host: int) -> dict[str, Any]:
    async def run(target: Target) -> Load:
        load = Load(target.group.server, questions, at_once=STREAMS)
        async with http() as session:
            await until_full(session, target.group.server.url)
            running = asyncio.create_task(load.run(session, None))
            await asyncio.sleep(60 * minutes)
            load.stopping = True
            await running
        return load

    with (
        tempfile.TemporaryDirectory(prefix="hosts-") as name,
        hosts(Path(name), HOSTS, ranks_per_host, spare=False) as target,
    ):
        with busy(processes):
            load = asyncio.run(run(target))
        time.sleep(0.3)  # the log is flushed at most so often
        return {
            "minutes": minutes,
            "busy_processes": processes,
            "hosts": HOSTS,
            "ranks_per_host": ranks_per_host,
            "streams_finished": load.finished,
            "errors": load.errors[:20],
            "hosts_lost": [note["why"] for note in notes(target.group, "host_lost")],
            "ranks_lost": [f"{note['rank']}: {note['why']}" for note in notes(target.group, "loss")],
        }


PAIRS = 3


def one_host(questions: list[str], tree: Path | None) -> dict[str, float]:
    """Of eight ranks, four of which are killed, one after the other."""

    async def run(load: Load) -> None:
        async with http() as session:
            await until_full(session, load.server.url)
            await load.run(session, 1)

    with (
        tempfile.TemporaryDirectory(prefix="hosts-") as name,
        server(["--ranks", "8"], Path(name), tree=tree) as target,
    ):
        load = Load(target, questions, at_once=STREAMS)
        began = time.monotonic()
        asyncio.run(run(load))
        per_s = len(load.stamps) / (time.monotonic() - began)
        cases = [Case((rank,)) for rank in (1, 3, 5, 7)]
        struck, told = asyncio.run(disturbed_run(target, questions, cases, STREAMS))
    stalls = []
    for case in told:
        kill = case["sent"][0]["at_ns"] / 1e9
        stalls.append(
            max(b - a for a, b in pairwise(at for at in struck.stamps if kill - 0.1 < at < kill + 1))
        )
    return {"pieces_per_s": per_s, "stall_s": median(stalls), "errors": len(load.errors + struck.errors)}


def before_and_after(questions: list[str], old: Path) -> dict[str, Any]:
    pairs = [(one_host(questions, old), one_host(questions, None)) for _ in range(PAIRS)]
    return {
        "pairs": [{"old": before, "new": after} for before, after in pairs],
        "throughput_ratio": geometric_mean([b["pieces_per_s"] / a["pieces_per_s"] for a, b in pairs]),
        "stall_ratio": geometric_mean([a["stall_s"] / b["stall_s"] for a, b in pairs]),
    }


def main() -> None:
    parser = command_line(__doc__, "hosts")
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--ranks-per-host", type=int, default=4)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--false-alarms", type=float, metavar="MINUTES")
    parser.add_argument("--busy", type=int, default=16)
    parser.add_argument("--old", type=source_tree, metavar="TREE")
    options = parser.parse_args()
    questions = [problem.question for problem in held_out(options.questions)]
    if options.false_alarms or options.old:
        found = (
            before_and_after(questions, options.old)
            if options.old
            else false_alarms(questions, options.false_alarms, options.busy, options.ranks_per_host)
        )
        write_result(options.out, found)
        print(found)
        return
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        scratch = Path(name)
        for folder in ("two", "three"):
            (scratch / folder).mkdir()
        with hosts(scratch / "three", HOSTS, options.ranks_per_host, spare=True) as target:
            reference = asyncio.run(undisturbed(target, questions))
            target.start(HOSTS)
            load, lost = asyncio.run(under_load(target, questions, options.losses, options.minutes))
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
