"""How long a device would idle between two decode steps, on a machine without one: what the host does meanwhile.

The rank process is the real one (control loop, sockets, forward thread, scheduler, inputs, `CudaRunner`), and so is the
bookkeeping of the exchange; another process hears its reports. In the place of a GPU is a timer: what is launched is done
so many milliseconds later, and whoever waits for it sleeps, without the interpreter lock. So nothing is said of what the
launches, copies and waits of a GPU cost, nor of its host. A gap is the time from when a step was done to the next launch.
How late the sleeper wakes up is part of it, and stands beside it.

Blocks of the same decode steps in turns: "before" reports each step before the next launch, "after" does it after that,
as the server with a GPU.

    python -m bench.host_gap [--rounds 12] [--out bench/results/host_gap.json]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import torch
from tests.kit.bound import tied
from tests.kit.served import percentile, write_result
from tests.kit.shapes import QWEN3_30B

from bench.kit.command_line import command_line
from bench.kit.conductor import Conductor
from bench.kit.own_rank import live_and_end, no_plane
from bench.kit.sections import quartiles
from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.engine.ops_cuda.inputs import StepShape
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.exchange.base import Exchange, Format, Work
from elastic_ep.exchange.mooncake import MooncakeExchange
from elastic_ep.exchange.peers import Peers
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.models import qwen3_moe
from elastic_ep.placement import launch_placement
from elastic_ep.rank.forward import LOAD_REPORT_STEPS, Build, ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Post
from elastic_ep.rank.process import RankProcess
from elastic_ep.timing import USUAL
from elastic_ep.weights.bank import Weights, dummy_source
from elastic_ep.wire.messages import Assign, Member, SamplingParams

MODES = ("before", "after")
BATCHES = (1, 16, 64)
_SETTLE_STEPS = 6
_BATCH_NUMBERS = 1000
_DEADLINE_S = 600.0
_RESULT = "blocks.json"
Block = dict[str, list[float]]
Blocks = dict[str, dict[str, list[Block]]]
"""By batch and mode."""

MODEL = qwen3_moe.spec(
    replace(
        QWEN3_30B,
        vocab_size=32000,
        hidden_size=128,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
)
"""As many layers and experts as in `bench.gpu_overhead`, for the reports of load; nothing is computed."""


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    steps: int
    """Of a block. A multiple of LOAD_REPORT_STEPS: then each block has as many reports of load."""
    step_s: float

    @property
    def limits(self) -> EngineLimits:
        length = self.steps + 2 * _SETTLE_STEPS + 2
        return EngineLimits(
            max_model_len=length,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=max(BATCHES),
            num_pages=max(BATCHES) * -(-length // 16),
        )


class Timer:
    """The device. It is also the event that the exchange waits for."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._done_s = time.perf_counter()
        self.gaps_s: list[float] = []
        self.late_s: list[float] = []
        """Of each wait: how long after the step was done it ended."""

    def launch(self) -> None:
        now = time.perf_counter()
        self.gaps_s.append(now - self._done_s)
        self._done_s = now + self._step_s

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        while (left := self._done_s - time.perf_counter()) > 0:
            time.sleep(left)
        self.late_s.append(-left)


class TimedExchange(MooncakeExchange):
    """The bookkeeping of a step, without a buffer."""

    def __init__(self, operations: int, timer: Timer) -> None:
        self.shape: Any = SimpleNamespace(operations_per_step=operations)
        self.format = Format(
            torch.device("cpu"), torch.bfloat16, torch.int32, tile=None, ordered=False, zero_tail=False
        )
        self.suspects = frozenset()
        self._peers = Peers(Member(0, 0), 1, MODEL.moe.experts)
        self._targets = frozenset()
        self._barrier = None
        self._step = self._ended = None
        self._mine = Work(0, 0)
        self._taken_in = True
        self._buffer = SimpleNamespace(query_mask_buffer=lambda masks: None)
        self._masks = self._masks_host = torch.zeros(1, dtype=torch.int32)
        self._masks_read: Any = timer
        self._reading = False
        self._operations = 0


