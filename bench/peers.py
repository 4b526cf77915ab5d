"""Ours beside other engines, and beside an older commit: the same GPUs, the same model shape, the same load, in turns.

    python -m bench.peers --old TREE
    python -m bench.peers --peer 'vllm=PYTHONPATH=SITE vllm serve {model} --load-format dummy --port {port} ...'

Every side is started, loaded with each case, and stopped before the next is started: a GPU has room for one. Weights are
random, of Qwen3-30B-A3B's shape with `--layers` layers, or of the `--model` that is given. A `--peer` is a name and a
command for the shell; {model} and {port} are filled in, {name} is what to call the model. What it logs is kept beside the
result. A side that fails leaves `failed: ...` in its place, and the others are measured all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.kit.bound import Bound
from tests.kit.served import MODEL, ROOT, server

from bench.kit.closed_load import Case, put_on
from bench.kit.command_line import command_line
from bench.kit.peers_plot import draw_sides
from bench.kit.sections import Rows, Sections
from bench.kit.sides import add_side_options, context_for, server_arguments, side
from elastic_ep.config import PAGE_SIZE
from elastic_ep.run import BUNDLED_MODEL

POLL_S = 0.5
STOP_S = 30.0
_LABEL = re.compile(r'(\w+)="([^"]*)"')
CASES = ("1:128:256", "16:128:256", "64:128:256", "256:128:256", "8:4096:32", "4:15000:32")


@contextmanager
def peer(command: str, model: Path, port: int, log: Path) -> Iterator[str]:
    """Its URL, when it is ready. RuntimeError if it ends before. For how long to wait is the caller's matter."""
    line = command.format(model=model, port=port, name=MODEL)
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = Bound(["bash", "-c", line], stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not _is_ready(url):
            if process.poll() is not None:
                raise RuntimeError(f"the peer does not come up: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(POLL_S)
        yield url
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it started: what outlives it would hold the GPU's memory and the port."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def cache_tokens(url: str) -> int | None:
    """That fit in the KV cache of all ranks, if the server says so: ours in its status, vLLM in its metrics."""
    with suppress(urllib.error.URLError):
        with urllib.request.urlopen(f"{url}/v1/fault_tolerance/status", timeout=10) as answer:
            told = json.load(answer)
        return int(sum(PAGE_SIZE * rank["kv_pages"]["device"] for rank in told["engines"]))
    with suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("vllm:cache_config_info"):
                said = dict(_LABEL.findall(line))
                return int(said["num_gpu_blocks"]) * int(said["block_size"])
    return None


def loaded(url: str, options: argparse.Namespace, ready_s: float, rows: Rows) -> dict[str, Any]:
    for case in options.cases:
        rows.add(
            asyncio.run(
                put_on(
                    url,
                    MODEL,
                    case,
                    vocabulary=options.prompt_vocabulary,
                    warm_s=options.warm,
                    seconds=options.seconds,
                )
            )
        )
    return {"start_s": round(ready_s, 1), "cache_tokens": cache_tokens(url), "cases": rows.measured}


def measure(options: argparse.Namespace, scratch: Path, sections: Sections) -> None:
    """Into `sections`: each side, and this commit's ratios to the others."""
    named = ("--served-model-name", MODEL)
    arguments = [*server_arguments(options, scratch), *named, *options.server_flags.split()]
    model = scratch / "model" if options.config_only else options.model
    planned = [{"case": str(case)} for case in options.cases]

    def ours(name: str, tree: Path) -> dict[str, Any]:
        rows = sections.rows(name, planned)
        one = side(name, arguments, tree)
        with server(one.arguments, scratch / "runs", tree=tree) as target:
            return {**one.described(), **loaded(target.url, options, target.ready_s, rows)}

    def theirs(name: str, command: str) -> dict[str, Any]:
        rows = sections.rows(name, planned)
        log = options.out.with_suffix(f".{name}.log")
        began = time.monotonic()
        with peer(command, model, options.port, log) as url:
            return {"command": command, **loaded(url, options, time.monotonic() - began, rows)}

    trees = {"old": options.old} if options.old else {}
    if not options.peers_only:
        trees["new"] = ROOT
    names = list(trees)
    for name, tree in trees.items():
        sections.run(name, partial(ours, name, tree), options.limit)
    for given in options.peer:
        name, command = given.split("=", 1)
        names.append(name)
        sections.run(name, partial(theirs, name, command), options.limit)
    done = {name: sections.result[name]["cases"] for name in names if name not in sections.failed}
    if new := done.pop("new", None):
        sections.result["ratios"] = {name: ratios(new, cases) for name, cases in done.items()}
        sections.write()
    if done := {name: sections.result[name]["cases"] for name in names if name not in sections.failed}:
        draw_sides(done, options.out.with_suffix(".png"))


def ratios(new: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of this commit to another side, case by case."""
    return [
        {
            **{name: a[name] for name in ("streams", "prompt_tokens", "tokens")},
            "tokens_per_s": round(a["tokens_per_s"] / b["tokens_per_s"], 3) if b["tokens_per_s"] else None,
            "first_token_p50": round(a["first_token_ms"]["p50"] / b["first_token_ms"]["p50"], 3),
            "gap_p50": round(a["gap_ms"]["p50"] / b["gap_ms"]["p50"], 3),
        }
        for a, b in zip(new, other, strict=True)
    ]


def _case(text: str) -> Case:
    streams, prompt, tokens = map(int, text.split(":"))
    return Case(streams, prompt, tokens)


def main() -> None:
    parser = command_line(__doc__, "peers", ranks=1)
    add_side_options(parser)
    parser.set_defaults(device="cuda", load_format="dummy")
    add = parser.add_argument
    add("--peer", action="append", default=[], metavar="NAME=COMMAND")
    add("--port", type=int, default=8002, help="of peers")
    add("--peers-only", action="store_true", help="this commit is left out: it was measured in another run")
    add("--limit", type=int, default=1200, help="seconds after which a side has failed, with its start")
    add(
        "--cases",
        type=_case,
        nargs="+",
        default=[_case(case) for case in CASES],
        help="streams:prompt:tokens",
    )
    add("--prompt-vocabulary", type=int, default=400, help="prompts are of tokens below this")
    add("--warm", type=float, default=3.0, help="seconds before those that count, of each case")
    add("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    options.config_only |= options.model == BUNDLED_MODEL
    context_for(options, max(case.prompt + case.tokens for case in options.cases))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sections = Sections(options.out, None, layers=options.layers, ranks=options.ranks)
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        measure(options, Path(scratch), sections)
    for name, rows in sections.result.get("ratios", {}).items():
        for row in rows:
            print(f"new / {name}: {row}")
    if sections.failed:
        raise SystemExit(f"failed: {', '.join(sections.failed)}")


if __name__ == "__main__":
    main()
