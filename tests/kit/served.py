"""What the benchmarks share: a server of their own, a client that streams, and where a result came from."""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp

from elastic_ep.run import BUNDLED_MODEL
from tests.kit.bound import Bound

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE = re.compile(r"^elastic_ep:(\w+?)(?:_total)?(\{.*\})? (\S+)$", re.MULTILINE)
_URL = re.compile(r"http://[^\s/]+:\d+")
MODEL = "default"
TOOL_TEMPLATE = ROOT / "tests" / "kit" / "tool_template.jinja"
"""The bundled model's chat template, with tools; it was not taught any."""
START_DEADLINE_S = 60.0
BEGUN_S = 60.0


def provenance() -> dict[str, Any]:
    """Machine, commit and command of this measurement."""

    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "machine": {
            "cpu": model,
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _module_name() -> str:
    """Of what runs: a file of this repository."""
    return ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(only_finite({**provenance(), **result}), indent=1, allow_nan=False) + "\n")
    new.replace(path)  # whoever is killed meanwhile leaves the one before
    print(f"wrote {path}")


def only_finite(value: Any) -> Any:
    """None for what nothing was seen of: JSON has no NaN, and no infinity."""
    if isinstance(value, dict):
        return {key: only_finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(-(-share * len(ordered) // 1)) - 1))]


def summary(values: Sequence[float]) -> dict[str, float | int]:
    rounded = {
        name: round(percentile(values, share), 4)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return {"count": len(values), **rounded, "max": round(max(values, default=float("nan")), 4)}


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Of so many calls, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    return round(percentile(times, 0.5), 4)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    run_dir: Path
    ready_s: float

    @property
    def events(self) -> Path:
        return self.run_dir / "events.jsonl"


def shaped_model(folder: Path, shape: Mapping[str, int]) -> Path:
    """`folder`, made: the bundled model's without weights, with `shape` in its config. For `--load-format dummy`."""
    shutil.copytree(BUNDLED_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **shape}))
    return folder


def of_tree(tree: Path) -> list[str]:
    """Python for modules of this source tree."""
    return ["env", f"PYTHONPATH={tree / 'src'}{os.pathsep}{tree}", sys.executable]


@contextmanager
def server(
    arguments: Sequence[str],
    log_dir: Path,
    module: str = "elastic_ep.run",
    stderr: IO[str] | None = None,
    tree: Path | None = None,
) -> Iterator[Server]:
    """`python -m elastic_ep.run` (or what `module` makes of it) with these arguments on a free port, ended at exit.

    Killed if this process ends otherwise. `tree`: another source tree than this one.

    What it logs goes to `stderr`; if that is not given nowhere, or with BENCH_VERBOSE where ours goes.
    """
    started = time.monotonic()
    process = Bound(
        [
            *(of_tree(tree) if tree else [sys.executable]),
            "-m",
            module,
            "--port",
            "0",
            "--served-model-name",
            "default",
            "--log-dir",
            str(log_dir),
            *(() if tree else ("--event-log-max-mb", "0")),  # benches read one file
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=stderr or (sys.stderr if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL),
        start_new_session=True,
    )
    try:
        url, run_dir = await_ready(process)
        yield Server(process, url, run_dir, time.monotonic() - started)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def await_ready(process: subprocess.Popen[str]) -> tuple[str, Path]:
    assert process.stdout is not None
    url: str | None = None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if found := _URL.search(line):
            url = url or found.group()
        if line.startswith("events: "):
            assert url is not None, "the URL comes before the events line"
            return url, Path(line.removeprefix("events: ").strip()).parent
    raise RuntimeError(f"the server ended with status {process.wait()} before it was ready: {''.join(seen)}")


@asynccontextmanager
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=300)
    ) as session:
        yield session


async def status(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(f"{url}/v1/fault_tolerance/status") as response:
        result: dict[str, Any] = await response.json()
        return result


async def counters(session: aiohttp.ClientSession, url: str, rank: int | None = None) -> Counter[str]:
    """The server's metrics by name, without prefix and "_total", summed over all labels; or those of one rank."""
    async with session.get(f"{url}/metrics") as response:
        samples = _SAMPLE.findall(await response.text())
    found: Counter[str] = Counter()
    for name, labels, value in samples:
        if rank is None or f'rank="{rank}"' in labels:
            found[name] += round(float(value))
    return found


class Stamps(list[float]):
    """When each piece of a text came. Who waits for some is told; of several texts, too."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def append(self, stamp: float) -> None:
        super().append(stamp)
        self._more.set()

    async def reach(self, count: int = 1) -> None:
        while len(self) < count:
            self._more.clear()
            await self._more.wait()


async def begun(answer: asyncio.Task[str], stamps: Stamps, count: int = 1) -> None:
    """`answer` has so many pieces, or has ended."""
    reached = asyncio.create_task(stamps.reach(count))
    await asyncio.wait({answer, reached}, timeout=BEGUN_S, return_when=asyncio.FIRST_COMPLETED)
    assert reached.done() or answer.done(), f"{len(stamps)} of {count} pieces within {BEGUN_S:g} s"
    reached.cancel()


async def chat(
    session: aiohttp.ClientSession,
    url: str,
    question: str,
    *,
    stamps: list[float] | None = None,
    **fields: Any,
) -> str:
    """The streamed answer to one question; of calls of tools, a list of [name, arguments] as JSON.

    Raises on any error that a client would see.
    """
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "stream": True, **fields}
    parts: list[str] = []
    calls: list[list[str]] = []
    finished = False
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                finished = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error in the stream: {event['error']}")
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    parts.append(text)
                    if stamps is not None:
                        stamps.append(time.monotonic())
                for call in choice["delta"].get("tool_calls") or ():
                    if call.get("id"):
                        calls.append([call["function"]["name"], ""])
                    calls[call["index"]][1] += call["function"].get("arguments") or ""
    if not finished:
        raise RuntimeError("the stream ended without [DONE]")
    return json.dumps(calls) if calls else "".join(parts)


async def until_full(
    session: aiohttp.ClientSession,
    url: str,
    deadline_s: float = 60.0,
    beyond: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """Wait until every rank is Serving, those in `beyond` in a later incarnation; the status then."""
    limit = time.monotonic() + deadline_s
    least = beyond or {}
    while True:
        now = await status(session, url)
        engines = now["engines"]
        replaced = all(engine["incarnation"] > least.get(engine["id"], -1) for engine in engines)
        if replaced and all(engine["state"] == "Serving" for engine in engines):
            return now
        if time.monotonic() > limit:
            raise TimeoutError(f"not all ranks serve after {deadline_s} s: {now}")
        await asyncio.sleep(0.05)
