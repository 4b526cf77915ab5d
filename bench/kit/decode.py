"""Our engine with one rank on one GPU, outside of a server: how fast it decodes, and how long its device is idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.kit.file_store import FileStore
from tests.kit.served import percentile
from tests.kit.solo_exchange import SoloDeviceExchange

from bench.kit.sections import quartiles
from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.build import exchange_shape
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.exchange.base import DeviceExchange
from elastic_ep.exchange.peer_memory import PeerMemoryExchange
from elastic_ep.placement import launch_placement
from elastic_ep.timing import USUAL
from elastic_ep.weights.bank import Weights
from elastic_ep.wire.messages import Assign, Member, SamplingParams

BF16 = torch.bfloat16
_SETTLE_STEPS = 8
_REPLAYS = 30


class Engine:
    """The engine as a rank has it, with all experts; with its exchange if `directory` is given."""

    def __init__(self, weights: Weights, limits: EngineLimits, directory: Path | None, **runner: Any) -> None:
        spec, device = weights.spec, weights.embed.device
        placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
        self.exchange: DeviceExchange = SoloDeviceExchange(spec.moe.experts, device, weights.embed.dtype)
        if directory is not None:
            shape = exchange_shape(spec, limits, placement)
            self.exchange = PeerMemoryExchange(
                shape,
                Member(0, 0),
                FileStore(directory),
                timeout_ms=20_000,
                connect_timeout_ms=USUAL.store_get_ms,
            )
        self.runner = CudaRunner(limits, weights, placement, 0, self.exchange, **runner)
        self.runner.warm_up()
        self._limits = limits
        self._step = 0

    def close(self) -> None:
        self.exchange.close()

    def _run(self) -> dict[int, int]:
        """One step's tokens by request."""
        result = self.runner.run_step(self._step, schedule=True)
        assert not result.masked, f"masked: {result.masked}"
        self._step += 1
        return {token.request_id: token.token for token in result.tokens}

    def _add(self, prompts: Sequence[list[int]], new: int) -> None:
        for request, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=new, ignore_eos=True)
            self.runner.add(Assign(request, tuple(prompt), (), params, 0, 0))

    def step(self) -> int:
        """How many tokens it came to."""
        return len(self._run())

    def decode(self, prompts: Sequence[list[int]], new: int) -> tuple[list[list[float]], list[list[int]]]:
        """By request, when each of its tokens came, and the tokens."""
        self._add(prompts, new)
        stamps: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        while self.runner.has_work:
            for request, token in self._run().items():
                stamps[request].append(time.perf_counter())
                tokens[request].append(token)
        return stamps, tokens

    @property
    def steps(self) -> int:
        """Since it was made."""
        return self._step

    @contextmanager
    def decoding(self, prompts: Sequence[list[int]]) -> Iterator[Callable[[], None]]:
        """All of them decode within; a call is one step."""
        self._add(prompts, self._limits.max_model_len)
        begun: set[int] = set()
        while len(begun) < len(prompts):
            begun.update(self._run())

        def step() -> None:
            assert len(self._run()) == len(prompts), "some sequence did not decode"

        for _ in range(_SETTLE_STEPS):
            step()
        try:
            yield step
        finally:
            for request in range(len(prompts)):
                self.runner.cancel(request)

    def steady(self, prompts: Sequence[list[int]], steps: int) -> dict[str, Any]:
        """All of them decoding: a step's wall time, the device's share of it, the experts that it hits in all layers."""
        wall = []
        with self.decoding(prompts) as step:
            for _ in range(steps):
                began = time.perf_counter()
                step()
                wall.append((time.perf_counter() - began) * 1000)
            hit = self._experts_hit()
            busy = self._busy_ms(len(prompts))
        idle = max(0.0, 1 - busy / percentile(wall, 0.5))
        return {
            "batch": len(prompts),
            "step_ms": quartiles(wall, 4),
            "graph_ms": round(busy, 4),
            "idle_share": round(idle, 4),
            "experts_hit_a_step": round(hit, 1),
        }

    def _experts_hit(self) -> float:
        hits = []
        for _ in range(4):
            self.runner.load.take()
            self._run()
            hits.append(sum(rows > 0 for layer in self.runner.load.take() for rows in layer))
        return sum(hits) / len(hits)

    @torch.inference_mode()
    def _busy_ms(self, batch: int) -> float:
        """The last step's graph again and again, with always another one queued: what the device needs for it alone."""
        runner = self.runner
        shape = runner._inputs.decode_shape(batch)
        run = runner._body if runner._graphs is None else runner._graphs.run
        if runner.weights.embed.device.type != "cuda":
            began = time.perf_counter()
            run(shape)
            return (time.perf_counter() - began) * 1000
        run(shape)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_REPLAYS):
            run(shape)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / _REPLAYS


def weight_bytes(weights: Weights, experts_hit: float) -> float:
    """What a decode step must read: all that is dense but the table that tokens are looked up in, and its experts."""
    dense = sum(tensor.nbytes for name, tensor in weights.dense().items() if name != "embed")
    expert = weights.spec.expert_elements * weights.embed.element_size()
    return dense + experts_hit * expert


def full_rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens a second while all requests decode: from when the last one has begun until the first one ends."""
    begin, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    if not begin < end:
        raise RuntimeError("the requests never decoded all at once")
    return sum(begin < at <= end for times in stamps for at in times) / (end - begin)
