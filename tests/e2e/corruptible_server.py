"""`python -m elastic_ep.run` with ranks whose memory can be made wrong: `SPOIL` flips a bit of a rank's first expert,
in what it has last: a matrix, or the scales of one.

The second incarnation of rank 1 has it flipped from the start.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import torch

from elastic_ep.config import RankConfig
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.rank import process as rank
from elastic_ep.rank.slots import SlotWorker

SPOIL = signal.SIGURG
"""HAZARD: not SIGUSR1. The LLVM in Triton 3.7.1 takes that for itself when a rank on a GPU compiles its first kernel."""
SPOILT = (0, 0)
"""Layer, and slot of the rank."""
BORN_SPOILT = (1, 2)
"""Rank and incarnation."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By the size of a number."""


def spoil(runner: StepRunner) -> None:
    layer, slot = SPOILT
    part = runner.weights.slot(layer, slot)[-1]
    part[(0,) * part.dim()].view(_BITS[part.element_size()]).bitwise_xor_(1)


def main(config_json: str, files: SharedFiles, life_fd: int) -> int:
    config = RankConfig.from_json(config_json)
    start = SlotWorker.start

    def start_spoilt(worker: SlotWorker, runner: StepRunner) -> None:
        if (config.rank, config.incarnation) == BORN_SPOILT:
            spoil(runner)

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            spoil(runner)

        signal.signal(SPOIL, on_signal)
        start(worker, runner)

    SlotWorker.start = start_spoilt  # type: ignore[method-assign,assignment]  # to spoil bytes
    return rank.main(config_json, files, life_fd)


if __name__ == "__main__":
    from elastic_ep.run import parse
    from elastic_ep.serve import serve

    sys.exit(serve(parse(), "tests.e2e.corruptible_server:main"))
