"""Kills ranks under load and shows what clients and survivors saw of it.

64 concurrent streams answer word problems, half greedy, half sampled with a seed, while ranks are killed: single
ones over all ranks, pairs, joiners in each of their states, and SIGSTOP instead of SIGKILL in a quarter of cases.
Every text is compared with the same request's text in a run without kills.

    python -m bench.failover [--kills 40] [--out bench/results/failover.json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tests.kit.served import Server, chat, http, server, status, until_full, write_result
from train.problems import held_out

from bench.failover_analysis import analyse
from bench.failover_plot import draw

STREAMS = 64
SETTLE_S = 1.5
JOINER_STATES = ("Launching", "InitCUDA", "InitDist", "Joining")
PUBLISHED = {
    "mooncake_pg_s": "5.0 (2 s timeout and 3 s window; its rank 0 must not die)",
    "sglang_elastic_ep_s": "6.2-6.8",
    "eep_s": "11",
    "tarragon_s": "0.3-0.4",
}


@dataclass(frozen=True)
class Case:
    """One disturbance: these ranks, this signal; then the replacement of the first one in `joiner_state`."""

    ranks: tuple[int, ...]
    stop: bool = False
    joiner_state: str | None = None
    instead: int | None = None
    """The rank that is killed then in place of the replacement."""


@dataclass
class Load:
    """Streams that go on until told; every result by (prompt, mode)."""

    server: Server
    questions: list[str]
    texts: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    finished: int = 0
    streams: list[list[float]] = field(default_factory=list)
    """When each piece of a stream's text came, CLOCK_MONOTONIC seconds."""
    at_once: int = STREAMS
    stopping: bool = False

    @property
    def stamps(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(self.streams))

    async def run(self, session: aiohttp.ClientSession, rounds: int | None) -> None:
        """`rounds` times all questions, or until `stopping`."""
        jobs = itertools.chain.from_iterable(
            ((index, mode) for index in range(len(self.questions)) for mode in ("greedy", "sampled"))
            for _ in (range(rounds) if rounds else itertools.count())
        )
        await asyncio.gather(*(self._worker(session, jobs) for _ in range(self.at_once)))

    async def _worker(self, session: aiohttp.ClientSession, jobs: Any) -> None:
        for index, mode in jobs:
            if self.stopping:
                return
            fields = {"temperature": 0.0} if mode == "greedy" else {"temperature": 1.0, "seed": index}
            stamps: list[float] = []
            self.streams.append(stamps)
            try:
                text = await chat(
                    session,
                    self.server.url,
                    self.questions[index],
                    stamps=stamps,
                    max_tokens=160,
                    **fields,
                )
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                self.errors.append(f"{mode} {index}: {error!r}")
                continue
            self.texts.setdefault((index, mode), set()).add(text)
            self.finished += 1


