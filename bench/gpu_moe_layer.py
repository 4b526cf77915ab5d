"""An MoE layer of several ranks: ours beside Mooncake's bare exchange and torch's grouped product.

"ours" is dispatch, experts and combine as the engine calls them, the gate left out. It is set against the sum of two
parts that are measured alone (Mooncake's own dispatch and combine; `torch._grouped_mm` experts on rows packed without
gaps, in the faster order of weights), and against the two put together in one graph. There torch is told for nothing,
on the host, how many rows every expert gets; its best of three counts: rows gathered and scattered back (weights in
either order), or unused rows computed along.

All sides are graphs of `--layers` layers with Qwen3-30B-A3B's shape, replayed in turns, all ranks starting each
replay together. Of every replay the slowest rank's time counts. Without MPS the ranks would take time slices in turn.

    python -m bench.gpu_moe_layer --mps [--out bench/results/gpu_moe_layer.json]
    TRITON_INTERPRET=1 python -m bench.gpu_moe_layer --smoke --out /tmp/moe_layer.json    # tries the script itself
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.kit.bound import tied
from tests.kit.served import percentile

from bench.kit.command_line import command_line
from bench.kit.moe_plane import Case
from bench.kit.moe_rank import run_rank
from bench.kit.sections import Sections, quartiles
from elastic_ep.host.mps import mps_daemon

ONE_GRAPH = ("raw_with_grouped", "raw_with_grouped_turned", "raw_with_grouped_padded")
LARGEST_DIFFERENCE = 0.02


def cases(options: argparse.Namespace) -> list[Case]:
    if options.smoke:
        small: dict[str, Any] = {"layers": 2, "distinct": 2, "rounds": 3, "hidden": 128, "inner": 64}
        small |= {"device": "cpu", "ranks": 2, "experts": 8, "top_k": 2}
        return [Case(tokens, redundant, **small) for redundant in (0, 8) for tokens in (1, 4)]
    shape = {"layers": options.layers, "rounds": options.rounds, "ranks": options.ranks}
    wanted = [Case(tokens, 0, "cuda", **shape) for tokens in options.tokens]
    return wanted + [Case(tokens, 128, "cuda", **shape) for tokens in options.redundant_tokens]


def run_case(case: Case, seconds: float) -> dict[str, Any]:
    """Fresh processes, forked from this one, which touches no device."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="moe_layer-") as scratch:
        directory = Path(scratch)
        ranks = [
            context.Process(target=tied, args=(run_rank, case, rank, directory)) for rank in range(case.ranks)
        ]
        for process in ranks:
            process.start()
        limit = time.monotonic() + seconds
        try:
            while any(process.is_alive() for process in ranks) and time.monotonic() < limit:
                if any(directory.glob("*.error")):
                    time.sleep(1.0)  # the others may have something to say too
                    break
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        errors = [path.read_text() for path in sorted(directory.glob("*.error"))]
        if errors:
            raise RuntimeError("; ".join(errors))
        results = [directory / f"{rank}.json" for rank in range(case.ranks)]
        if not all(path.exists() for path in results):
            raise TimeoutError(f"not done after {seconds} s, or a rank died")
        return digest(case, [json.loads(path.read_text()) for path in results])


def digest(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds a layer, and what each other side takes for one of ours."""
    taken = {
        name: [max(times) for times in zip(*(rank["times"][name] for rank in ranks), strict=True)]
        for name in ranks[0]["times"]
    }
    middle = {name: percentile(times, 0.5) for name, times in taken.items()}
    parts = middle["raw_exchange"] + min(middle["grouped"], middle["grouped_turned"])
    difference = max(rank["difference"] for rank in ranks)
    if not difference < LARGEST_DIFFERENCE:
        raise RuntimeError(f"the sides differ by {difference:.3g}")
    return {
        "case": asdict(case),
        "us_a_layer": {name: quartiles(times, 2) for name, times in taken.items()},
        "sum_of_parts_us": round(parts, 2),
        "sum_of_parts_over_ours": round(parts / middle["ours"], 3),
        "one_graph_over_ours": round(min(middle[name] for name in ONE_GRAPH) / middle["ours"], 3),
        "rows_a_rank": [rank["rows"] for rank in ranks],
        "experts_hit_a_rank": [rank["hit"] for rank in ranks],
        "difference": difference,
    }


def main() -> None:
    parser = command_line(__doc__, "gpu_moe_layer", ranks=4)
    add = parser.add_argument
    add("--tokens", type=int, nargs="*", default=[1, 4, 16, 64, 128], help="a rank")
    add(
        "--redundant-tokens",
        type=int,
        nargs="*",
        default=[16, 128],
        help="the same with two copies of each expert",
    )
    add("--layers", type=int, default=24)
    add("--rounds", type=int, default=40)
    add("--seconds", type=int, default=60, help="a case, at most")
    add(
        "--mps",
        action="store_true",
        help="start a private MPS daemon; without, one in the environment is used",
    )
    add("--smoke", action="store_true", help="tiny, on the processor, each rank by itself")
    add("--commit", help="noted in the result where there is no git")
    options = parser.parse_args()
    mps = options.mps or "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    sections = Sections(options.out, options.commit, mps=mps)
    with ExitStack() as stack:
        if options.mps:
            os.environ.update(stack.enter_context(mps_daemon()))
        for case in cases(options):
            name = f"tokens={case.tokens} slots={case.slots}"
            sections.run(name, partial(run_case, case, options.seconds), options.seconds + 30)
    if sections.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
