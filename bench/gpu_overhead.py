"""What elasticity costs a decode step while nothing fails: the machinery on and off in turns, in the same processes.

Four ranks on one GPU, each the real rank process (control loop, forward thread, engine, Mooncake exchange); a
conductor stands in for the controller and takes them through prepare, promise and commit. Then the forward threads run
blocks of the same decode steps in turns, in lockstep, so that a drift of the machine disturbs all alike:

* "on": a step as the server has it: the step barrier, the mailbox looked at, masks read back with the tokens and judged,
  tokens and progress reported, loads of the experts reported, heartbeats where no report was.
* "tokens": only what any server has to do: launch, wait, sample, and hand the tokens to another process, as "on" does it
  when the next step has been launched.
* "off": launch, wait, sample.

A ratio is that of two blocks of one round. With `--device cpu` the exchange keeps its bookkeeping in every mode.

    python -m bench.gpu_overhead --mps [--layers 24] [--out bench/results/gpu_overhead.json]
    python -m bench.gpu_overhead --device cpu --ranks 2 --rounds 2 --out /tmp/overhead.json    # tries the script itself
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import anyio
from tests.kit.bound import tied
from tests.kit.served import percentile, shaped_model
from tests.kit.shapes import layers_30b

from bench.kit.command_line import command_line
from bench.kit.conductor import Conductor
from bench.kit.overhead_rank import MODES, Blocks, run_rank
from bench.kit.sections import Sections, quartiles
from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.exchange.windows import Windows
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.host.mps import mps_daemon
from elastic_ep.models.registry import load_spec
from elastic_ep.placement import launch_placement
from elastic_ep.rank.forward import LOAD_REPORT_STEPS
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.timing import Timing


def run_group(model: Path, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    spec = load_spec(model)
    placement = launch_placement(options.ranks, spec.moe_layers, spec.moe.experts, 0)
    limits = EngineLimits(
        max_model_len=options.steps + 64, max_num_seqs=max(16, options.batch), num_pages=1024
    )
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        directory = Path(name)
        shape = spec.exchange_shape(limits.max_num_batched_tokens, placement)
        windows_fd = Windows.create(shape) if options.device == "cpu" else -1
        life_fd, held_fd = os.pipe()
        ranks = []
        for rank in range(options.ranks):
            told = RankConfig(
                rank=rank,
                incarnation=0,
                directory=name,
                model=str(model),
                load_format="dummy",
                device=options.device,
                seed=0,
                limits=limits,
                timing=Timing(hang_deadline_ms=40_000, ranks=options.ranks),
                placement=placement,
            )
            blocks = Blocks(rounds, options.steps, options.batch)
            ranks.append(
                context.Process(
                    target=tied, args=(run_rank, told, SharedFiles(windows_fd, -1), life_fd, blocks)
                )
            )
            ranks[-1].start()
        try:
            heard = anyio.run(_conduct, directory, ranks, options.seconds)
        finally:
            for process in ranks:
                process.kill()
                process.join()
            for fd in (life_fd, held_fd, *([windows_fd] if windows_fd >= 0 else [])):
                os.close(fd)
        results = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(options.ranks)]
    return {"heard": dict(heard), **digest(results)}


async def _conduct(directory: Path, ranks: list[ForkProcess], seconds: float) -> Counter[str]:
    conductor = Conductor(directory, len(ranks))
    await conductor.until_ended(ranks, seconds)
    return conductor.heard


def digest(ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The group goes as fast as its slowest rank, in every block."""
    steps = {
        mode: [max(times) for times in zip(*(rank[mode] for rank in ranks), strict=True)] for mode in MODES
    }

    def added(mode: str, base: str) -> list[float]:
        return [(a / b - 1) * 100 for a, b in zip(steps[mode], steps[base], strict=True)]

    return {
        "step_ms": {mode: quartiles(times, 4) for mode, times in steps.items()},
        "on_over_off_percent": quartiles(added("on", "off")),
        "on_over_tokens_percent": quartiles(added("on", "tokens")),
        "of_medians_percent": round(
            (percentile(steps["on"], 0.5) / percentile(steps["off"], 0.5) - 1) * 100, 3
        ),
        "blocks": {mode: [round(time, 4) for time in times] for mode, times in steps.items()},
    }


def main() -> None:
    parser = command_line(__doc__, "gpu_overhead", ranks=4)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--layers", type=int, default=24, help="of Qwen3-30B-A3B's shape; 0: leave it out")
    add("--rounds", type=int, default=14, help="of a block in each mode; thrice as many of the small model")
    add("--steps", type=int, default=LOAD_REPORT_STEPS, help="of a block, a multiple of the default")
    add("--batch", type=int, default=16, help="sequences of a rank")
    add("--seconds", type=int, default=150, help="for each model, at most")
    add(
        "--mps",
        action="store_true",
        help="start a private MPS daemon; without, one in the environment is used",
    )
    add("--commit", help="noted in the result where there is no git")
    options = parser.parse_args()
    if options.steps % LOAD_REPORT_STEPS:
        parser.error(f"--steps must be a multiple of {LOAD_REPORT_STEPS}")
    mps = options.mps or "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    facts = {name: getattr(options, name) for name in ("ranks", "device", "steps", "batch")}
    sections = Sections(options.out, options.commit, mps=mps, **facts)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead-models-")))
        if options.mps:
            os.environ.update(stack.enter_context(mps_daemon()))
        models = [("bundled", BUNDLED_MODEL, 3 * options.rounds)]
        if options.device == "cuda" and options.layers:
            model = shaped_model(scratch / "model", layers_30b(options.layers))
            models.insert(0, (f"30B shape, {options.layers} layers", model, options.rounds))
        for name, model, rounds in models:
            sections.run(name, partial(run_group, model, rounds, options), options.seconds + 30)
    if sections.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
