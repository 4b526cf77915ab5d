"""The whole server on a GPU, its ranks killed under load: what survivors, joiners and clients saw of it.

    python -m bench.gpu_serve --mps [--kills 24] [--out bench/results/gpu_serve.json]
    python -m bench.gpu_serve --mps --config-only --layers 24 --out bench/results/gpu_serve_30b.json

`--config-only` serves random weights of Qwen3-30B-A3B's layer shape, with the bundled tokenizer. The texts of a
disturbed stream are compared with those of an undisturbed run, as in bench.failover, which this borrows from. After the
single kills, whose figures are kept apart, come `HARDER` ones.

"kill_to_commit" is from a SIGKILL to when the last survivor has committed the step that it runs in place of the poisoned
one; "stall" is the longest time between two commits of a survivor, so what passed before the kill counts too.
"""

from __future__ import annotations

import argparse
import asyncio
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kit.served import server, summary, write_result
from train.problems import held_out

from bench.kit import kills
from bench.kit.command_line import command_line
from bench.kit.failover_analysis import analyse, beyond_a_step, client_gaps_ms
from bench.kit.failover_plot import draw
from bench.kit.sections import gpu
from bench.kit.sides import add_model_options, server_arguments

HARDER = (
    kills.Case((1, 2)),
    kills.Case((3,), stop=True),
    *(kills.Case((number % 4,), joiner_state=state) for number, state in enumerate(kills.JOINER_STATES)),
    *(kills.Case((rank,), joiner_state="Joining", instead=(rank + 1) % 4) for rank in (1, 2)),
)
"""For four ranks: a pair, one that hangs, joiners in each state, and another rank while a joiner is being connected."""


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    questions = [problem.question for problem in held_out(options.questions)]
    pages = ["--num-gpu-blocks-override", str(options.pages)]
    arguments = [*server_arguments(options, scratch), *pages]
    cases = [kills.Case((number % options.ranks,)) for number in range(options.kills)]
    with server(arguments, scratch / "runs") as target:
        reference = asyncio.run(kills.reference_run(target, questions))
        load, struck = asyncio.run(kills.disturbed_run(target, questions, cases))
        time.sleep(0.3)  # the log is flushed at most so often
        figures, curves = analyse(target.events, struck)
        harder = {}
        if options.harder:
            rest, struck_harder = asyncio.run(kills.disturbed_run(target, questions, list(HARDER)))
            harder = {"harder": {**kills.compare(rest, reference), "kills": struck_harder}}
        draw(curves, load.stamps, struck, options.out.with_suffix(".png"))
        start_s = target.ready_s
        if options.keep is not None:
            with tarfile.open(options.keep, "w:gz") as tar:
                tar.add(target.events.parent, arcname="run")
    return {
        "gpu": gpu(),
        "server": [Path(word).name if word.startswith("/") else word for word in arguments],
        "streams": kills.STREAMS,
        "start_s": round(start_s, 2),
        "reference_errors": reference.errors[:5],
        **kills.compare(load, reference),
        **figures,
        "client_gap_ms": summary(client_gaps_ms(load.streams, struck)),
        "kill_to_commit_beyond_a_step_ms": beyond_a_step(figures, figures["phases_ms"]["committed"]),
        "stall_beyond_a_step_ms": beyond_a_step(figures, figures["stall_ms"]),
        "rejoin_beyond_a_step_ms": beyond_a_step(figures, figures["rejoin_ms"]),
        **harder,
        "kills": struck,
    }


def main() -> None:
    parser = command_line(__doc__, "gpu_serve", ranks=4)
    add_model_options(parser, "cuda")
    add = parser.add_argument
    add("--kills", type=int, default=24)
    add("--harder", action="store_true", help="then kill pairs, joiners, and others while a joiner connects")
    add("--pages", type=int, default=1024, help="of KV cache, a rank")
    add("--questions", type=int, default=64)
    add("--keep", type=Path, help="a .tar.gz for the run's event log")
    options = parser.parse_args()
    if options.harder and options.ranks != 4:
        parser.error("--harder is for four ranks")
    with tempfile.TemporaryDirectory(prefix="gpu_serve-") as scratch:
        result = measure(options, Path(scratch))
    write_result(options.out, result)
    for name, value in result.items():
        if name not in ("kills", "errors"):
            print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