def plan(kills: int, ranks: int, seed: int) -> list[Case]:
    """Every rank in turn, rank 0 included; a quarter SIGSTOP; every eighth a pair; every fifth kills the joiner."""
    draw_rank = random.Random(seed)
    cases = []
    for number in range(kills):
        rank = number % ranks
        if number % 8 == 7:
            other = draw_rank.choice([r for r in range(ranks) if r != rank])
            cases.append(Case((rank, other)))
        elif number % 4 == 1:
            cases.append(Case((rank,), stop=True))
        elif number % 5 == 4:
            cases.append(Case((rank,), joiner_state=JOINER_STATES[number // 5 % len(JOINER_STATES)]))
        else:
            cases.append(Case((rank,)))
    return cases


async def strike(session: aiohttp.ClientSession, url: str, case: Case) -> dict[str, Any]:
    """Do what the case says; when each signal was sent, CLOCK_MONOTONIC nanoseconds."""
    before = {engine["id"]: engine for engine in (await status(session, url))["engines"]}
    sent = []
    for rank in case.ranks:
        sent.append({"rank": rank, "incarnation": before[rank]["incarnation"], "at_ns": time.monotonic_ns()})
        os.kill(before[rank]["pid"], signal.SIGSTOP if case.stop else signal.SIGKILL)
    joiner = None
    if case.joiner_state:
        joiner = await strike_joiner(session, url, before[case.ranks[0]], case.joiner_state, case.instead)
    return {
        "ranks": case.ranks,
        "stop": case.stop,
        "joiner_state": case.joiner_state,
        "instead": case.instead,
        "sent": sent,
        "joiner": joiner,
    }


async def strike_joiner(
    session: aiohttp.ClientSession, url: str, old: dict[str, Any], state: str, instead: int | None
) -> dict[str, Any]:
    """Kill the replacement, or rank `instead`, when it is seen in `state` (or the first time it is seen past it)."""
    order = [*JOINER_STATES, "Serving"]
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        engines = (await status(session, url))["engines"]
        engine = engines[old["id"]]
        newer = engine["incarnation"] > old["incarnation"] and engine["state"] in order
        if newer and engine["pid"] and order.index(engine["state"]) >= order.index(state):
            victim = engine if instead is None else engines[instead]
            at_ns = time.monotonic_ns()
            os.kill(victim["pid"], signal.SIGKILL)
            told = {name: victim[name] for name in ("id", "incarnation")}
            return {"seen_state": engine["state"], **told, "at_ns": at_ns}
        await asyncio.sleep(0)
    raise TimeoutError(f"no replacement of rank {old['id']} within 30 s")


async def disturbed_run(
    target: Server, questions: list[str], cases: list[Case], at_once: int = STREAMS
) -> tuple[Load, list[dict[str, Any]]]:
    load = Load(target, questions, at_once=at_once)
    struck = []
    async with http() as session:
        running = asyncio.create_task(load.run(session, None))
        await asyncio.sleep(3.0)
        for number, case in enumerate(cases):
            struck.append(await strike(session, target.url, case))
            beyond = {s["rank"]: s["incarnation"] for s in struck[-1]["sent"]}
            if case.instead is not None:
                beyond[case.instead] = struck[-1]["joiner"]["incarnation"]
            await until_full(session, target.url, beyond=beyond)
            print(
                f"\r{number + 1}/{len(cases)} kills, {load.finished} streams finished, {len(load.errors)} errors ",
                end="",
            )
            await asyncio.sleep(SETTLE_S)
        load.stopping = True
        await running
    print()
    return load, struck


async def reference_run(target: Server, questions: list[str]) -> Load:
    load = Load(target, questions)
    async with http() as session:
        await load.run(session, 1)
    return load


async def restart_everything(log_dir: Path, arguments: list[str], question: str) -> dict[str, float]:
    """What a user does today: kill the server, start it again, wait for the first token."""
    with server(arguments, log_dir) as first:
        killed = time.monotonic()
        first.process.kill()
        first.process.wait()
    with server(arguments, log_dir) as second:
        stamps: list[float] = []
        async with http() as session:
            await chat(session, second.url, question, stamps=stamps, temperature=0.0, max_tokens=8)
        return {"ready_s": round(second.ready_s, 3), "first_token_s": round(stamps[0] - killed, 3)}


def compare(load: Load, reference: Load) -> dict[str, Any]:
    different = [
        f"{mode} {index}"
        for (index, mode), texts in sorted(load.texts.items())
        if texts != reference.texts.get((index, mode), set())
    ]
    return {
        "streams_finished": load.finished,
        "failed_requests": len(load.errors),
        "errors": load.errors[:20],
        "texts_compared": len(load.texts),
        "texts_different": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench/results/failover.json"))
    options = parser.parse_args()
    questions = [problem.question for problem in held_out(options.questions)]
    arguments = ["--ranks", str(options.ranks), "--device", options.device]
    with tempfile.TemporaryDirectory(prefix="failover-") as scratch:
        with server(arguments, Path(scratch)) as target:
            reference = asyncio.run(reference_run(target, questions))
        with server(arguments, Path(scratch)) as target:
            start_s = target.ready_s
            cases = plan(options.kills, options.ranks, options.seed)
            load, struck = asyncio.run(disturbed_run(target, questions, cases))
            time.sleep(0.3)  # the log is flushed at most so often
            figures, curves = analyse(target.events, struck)
        restart = asyncio.run(restart_everything(Path(scratch), arguments, questions[0]))
    result = {
        "ranks": options.ranks,
        "streams": STREAMS,
        "start_s": round(start_s, 2),
        "reference_errors": reference.errors[:5],
        **compare(load, reference),
        **figures,
        "compared_with": {"restart_everything": restart, "published_stall": PUBLISHED},
        "kills": struck,
    }
    write_result(options.out, result)
    draw(curves, load.stamps, struck, options.out.with_suffix(".png"))
    for name in (
        "failed_requests",
        "texts_different",
        "notice_ms",
        "hang_notice_ms",
        "stall_steps",
        "full_strength_s",
        "rejoin_steps",
    ):
        print(f"{name:20} {result[name]}")


if __name__ == "__main__":
    main()
