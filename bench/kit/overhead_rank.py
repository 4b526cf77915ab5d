"""A rank of `bench.gpu_overhead`: the real rank process, whose forward thread runs the machinery block by block.

"on" is the server's own step. "tokens" hands over a step's tokens when that does, after the next launch, as any server
could. "off" makes no tokens of what it samples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import torch
from tests.kit.file_store import FileStore

from bench.kit.own_rank import live_and_end, no_plane
from elastic_ep.config import RankConfig
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.exchange.base import Exchange, Work
from elastic_ep.exchange.mooncake import MooncakeExchange
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.rank.engine import build_engine
from elastic_ep.rank.forward import Build, ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Post
from elastic_ep.rank.process import RankProcess
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Assign, SamplingParams, StepReport

MODES = ("on", "tokens", "off")
_SETTLE_STEPS = 6
_BATCH_NUMBERS = 1000


@dataclass(frozen=True, slots=True)
class Blocks:
    rounds: int
    """Of one block in each mode."""
    steps: int
    """Of a block. A multiple of LOAD_REPORT_STEPS: then each block with the machinery on has as many reports."""
    batch: int

    def order(self, number: int) -> tuple[str, ...]:
        """There and back again: a drift that is even costs no mode more than another. The first block is an "on"."""
        return MODES if number % 2 == 0 else MODES[::-1]


class BareExchange:
    """Only the wait for a step's results: no step barrier, no masks, no bookkeeping of peers."""

    def __init__(self) -> None:
        self._done = torch.cuda.Event()

    def begin_step(self, step: int) -> None:
        pass

    def route_to(self, ranks: Collection[int]) -> None:
        pass

    def meet(self, work: Work) -> None:
        pass

    def work(self) -> Work:
        return Work(0, 0)

    def read_masks(self) -> None:
        self._done.record()

    def end_step(self) -> frozenset[int]:
        self._done.synchronize()
        return frozenset()


class BlockForward(ForwardThread):
    """Takes its seat as ever, then runs `blocks`, the same steps in each, and stops."""

    def __init__(
        self, config: RankConfig, mailbox: Mailbox, post: Post, build: Build, blocks: Blocks
    ) -> None:
        super().__init__(config, mailbox, post, build)
        self._blocks = blocks
        self._out = Path(config.directory) / f"{config.rank}.json"
        self._number = 0
        self.mode = "on"

    def _run(self) -> None:
        while self._view.seat(self._me.rank) is None and not self._take_seat():
            if self._mailbox.stop:
                return
            self._mailbox.wait(1.0)
        self._settle_in()
        if not self._covered:
            raise RuntimeError("some expert has no copy")
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for number in range(self._blocks.rounds):
            for mode in self._blocks.order(number):
                times[mode].append(self._block(mode))
        self._out.write_text(json.dumps(times))
        time.sleep(0.5)  # peers may still look at this rank's memory

    def _block(self, mode: str) -> float:
        """Milliseconds a step."""
        self._enter(mode)
        step = {"on": self._full_step, "tokens": self._step_with_tokens, "off": self._bare_step}[mode]
        most = SamplingParams(max_tokens=self._blocks.steps + 2 * _SETTLE_STEPS, ignore_eos=True)
        first = self._number = self._number + _BATCH_NUMBERS
        requests = range(first, first + self._blocks.batch)
        for request in requests:
            self.runner.add(Assign(request, (1 + request % 100,), (), most, 0, 0))
        for _ in range(_SETTLE_STEPS):
            step()
        began = time.perf_counter()
        for _ in range(self._blocks.steps):
            step()
        taken = time.perf_counter() - began
        self._hand_over()
        if self.runner.running != len(requests):
            raise RuntimeError(
                f"{self.runner.running} of {len(requests)} requests were left at a block's end"
            )
        for request in requests:
            self.runner.cancel(request)
        return taken * 1000 / self._blocks.steps

    def _enter(self, mode: str) -> None:
        self.mode = mode
        if isinstance(self.exchange, MooncakeExchange):
            runner: Any = self.runner
            exchange = self.exchange if mode == "on" else BareExchange()
            runner._exchange = runner._device_exchange = exchange

    def _full_step(self) -> None:
        """As `ForwardThread._run` has it."""
        if not self._mailbox.may_begin(self.step):
            raise RuntimeError(f"held before step {self.step}")
        self._settle_in()
        self._one_step()

    def _bare_step(self) -> None:
        self.runner.run_step(self.step, schedule=True)
        self.step += 1

    def _step_with_tokens(self) -> None:
        """What any server has to do: its tokens go to the process that has the clients."""
        step = self.step
        result = self.runner.run_step(step, schedule=True, launched=self._hand_over)
        self._report = lambda tokens: StepReport(step, 0, 0, 0, tokens, 0, 0, 0, 0), result
        self.step += 1


class BlockRank(RankProcess):
    def __init__(self, config: RankConfig, files: SharedFiles, life_fd: int, blocks: Blocks) -> None:
        def forward(told: RankConfig, mailbox: Mailbox, post: Post, build: Build) -> ForwardThread:
            self._blocks = BlockForward(told, mailbox, post, build, blocks)
            return self._blocks

        def build(told: RankConfig) -> tuple[StepRunner, Exchange]:
            store = FileStore(Path(told.directory))
            return build_engine(told, files, no_plane, store, lambda: None)

        super().__init__(config, files, life_fd, build=build, forward=forward, open_plane=no_plane)

    async def _send_heartbeats(self) -> None:
        """Only while the machinery is on."""
        while True:
            if self._blocks.mode == "on" and not self._reported.is_set():
                self._wire.send(self._heartbeat(parked=self._mailbox.waiting_at is not None))
            self._reported = anyio.Event()
            await anyio.sleep(USUAL.heartbeat_ms / 1000)


def run_rank(config: RankConfig, files: SharedFiles, life_fd: int, blocks: Blocks) -> None:
    live_and_end(lambda: BlockRank(config, files, life_fd, blocks))
