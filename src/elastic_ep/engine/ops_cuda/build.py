"""Builds a rank's engine on a GPU: exchange, weights, runner. On the forward thread, whose stream it sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.engine.ops_cuda.inputs import TILE_ROWS
from elastic_ep.engine.ops_cuda.memory import Budget, Share, needs_of
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.engine.step_runner import StreamMemory
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.device import BufferExchange
from elastic_ep.exchange.mooncake import MooncakeExchange, buffer_bytes
from elastic_ep.exchange.peer_memory import PeerMemoryExchange, block_bytes
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.exchange.store import Store
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.models.registry import load_spec
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import Placement
from elastic_ep.weights.bank import Held, load_weights
from elastic_ep.wire.messages import Member

DTYPE = torch.bfloat16
"""What the exchange carries. A row's bits do not depend on its batch, so a stream that moves goes on as it would have."""

RELEASE_S = 5.0
"""The driver takes a dead process's memory back in tenths of a second, in seconds if much of it was pinned."""


def build_cuda_engine(
    config: RankConfig,
    store: Store,
    opened: Callable[[], None],
    memory: StreamMemory,
    masks: MaskMaker | None = None,
) -> tuple[CudaRunner, BufferExchange]:
    """The ranks leave each other their buffers' addresses in `store`; `opened` is called before the first kernel.

    Raises MooncakeUnavailable or NotEnoughMemory, each with one line for the user; the runner's warm-up the latter too.
    """
    spec = load_spec(Path(config.model))
    placement, limits = config.placement, config.limits
    shape = exchange_shape(spec, limits, placement)
    mooncake = config.all2all_backend == "mooncake"
    # Mooncake refuses a machine that cannot do it before anything touches a device.
    size = buffer_bytes(shape) if mooncake else block_bytes(shape)
    device = torch.device("cuda", config.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    needs = needs_of(spec, limits, placement, shape, size, copies_rows=mooncake, widened=config.widened)
    budget = Budget(needs, limits, placement, device, _share(config), _patience_s(config))
    torch.cuda.mem_get_info(device)  # makes the device's context, if nothing has made it
    opened()
    budget.check()
    with budget.kept():
        return _build(config, store, spec, shape, budget, memory, masks)


def _share(config: RankConfig) -> Share | None:
    utilization, devices = config.gpu_memory_utilization, torch.cuda.device_count()
    if utilization is None:
        return None
    neighbours = len(range(config.rank % devices, config.placement.num_ranks, devices))
    return Share(utilization, neighbours, returns_early=config.timing.mps)


def _patience_s(config: RankConfig) -> float:
    """Only one that returns has a predecessor, whose memory is there until its kernels have ended, or a bit longer."""
    return config.timing.drain_ms / 1000 + RELEASE_S if config.incarnation > 1 else 0.0


def exchange_shape(spec: ModelSpec, limits: EngineLimits, placement: Placement) -> ExchangeShape:
    return spec.exchange_shape(-(-limits.max_num_batched_tokens // TILE_ROWS) * TILE_ROWS, placement)


def _build(
    config: RankConfig,
    store: Store,
    spec: ModelSpec,
    shape: ExchangeShape,
    budget: Budget,
    memory: StreamMemory,
    masks: MaskMaker | None,
) -> tuple[CudaRunner, BufferExchange]:
    barrier = StepBarrier(Path(config.directory), config.placement.num_ranks, config.rank)
    member = Member(config.rank, config.incarnation)
    timing = config.timing
    kind = MooncakeExchange if config.all2all_backend == "mooncake" else PeerMemoryExchange
    exchange: BufferExchange = kind(
        shape,
        member,
        store,
        barrier=barrier,
        timeout_ms=timing.kernel_wait_ms,
        connect_timeout_ms=timing.store_get_ms,
    )
    weights = load_weights(
        Path(config.model),
        spec,
        config.placement,
        config.rank,
        load_format=config.load_format,
        seed=config.seed,
        device=budget.device,
        dtype=DTYPE,
        held=Held.NUMBERS if config.widened else Held.CODES,
    )
    runner = CudaRunner(
        config.limits,
        weights,
        config.placement,
        config.rank,
        exchange,
        budget=budget,
        memory=memory,
        masks=masks,
    )
    return runner, exchange
