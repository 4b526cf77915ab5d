"""The whole HTTP API of a real server, fuzzed against its own OpenAPI description while ranks are killed.

    python -m bench.fuzz [--cases 100000] [--parallel 1] [--workers 2] [--minutes 240] [--first 0] [--kill-every 20]
        [--out bench/results/fuzz.json]
    python -m bench.fuzz --sum ONE.json OTHER.json ... [--out bench/results/fuzz.json]

Every case is made by schemathesis from the description that the server hands out: two in eight go through the bounds of
every field (some 4,600 cases, over and over, each time at another moment), five have the fields of two to six of those in
one body, one is drawn, mostly as the description asks. One in ten clients leaves after the first bytes of its answer, and
one in four has the admin key, so that ranks are drained, killed and asked back by cases, too.
Counted are answers that a client must never see (5xx, another status, type or shape than the description has), those that
do not come in time, and tracebacks in what the server logs; at the end nothing may be in flight, and the server must end
with status 0. `--parallel`: so many servers side by side, each with its own part of the cases, workers and kills. What
`--minutes` cut short goes on with another `--first`, and `--sum` adds the results up. A case is known by its number:
`--worker 0 --workers 1 --first NUMBER --cases 1 --url URL` sends it again, and prints it if it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import aiohttp
import requests
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.core.transport import Response
from schemathesis.specs.openapi import checks
from tests.kit.bound import Bound
from tests.kit.served import Server, http, server, until_full, write_result

from bench.kit.command_line import command_line
from bench.kit.load import pss_mb

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
ANSWER_S = 120.0
"""Less than the server's own limit for a request: it must not be what ends one."""
TOLD_EVERY = 200
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
DRAWN = 5
IN_SPITE = 0.05
LEAVES = 0.1
KEYED = 0.25
ADMIN_KEY = "fuzz"
WITH_KEY = {"Authorization": f"Bearer {ADMIN_KEY}"}
WITHOUT_BODY = "/cancel$|/verify$|/rebalance$|/ping$|/is_scaling_elastic_ep$"
BYTES = (1000, 1000, 2000, 8000)
"""Of randomness that a case is drawn from: small bodies, and large ones."""
SETTLE_S = 60.0
BACK_S = 180.0
ASK_BACK_S = 10.0
POLL_S = 0.1


class Asked(NamedTuple):
    case: Case[Any]
    leaves: bool
    keyed: bool