class TimedGraphs:
    """Every step has the same results."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._results = torch.zeros(max(BATCHES), 1), torch.full((max(BATCHES),), 12345)

    def run(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        self._timer.launch()
        return self._results


class TimedRunner(CudaRunner):
    def __init__(self, limits: EngineLimits, exchange: TimedExchange, timer: Timer) -> None:
        placement = launch_placement(1, MODEL.moe_layers, MODEL.moe.experts, 0)
        weights = Weights(MODEL, placement, 0, dummy_source(MODEL, 0), torch.device("cpu"), torch.bfloat16)
        super().__init__(limits, weights, placement, 0, exchange)
        self._graphs: Any = TimedGraphs(timer)
        self._ops.load += 1  # or there would be no report of it

    def warm_up(self) -> None:
        pass


class BlockForward(ForwardThread):
    """Takes its seat as ever, then runs the blocks, and stops."""

    def __init__(self, config: RankConfig, mailbox: Mailbox, post: Post, _build: Build, plan: Plan) -> None:
        super().__init__(config, mailbox, post, self._build_engine)
        self._plan = plan
        self._timer = Timer(plan.step_s)
        self._number = 0

    def _build_engine(self, config: RankConfig) -> tuple[StepRunner, Exchange]:
        torch.set_num_threads(1)
        exchange = TimedExchange(2 * MODEL.moe_layers, self._timer)
        return TimedRunner(config.limits, exchange, self._timer), exchange

    def _run(self) -> None:
        while self._view.seat(self._me.rank) is None and not self._take_seat():
            if self._mailbox.stop:
                return
            self._wait()
        blocks: Blocks = {str(batch): {mode: [] for mode in MODES} for batch in BATCHES}
        for number in range(self._plan.rounds):
            for batch in BATCHES:
                for mode in MODES if number % 2 == 0 else MODES[::-1]:
                    blocks[str(batch)][mode].append(self._block(batch, mode))
        (Path(self._config.directory) / _RESULT).write_text(json.dumps(blocks))

    def _block(self, batch: int, mode: str) -> dict[str, list[float]]:
        """Of each step, microseconds: the gap before it, and how late its end was noticed."""
        self.runner.launches_ahead = mode == "after"
        most = SamplingParams(max_tokens=self._plan.limits.max_model_len, ignore_eos=True)
        first = self._number = self._number + _BATCH_NUMBERS
        requests = range(first, first + batch)
        for request in requests:
            self._mailbox.deliver(Assign(request, (1 + request % 100,), (), most, 0, 0))
        for step in range(_SETTLE_STEPS + self._plan.steps):
            if step == _SETTLE_STEPS:
                self._timer.gaps_s.clear()
                self._timer.late_s.clear()
            if not self._mailbox.may_begin(self.step):
                raise RuntimeError(f"held before step {self.step}")
            self._settle_in()
            self._one_step()
        self._hand_over()
        if self.runner.running != batch:
            raise RuntimeError(f"{self.runner.running} of {batch} requests were left at a block's end")
        for request in requests:
            self.runner.cancel(request)
        taken = {"gaps": self._timer.gaps_s, "late": self._timer.late_s}
        return {name: [second * 1e6 for second in seconds] for name, seconds in taken.items()}


def run_rank(config: RankConfig, life_fd: int, plan: Plan) -> None:
    forward = partial(BlockForward, plan=plan)
    live_and_end(
        lambda: RankProcess(config, SharedFiles(-1, -1), life_fd, forward=forward, open_plane=no_plane)
    )


def measure(plan: Plan) -> Blocks:
    with tempfile.TemporaryDirectory(prefix="host-gap-") as name:
        config = RankConfig(
            rank=0,
            incarnation=0,
            directory=name,
            model="",
            load_format="dummy",
            device="cpu",
            seed=0,
            limits=plan.limits,
            timing=USUAL,
            placement=launch_placement(1, MODEL.moe_layers, MODEL.moe.experts, 0),
        )
        life_fd, held_fd = os.pipe()
        rank = multiprocessing.get_context("fork").Process(
            target=tied, args=(run_rank, config, life_fd, plan)
        )
        rank.start()

        async def conduct() -> None:
            await Conductor(Path(name), 1).until_ended([rank], _DEADLINE_S)

        try:
            anyio.run(conduct)
        finally:
            rank.kill()
            rank.join()
            os.close(life_fd)
            os.close(held_fd)
        blocks: Blocks = json.loads((Path(name) / _RESULT).read_text())
        return blocks


def digest(blocks: dict[str, list[Block]], step_s: float) -> dict[str, Any]:
    """Over all steps; what is saved, over pairs of blocks of one round."""

    def pooled(mode: str, what: str) -> list[float]:
        return [value for block in blocks[mode] for value in block[what]]

    medians = {mode: [percentile(block["gaps"], 0.5) for block in blocks[mode]] for mode in MODES}
    saved = [before - after for before, after in zip(medians["before"], medians["after"], strict=True)]
    gaps = {mode: percentile(pooled(mode, "gaps"), 0.5) / 1e6 for mode in MODES}
    return {
        "gap_us": {mode: quartiles(pooled(mode, "gaps"), 1) for mode in MODES},
        "of_it_woken_late_us": {mode: quartiles(pooled(mode, "late"), 1) for mode in MODES},
        "saved_us": quartiles(saved, 1),
        "idle_percent": {mode: round(100 * gap / (gap + step_s), 2) for mode, gap in gaps.items()},
        "block_medians_us": {mode: [round(gap, 1) for gap in medians[mode]] for mode in MODES},
    }


def main() -> None:
    parser = command_line(__doc__, "host_gap")
    parser.add_argument("--rounds", type=int, default=12, help="of a block of each batch in each mode")
    parser.add_argument("--step-ms", type=float, default=8.0, help="what the device takes for a step")
    options = parser.parse_args()
    plan = Plan(options.rounds, LOAD_REPORT_STEPS, options.step_ms / 1000)
    load = os.getloadavg()[0]
    batches = {batch: digest(blocks, plan.step_s) for batch, blocks in measure(plan).items()}
    for batch, figures in batches.items():
        for mode in MODES:
            gap, late = (figures[name][mode] for name in ("gap_us", "of_it_woken_late_us"))
            print(
                f"batch {batch:>2}, {mode:>6}: {gap['median']} us {gap['quartiles']}, late {late['median']}"
            )
        print(
            f"batch {batch:>2}, saved:  {figures['saved_us']['median']} us {figures['saved_us']['quartiles']}"
        )
    facts = {"step_ms": options.step_ms, "steps": plan.steps, "load_average_before": round(load, 2)}
    write_result(options.out, {**facts, "batches": batches})


if __name__ == "__main__":
    main()
