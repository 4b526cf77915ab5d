"""How fast the control plane is at the pace of a GPU: kills of ranks whose device is a clock (see kit/paced_engine.py).

The server, its processes, the kills and the clients are real, only the model is not. What is seen is what control loops,
sockets and the run process add to a loss and to a gain; the shape's layers and experts count, as placements do. What a
client feels of a kill is the longest gap within its stream.

    python -m bench.control_path [--shape 30b] [--step-ms 12] [--kills 16] [--out bench/results/control_path.json]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kit.served import server, shaped_model, summary, write_result
from tests.kit.shapes import layers_30b
from train.problems import held_out

from bench.kit import kills
from bench.kit.command_line import command_line
from bench.kit.failover_analysis import analyse, beyond_a_step, client_gaps_ms
from bench.kit.paced_engine import STEP_MS
from elastic_ep.run import BUNDLED_MODEL


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    shape = layers_30b(options.layers) if options.shape == "30b" else {}
    model = shaped_model(scratch / "model", shape) if shape else BUNDLED_MODEL
    os.environ[STEP_MS] = str(options.step_ms)
    arguments = [
        *("--ranks", str(options.ranks), "--device", "cpu", "--model", str(model)),
        *("--load-format", "dummy" if shape else "auto"),
    ]
    questions = [problem.question for problem in held_out(options.questions)]
    cases = [kills.Case((number % options.ranks,)) for number in range(options.kills)]
    with server(arguments, scratch / "runs", module="bench.kit.paced_server") as target:
        reference = asyncio.run(kills.reference_run(target, questions))
        load, struck = asyncio.run(kills.disturbed_run(target, questions, cases, options.streams))
        time.sleep(0.3)  # the log is flushed at most so often
        figures, _ = analyse(target.events, struck)
        if options.keep is not None:
            shutil.copy(target.events, options.keep)
    return {
        "ranks": options.ranks,
        "layers": options.layers if shape else 4,
        "step_ms": options.step_ms,
        "streams": options.streams,
        **kills.compare(load, reference),
        "client_gap_ms": summary(client_gaps_ms(load.streams, struck)),
        **figures,
        "stall_beyond_a_step_ms": beyond_a_step(figures, figures["stall_ms"]),
        "rejoin_beyond_a_step_ms": beyond_a_step(figures, figures["rejoin_ms"]),
    }


def main() -> None:
    parser = command_line(__doc__, "control_path", ranks=4)
    add = parser.add_argument
    add("--shape", choices=("30b", "bundled"), default="30b")
    add("--layers", type=int, default=24, help="of the 30B shape")
    add("--step-ms", type=float, default=12.0)
    add("--kills", type=int, default=16)
    add("--streams", type=int, default=kills.STREAMS)
    add("--questions", type=int, default=8)
    add("--keep", type=Path, help="a file for the run's event log")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="control_path-") as scratch:
        result = measure(options, Path(scratch))
    write_result(options.out, result)
    for name, value in result.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