class Cases:
    """Case by number: of those that schemathesis reckons, one after the other, or one that is drawn.

    It is drawn by hypothesis without its engine, which would remember all cases.
    """

    def __init__(self, url: str, seed: int) -> None:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        self._seed = seed
        self._drawn: list[Case[Any]] = []
        self._reckoned = list(_reckoned(schema))
        random.Random(seed).shuffle(self._reckoned)
        self._bodies: dict[str, list[Case[Any]]] = {}
        for case in self._reckoned:
            if isinstance(case.body, dict) and case.body:
                self._bodies.setdefault(case.operation.label, []).append(case)
        bodies = schema.include(method="POST").exclude(path_regex=WITHOUT_BODY)
        calm = hypothesis_settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

        def draw(mode: GenerationMode) -> Callable[[bytes], object]:
            @calm
            @given(case=bodies.as_strategy(mode))
            def taken(case: Case[Any]) -> None:
                self._drawn.append(case)

            drawer: Callable[[bytes], object] = taken.hypothesis.fuzz_one_input  # type: ignore[attr-defined]
            return drawer

        self._draw = {mode: draw(mode) for mode in MODES}

    def asked(self, number: int) -> Asked:
        chance = random.Random(f"{self._seed}/{number}")
        leaves, keyed = chance.random() < LEAVES, chance.random() < KEYED
        return Asked(self._case(number, chance), leaves, keyed)

    def _case(self, number: int, chance: random.Random) -> Case[Any]:
        if number % 4 == 0:
            return self._reckoned[number // 4 % len(self._reckoned)]
        if number % 8 != DRAWN:
            return self._crossed(chance)
        draw = self._draw[MODES[chance.random() < IN_SPITE]]
        self._drawn.clear()
        while not self._drawn:
            draw(chance.randbytes(chance.choice(BYTES)))
        return self._drawn[0]

    def _crossed(self, chance: random.Random) -> Case[Any]:
        """Fields of some bodies of one operation, as one body."""
        several = chance.choices(self._bodies[chance.choice(list(self._bodies))], k=chance.randint(2, 6))
        body: dict[str, Any] = {}
        for one in several:
            body |= cast(dict[str, Any], one.body)
        first = several[0]
        return cast(
            Case[Any],
            first.operation.Case(method=first.operation.method, body=body, media_type="application/json"),
        )


def _reckoned(schema: Any) -> Iterator[Case[Any]]:
    for found in schema.get_all_operations():
        operation = found.ok()
        how = schema.config.generation_for(operation=operation)
        yield from schema.iter_coverage_cases(operation, generation_modes=list(MODES), generation_config=how)


@dataclass
class Tally:
    """What a worker has to tell."""

    cases: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    by_path: Counter[str] = field(default_factory=Counter)
    left: int = 0
    longest_s: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        return {
            "cases": self.cases, "statuses": dict(self.statuses), "by_path": dict(self.by_path), "left": self.left,
            "longest_s": self.longest_s, "failures": self.failures,
        }  # fmt: skip

    def add(self, told: dict[str, Any]) -> None:
        self.cases += told["cases"]
        self.statuses.update(told["statuses"])
        self.by_path.update(told["by_path"])
        self.left += told["left"]
        self.longest_s = max(self.longest_s, told["longest_s"])
        self.failures += told["failures"]


def send(asked: Asked, url: str, session: requests.Session, tally: Tally) -> str | None:
    """What was wrong with the answer."""
    began, case = time.monotonic(), asked.case
    headers = WITH_KEY if asked.keyed else None
    tally.cases += 1
    tally.by_path[f"{case.method.upper()} {case.path}"] += 1
    try:
        if asked.leaves:
            tally.left += 1
            keywords = case.as_transport_kwargs(base_url=url, headers=headers)
            with requests.request(**keywords, stream=True, timeout=ANSWER_S) as answer:
                next(answer.iter_content(16), None)
            tally.statuses[str(answer.status_code)] += 1
            return f"status {answer.status_code}" if answer.status_code >= 500 else None
        response: Response = case.call(base_url=url, session=session, headers=headers, timeout=ANSWER_S)
        tally.statuses[str(response.status_code)] += 1
        case.validate_response(response, checks=CHECKS)
    except FailureGroup as failed:
        return "; ".join(f"{one.title}: {one.message}" for one in failed.exceptions)
    except requests.RequestException as error:
        return repr(error)
    finally:
        tally.longest_s = max(tally.longest_s, round(time.monotonic() - began, 3))
    return None


def work(options: argparse.Namespace) -> None:
    """Every so-many-th case; a line of JSON for some of them."""
    cases, tally = Cases(options.url, options.seed), Tally()
    ends = time.monotonic() + options.minutes * 60
    with requests.Session() as session:
        for number in range(options.first + options.worker, options.first + options.cases, options.workers):
            if time.monotonic() > ends:
                break
            asked = cases.asked(number)
            if wrong := send(asked, options.url, session, tally):
                case = asked.case
                shown = {"number": number, "wrong": wrong[:2000], "request": f"{case.method} {case.path}"}
                tally.failures.append({**shown, "keyed": asked.keyed, "body": repr(case.body)[:2000]})
            if tally.cases >= TOLD_EVERY:
                print(json.dumps(tally.told()), flush=True)
                tally = Tally()
    print(json.dumps(tally.told()), flush=True)


def gather(options: argparse.Namespace, url: str, tally: Tally) -> None:
    """Run all workers, and add up what they tell. Raises `RuntimeError` if one of them fails."""
    words = [
        "--url",
        url,
        "--seed",
        str(options.seed),
        "--cases",
        str(options.cases),
        "--workers",
        str(options.workers),
    ]
    words += ["--first", str(options.first), "--minutes", str(options.minutes)]
    started = [
        Bound(
            ["nice", "-n", "3", sys.executable, "-m", "bench.fuzz", *words, "--worker", str(number)],
            stdout=-1,  # a pipe
        )
        for number in range(options.workers)
    ]
    telling = threading.Lock()

    def listen(worker: Bound) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            with telling:
                tally.add(told := json.loads(line))
                for failure in told["failures"]:
                    print(json.dumps(failure), flush=True)
                seen = f"{tally.cases} cases, {len(tally.failures)} failures"
                print(seen, dict(tally.statuses), flush=True)

    listeners = [threading.Thread(target=listen, args=(worker,)) for worker in started]
    for listener in listeners:
        listener.start()
    for listener in listeners:
        listener.join()
    if any(worker.wait() for worker in started):
        raise RuntimeError("a worker failed, see above")


async def all_serve(
    session: aiohttp.ClientSession, url: str, ranks: int, beyond: dict[int, int]
) -> dict[str, Any]:
    """The status when every rank does: those that a case sent away are asked back. Raises `TimeoutError`."""
    async with asyncio.timeout(BACK_S):
        while True:
            body = {"new_data_parallel_size": ranks, "drain_timeout": 0}
            async with session.post(f"{url}/scale_elastic_ep", json=body, headers=WITH_KEY) as response:
                await response.read()
            with contextlib.suppress(TimeoutError):
                return await until_full(session, url, ASK_BACK_S, beyond)


async def kill_on(url: str, ranks: int, every_s: float, seed: int) -> int:
    """One rank after the other, when all serve, until cancelled; how many were killed."""
    chance = random.Random(seed)
    killed = 0
    try:
        async with http() as session:
            beyond: dict[int, int] = {}
            while True:
                await asyncio.sleep(every_s)
                victim = chance.choice((await all_serve(session, url, ranks, beyond))["engines"])
                with contextlib.suppress(ProcessLookupError):  # a case was faster
                    os.kill(victim["pid"], signal.SIGKILL)
                beyond = {victim["id"]: victim["incarnation"]}
                killed += 1
    except asyncio.CancelledError:
        return killed


async def at_rest(url: str) -> None:
    """Nothing is in flight any more. Raises `TimeoutError`."""
    async with http() as session, asyncio.timeout(SETTLE_S):
        while True:
            async with session.get(f"{url}/load") as response:
                if (await response.json())["server_load"] == 0:
                    return
            await asyncio.sleep(POLL_S)


async def fuzz(target: Server, options: argparse.Namespace) -> dict[str, Any]:
    async with http() as session:
        await until_full(session, target.url)
    tally, began, first_pss = Tally(), time.monotonic(), pss_mb(target)
    killing = asyncio.create_task(kill_on(target.url, options.ranks, options.kill_every, options.seed))
    await asyncio.to_thread(gather, options, target.url, tally)
    killing.cancel()
    killed = await killing
    await at_rest(target.url)
    return {
        **tally.told(),
        "kills": killed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "pss_mb": {"begin": first_pss, "end": pss_mb(target)},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The server, the fuzz, and what the server leaves behind."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        log = Path(scratch) / "stderr"
        flags = ["--ranks", str(options.ranks), "--max-model-len", "128", "--event-log-max-mb", "64"]
        flags += ["--admin-key", ADMIN_KEY]
        with log.open("w") as stderr, server(flags, Path(scratch), stderr=stderr) as target:
            result = asyncio.run(fuzz(target, options))
        text = log.read_text(errors="replace")
    traces = [index for index in range(len(text)) if text.startswith("Traceback", index)]
    return {
        **result,
        "exit_status": target.process.returncode,
        "tracebacks": len(traces),
        "first_tracebacks": [text[index : index + 3000] for index in traces[:3]],
    }


def side_by_side(options: argparse.Namespace) -> dict[str, Any]:
    """`--parallel` servers, each with its part of the cases."""
    count = options.parallel
    share = -(-options.cases // count)
    parts = [
        argparse.Namespace(**{**vars(options), "first": options.first + index * share, "cases": share})
        for index in range(count)
    ]
    with ThreadPoolExecutor(count) as threads:
        return summed(list(threads.map(run, parts)))


def summed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As one result. `minutes`: of all servers together."""
    tally = Tally()
    for result in results:
        tally.add(result)
    return {
        **tally.told(),
        "servers": sum(result.get("servers", 1) for result in results),
        "kills": sum(result["kills"] for result in results),
        "minutes": round(sum(result["minutes"] for result in results), 1),
        "pss_mb": {when: max(result["pss_mb"][when] for result in results) for when in ("begin", "end")},
        "exit_status": next((one["exit_status"] for one in results if one["exit_status"]), 0),
        "tracebacks": sum(result["tracebacks"] for result in results),
        "first_tracebacks": [text for result in results for text in result["first_tracebacks"]][:3],
    }


def main() -> None:
    parser = command_line(__doc__, "fuzz", ranks=2)
    parser.add_argument("--cases", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=240.0, help="no longer (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, help="servers (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that draw cases, for each (default: %(default)s)"
    )
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=14, help="(default: %(default)s)")
    parser.add_argument("--worker", type=int, help="be this worker, and ask --url")
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument(
        "--sum", type=Path, nargs="+", metavar="FILE", help="add these results up, run nothing"
    )
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    if options.sum:
        read = [json.loads(path.read_text()) for path in options.sum]
        write_result(
            options.out, {**summed(read), "of": [one["command"] for one in read], "on": read[0]["machine"]}
        )
        return
    result = side_by_side(options)
    print(json.dumps(result, indent=1))
    write_result(options.out, {"ranks": options.ranks, **result})


if __name__ == "__main__":
    main()
