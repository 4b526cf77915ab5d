"""Pages of KV cache between a GPU and pinned memory: how fast, what a stream's return takes, what storing costs steps.

* "mover": `CudaPages.read` and `write` of full batches for several sizes of the pinned memory, beside a bare copy of as
  many bytes; and how long it takes to make one, which a joining rank waits for.
* "fetch": after a kill, `--pages` pages for each of so many streams come from host memory through `PageCopier`, a batch
  at a time.
* "steps": decode steps of `--batch` sequences in turns with and without a copier that stores a page for one of 16
  sequences in each step, as many as decodes fill; the model has `--step-layers` layers and is on one rank alone.

    python -m bench.gpu_pages --out bench/results/gpu_pages.json
    python -m bench.gpu_pages --device cpu --layers 2 --pages 8 --rounds 2 --steps 2 --out /tmp/pages.json    # the script
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from tests.kit.served import percentile
from tests.kit.shapes import QWEN3_30B

from bench.kit.command_line import command_line
from bench.kit.decode import Engine
from bench.kit.sections import quartiles
from elastic_ep.config import PAGE_SIZE, EngineLimits
from elastic_ep.engine.ops_cuda.pages import CudaPages
from elastic_ep.kv.copier import PageCopier
from elastic_ep.kv.names import PageName
from elastic_ep.kv.shelf import Shelf
from elastic_ep.kv.shelf_file import ShelfLayout
from elastic_ep.models import qwen3_moe
from elastic_ep.placement import launch_placement
from elastic_ep.rank.engine import SHELF_THREADS
from elastic_ep.weights.bank import Weights, dummy_source

STAGING_MIB = (4, 8, 16, 32, 64)
STREAMS = (1, 4, 16)
HEADS, DIM = 4, 128
_PATIENCE_S, _LOOK_S = 60.0, 0.0005


@contextmanager
def a_shelf(page_bytes: int, pages: int) -> Iterator[Shelf]:
    """With room for `pages`."""
    layout = ShelfLayout(1, pages, page_bytes)
    fd = layout.create()
    shelf = Shelf(fd, layout, 0, threads=SHELF_THREADS["cuda"])
    try:
        yield shelf
    finally:
        shelf.close()
        os.close(fd)


def name_of(number: int) -> PageName:
    return PageName(number.to_bytes(16, "little"))


def new_cache(layers: int, pages: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(layers, 2, pages + 1, HEADS, PAGE_SIZE, DIM, dtype=torch.bfloat16, device=device)


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each round but the first."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1000)
    return times[1:]


def movers(cache: torch.Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    for mib in STAGING_MIB:
        began = time.perf_counter()
        mover = CudaPages(cache, mib << 20)
        made_ms = (time.perf_counter() - began) * 1000
        most = min(mover.most, cache.shape[2] - 1)
        pages = list(range(1, most + 1))
        size = most * mover.page_bytes
        reads = timed(lambda mover=mover, pages=pages: mover.read(pages), rounds)  # type: ignore[misc]
        data = mover.staging(most)
        writes = timed(lambda mover=mover, pages=pages, data=data: mover.write(pages, data), rounds)  # type: ignore[misc]
        bare = bare_copies(size, cache.device, rounds)
        yield {
            "staging_mib": mib,
            "pages": most,
            "mib": round(size / 2**20, 1),
            "made_ms": round(made_ms, 2),
            **{f"{side}_ms": quartiles(times, 4) for side, times in (("read", reads), ("write", writes))},
            **{
                f"{side}_gb_s": round(size / percentile(times, 0.5) / 1e6, 2)
                for side, times in (("read", reads), ("write", writes), *bare.items())
            },
        }


def bare_copies(size: int, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """One copy of so many bytes, to the host and back."""
    on_device = device.type == "cuda"
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=on_device)

    def copy(to: torch.Tensor, of: torch.Tensor) -> None:
        to.copy_(of, non_blocking=True)
        if on_device:
            torch.cuda.current_stream(device).synchronize()

    return {
        "bare_read": timed(lambda: copy(here, there), rounds),
        "bare_write": timed(lambda: copy(there, here), rounds),
    }


def fetches(cache: torch.Tensor, pages: int, rounds: int) -> Iterator[dict[str, Any]]:
    mover = CudaPages(cache)
    for streams in STREAMS:
        if streams * pages >= cache.shape[2]:
            return
        first, last = [], []
        with a_shelf(mover.page_bytes, streams * pages) as shelf:
            page = np.ones((1, mover.page_bytes), np.uint8)
            for number in range(streams * pages):
                shelf.put([name_of(number)], page)
            with closing(PageCopier(shelf, mover)) as copier:
                for _ in range(rounds):
                    times = fetch_all(copier, streams, pages)
                    first.append(times[0])
                    last.append(times[-1])
        size = streams * pages * mover.page_bytes
        yield {
            "streams": streams,
            "pages_each": pages,
            "mib": round(size / 2**20),
            "first_ms": quartiles(first, 3),
            "last_ms": quartiles(last, 3),
            "gb_s": round(size / percentile(last, 0.5) / 1e6, 2),
        }


def fetch_all(copier: PageCopier, streams: int, pages: int) -> list[float]:
    """When each stream had its pages, milliseconds after all were asked for."""
    began = time.perf_counter()
    for stream in range(streams):
        numbers = range(stream * pages, (stream + 1) * pages)
        copier.fetch(stream, [name_of(number) for number in numbers], [number + 1 for number in numbers])
    ended: list[float] = []
    while len(ended) < streams:
        for _, good in copier.take_done().fetched:
            assert good == pages, f"{good} of {pages} pages"
            ended.append((time.perf_counter() - began) * 1000)
        time.sleep(_LOOK_S)  # as the forward thread, which waits for its device meanwhile
        assert time.perf_counter() - began < _PATIENCE_S, "pages do not come"
    return ended


def steps(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Blocks with and without stores, in turns; a ratio is that of two blocks of one round."""
    spec = qwen3_moe.spec(replace(QWEN3_30B, num_hidden_layers=options.step_layers))
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    weights = Weights(spec, placement, 0, dummy_source(spec, 0), device, torch.bfloat16)
    longest = 64 + 2 * (options.rounds + 1) * options.steps
    batch = options.batch
    pages = batch * -(-longest // PAGE_SIZE) + options.pages
    limits = EngineLimits(longest, batch, max(256, batch), PAGE_SIZE, pages)
    engine = Engine(weights, limits, None, graphs=device.type == "cuda")
    mover = CudaPages(engine.runner._ops.caches)
    engine._add([[1 + request] * 16 for request in range(batch)], longest)
    while len(engine._run()) < batch:
        pass
    blocks: dict[str, list[float]] = {"off": [], "on": []}
    spread: dict[str, list[float]] = {"off": [], "on": []}
    numbers = count()
    stored = 0
    with a_shelf(mover.page_bytes, options.pages) as shelf, closing(PageCopier(shelf, mover)) as copier:
        for number in range(options.rounds + 1):
            for mode in ("off", "on") if number % 2 else ("on", "off"):
                times = []
                for _ in range(options.steps):
                    began = time.perf_counter()
                    if mode == "on":
                        full = range(-(-batch // PAGE_SIZE))
                        copier.store([(name_of(next(numbers)), 1 + page % options.pages) for page in full])
                        stored += len(copier.take_done().stored)
                    engine._run()
                    times.append((time.perf_counter() - began) * 1000)
                if number:  # the first round is none
                    blocks[mode].append(percentile(times, 0.5))
                    spread[mode] += times
        dropped = copier.counts.dropped
    added = [(on / off - 1) * 100 for on, off in zip(blocks["on"], blocks["off"], strict=True)]
    return {
        "layers": options.step_layers,
        "batch": batch,
        "page_kib": mover.page_bytes >> 10,
        "pages_stored": stored,
        "pages_dropped": dropped,
        "step_ms": {mode: quartiles(times, 4) for mode, times in spread.items()},
        "p99_ms": {mode: round(percentile(times, 0.99), 4) for mode, times in spread.items()},
        "on_over_off_percent": quartiles(added),
    }


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, "gpu_pages")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--step-layers", type=int, default=4, help="random weights take their time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
    cache = new_cache(options.layers, max(STREAMS) * options.pages, device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "mover": list(movers(cache, options.rounds)),
        "fetch": list(fetches(cache, options.pages, max(3, options.rounds // 4))),
    }
    del cache
    result["steps"] = steps(options, device)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
