"""What the run process costs: processor time a request and a token, and how long its loop is held when a rank dies.

    python -m bench.run_process [--old PATH] [--new PATH] [--rounds 12] [--kills 12]

Each tree (`--new` is this one by default; without `--old` there is no other) has a server of its own with ranks that
compute nothing: see kit/paced_engine.py. They live through the whole run and get the same requests in turns, over raw
sockets, so that the client costs little. Counted is the processor time of the run process alone, of all its threads:
HTTP, router, controller and event log. A kill is a SIGKILL amid `STREAMS` streams; of it counts the longest turn of the
run process's event loop in `NEAR_S` from then on (see kit/loop_turns.py), and the longest gap in the streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.kit.bound import Bound
from tests.kit.served import ROOT, await_ready, http, percentile, status, summary, until_full, write_result
from train.problems import held_out

from bench.kit.command_line import command_line, source_tree

STREAMS = 64
NEAR_S = 0.1
SETTLE_S = 0.5
SHORT, LONG, OF_KILLS = 30, 120, 300
STEP_MS = "PACED_STEP_MS"
PACED = ("bench/kit/paced_server.py", "bench/paced_server.py")
"""Where a tree may have it."""
LAUNCHER = ROOT / "bench" / "kit" / "loop_turns.py"
ENDS = (b"data: [DONE]\n\n\r\n0\r\n\r\n", b"}}")
"""Of a stream and of a whole answer, as they come over the connection."""


class Case(NamedTuple):
    """Requests to one path for so many tokens each."""

    path: str
    tokens: int
    stream: bool = True

    def requests(self, count: int) -> list[bytes]:
        about = {"model": "default", "max_tokens": self.tokens, "ignore_eos": True, "temperature": 0.0}
        about |= {"stream": True} if self.stream else {}
        found = []
        for problem in held_out(count):
            chat = {"messages": [{"role": "user", "content": problem.question}]}
            prompt = chat if self.path == "chat/completions" else {"prompt": problem.question}
            body = json.dumps({**about, **prompt}).encode()
            head = f"POST /v1/{self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            found.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return found


CASES = {
    "chat": Case("chat/completions", SHORT),
    "chat_whole": Case("chat/completions", SHORT, stream=False),
    "completion": Case("completions", SHORT),
    "chat_long": Case("chat/completions", LONG),
}
KILLED = Case("chat/completions", OF_KILLS)


class Client(asyncio.Protocol):
    """One connection with one request after the other, while `requests` has any. `came`: when parts of answers did."""

    def __init__(self, requests: Iterator[bytes], came: list[float]) -> None:
        self._requests = requests
        self._came = came
        self._seen = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._came.append(time.monotonic())
        if not self._seen and not data.startswith(b"HTTP/1.1 200 "):
            self._transport.close()
        self._seen = self._seen[-1000:] + data
        if self._seen.endswith(ENDS):
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"no good answer: {error}, {self._seen[-300:]!r}"))

    def _ask(self) -> None:
        self._seen = b""
        request = next(self._requests, None)
        if request is None:
            self.done.set_result(None)
            self._transport.close()
        else:
            self._transport.write(request)


@dataclass
class Side:
    """A tree's server, and what was seen of it: microseconds by case; milliseconds of the kills."""

    process: subprocess.Popen[str]
    url: str
    turns: Path
    spent_us: dict[str, list[float]] = field(default_factory=dict)
    killed_s: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)

    def cpu_s(self) -> float:
        """Of the run process so far."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # as clock_getcpuclockid makes it

    async def clients(self, requests: Sequence[bytes]) -> list[list[float]]:
        """Ask all `requests`, so many at once; when parts of answers came, by connection."""
        address, loop, left = urlsplit(self.url), asyncio.get_running_loop(), iter(requests)
        host, port = address.hostname or "", address.port or 0
        came: list[list[float]] = [[] for _ in range(STREAMS)]
        made = [await loop.create_connection(partial(Client, left, one), host, port) for one in came]
        await asyncio.gather(*(client.done for _, client in made))
        return came

    async def load(self, name: str, requests: Sequence[bytes]) -> None:
        spent = self.cpu_s()
        await self.clients(requests)
        self.spent_us.setdefault(name, []).append((self.cpu_s() - spent) / len(requests) * 1e6)

    async def kill(self, rank: int, requests: Sequence[bytes]) -> None:
        async with http() as session:
            engine = (await until_full(session, self.url))["engines"][rank]
            streams = asyncio.create_task(self.clients(requests))
            await asyncio.sleep(SETTLE_S)
            assert (await status(session, self.url))["engines"][rank]["pid"] == engine["pid"]
            killed = time.monotonic()
            os.kill(engine["pid"], signal.SIGKILL)
            self.killed_s.append(killed)
            for came in await streams:
                near = [one for one in pairwise(came) if one[1] > killed and one[0] < killed + NEAR_S]
                self.gaps_ms += [max(after - before for before, after in near) * 1000] if near else []
            await until_full(session, self.url, beyond={rank: engine["incarnation"]})

    def holds_ms(self) -> list[float]:
        """Of each kill the longest turn. For when the server has ended."""
        turns = [(began / 1e9, took / 1e6) for began, took in json.loads(self.turns.read_text())]
        return [
            max((took for began, took in turns if killed - took / 1e3 < began < killed + NEAR_S), default=0.0)
            for killed in self.killed_s
        ]

    def costs_us(self) -> dict[str, float]:
        """Lower quartiles of the rounds, as whatever else the machine does only adds: of a request in each case, and of
        a further token of a stream."""
        found = {name: percentile(spent, 0.25) for name, spent in self.spent_us.items() if name in CASES}
        return {**found, "token": (found["chat_long"] - found["chat"]) / (LONG - SHORT)}


@contextmanager
def serving(tree: Path, options: argparse.Namespace, scratch: Path) -> Iterator[Side]:
    """The run process of `tree`, with ranks without an engine, on a free port."""
    paced = next((path for path in PACED if (tree / path).exists()), None)
    if paced is None:
        raise SystemExit(f"{tree} has none of {', '.join(PACED)}")
    turns = scratch / "turns.json"
    process = Bound(
        [
            # HAZARD: Bound itself is this tree's.
            *("env", f"PYTHONPATH={tree / 'src'}:{tree}", f"{STEP_MS}={options.step_ms}"),
            *(sys.executable, str(LAUNCHER), str(turns), paced.removesuffix(".py").replace("/", ".")),
            *("--ranks", str(options.ranks), "--device", "cpu", "--port", "0"),
            *("--served-model-name", "default", "--log-dir", str(scratch / "runs")),
        ],
        stdout=subprocess.PIPE,
        stderr=(scratch / "stderr").open("w"),
        start_new_session=True,
        cwd=tree,
    )
    try:
        url, _ = await_ready(process)
        yield Side(process, url, turns)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


async def measure(sides: dict[str, Side], options: argparse.Namespace) -> None:
    for number in range(-1, options.rounds):  # what comes first is not counted
        for name, case in CASES.items():
            requests = case.requests(options.requests if number >= 0 else STREAMS)
            for side in list(sides.values())[:: 1 if number % 2 else -1]:
                await side.load(name if number >= 0 else "warm_up", requests)
                await asyncio.sleep(0.05)
    for number in range(options.kills):
        for side in sides.values():
            await side.kill(number % options.ranks, KILLED.requests(STREAMS))


def main() -> None:
    parser = command_line(__doc__, "run_process", ranks=4)
    add = parser.add_argument
    add("--old", type=source_tree, help="a checkout of another commit")
    add("--new", type=Path, default=ROOT)
    add("--rounds", type=int, default=12)
    add("--requests", type=int, default=128, help="of each case, a round")
    add("--step-ms", type=float, default=4.0)
    add("--kills", type=int, default=12)
    options = parser.parse_args()
    trees = {"old": options.old, "new": options.new} if options.old else {"new": options.new}
    with tempfile.TemporaryDirectory(prefix="run_process-") as scratch:
        with ExitStack() as stack:
            sides = {}
            for name, tree in trees.items():
                (folder := Path(scratch) / name).mkdir()
                sides[name] = stack.enter_context(serving(tree.resolve(), options, folder))
            asyncio.run(measure(sides, options))
        found = {
            name: {
                "us": {case: round(cost, 2) for case, cost in side.costs_us().items()},
                "longest_turn_at_a_kill_ms": summary(side.holds_ms()),
                "client_gap_at_a_kill_ms": summary(side.gaps_ms),
            }
            for name, side in sides.items()
        }
    for name in ("us", *(["longest_turn_at_a_kill_ms", "client_gap_at_a_kill_ms"] * bool(options.kills))):
        for key, new in found["new"][name].items():
            old = found["old"][name][key] if "old" in found else float("nan")
            print(f"{name:26} {key:11} old {old:9.2f}  new {new:9.2f}  {new / old if old else 0:.3f}")
    told = {name: getattr(options, name) for name in ("ranks", "rounds", "requests", "step_ms", "kills")}
    write_result(options.out, {**told, "streams": STREAMS, **found})


if __name__ == "__main__":
    main()
