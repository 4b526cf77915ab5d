"""Builds a rank's engine: exchange, weights, runner. Runs on the forward thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from elastic_ep.config import RankConfig
from elastic_ep.engine.ops_cpu.fused_runner import FusedRunner
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.step_runner import StepRunner, StreamMemory
from elastic_ep.exchange.base import Exchange
from elastic_ep.exchange.fused import FusedExchange
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.exchange.store import Store
from elastic_ep.fused.library import load
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.guided.shared import shared
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.kv.names import root
from elastic_ep.kv.shelf import Shelf
from elastic_ep.models.registry import load_spec
from elastic_ep.models.spec import ModelSpec
from elastic_ep.weights.bank import Weights, blank_weights, load_weights, weight_source
from elastic_ep.weights.disk_cache import cached_share
from elastic_ep.weights.joining import fill_from_peers
from elastic_ep.weights.transfer import PullFailed, TransferPlane
from elastic_ep.wire.messages import Member

SHELF_THREADS = {"cpu": 1, "cuda": 4}
"""That copy pages for a stream which has lost its rank: one does not keep up with a GPU's link."""
MOST_MASK_THREADS = 8
"""That compute masks beside a device."""
MOSTLY = 0.5
"""With so much of a checkpoint in the page cache, reading it is faster than asking peers."""

OpenPlane = Callable[[], TransferPlane | str]


def build_engine(
    config: RankConfig, files: SharedFiles, open_plane: OpenPlane, store: Store, opened: Callable[[], None]
) -> tuple[StepRunner, Exchange]:
    """What it raises is the reason why this rank fails. `store` is for exchanges that meet their peers.

    `opened` is called when a GPU is open, before the first kernel.

    The state plane is opened here, where nobody waits for a sign of life: that takes tens of milliseconds, on a busy
    machine many more, in part with the interpreter lock held.
    """
    torch.set_num_threads(1)
    memory = stream_memory(config, files.shelf)
    masks = mask_maker(config)
    if config.device == "cuda":
        from elastic_ep.engine.ops_cuda.build import (
            build_cuda_engine,  # needs Triton, ranks on the CPU do not
        )

        return build_cuda_engine(config, store, opened, memory, masks)
    open_plane()
    return _build_cpu_engine(config, files.windows, open_plane, memory, masks)


def _build_cpu_engine(
    config: RankConfig,
    windows_fd: int,
    open_plane: OpenPlane,
    memory: StreamMemory,
    masks: MaskMaker | None,
) -> tuple[StepRunner, Exchange]:
    spec = load_spec(Path(config.model))
    placement, me = config.placement, Member(config.rank, config.incarnation)
    shape = spec.exchange_shape(config.limits.max_num_batched_tokens, placement)
    if config.fused:
        fused = load(config.fused)
        windows = FusedExchange(windows_fd, shape, me, fused)
        weights = _weights(config, spec, open_plane)
        return FusedRunner(
            fused, config.limits, weights, placement, config.rank, windows, memory, masks
        ), windows
    exchange = ShmExchange(windows_fd, shape, me)
    weights = _weights(config, spec, open_plane)
    runner = ModelRunner(config.limits, weights, placement, config.rank, exchange, memory=memory, masks=masks)
    return runner, exchange


def _weights(config: RankConfig, spec: ModelSpec, open_plane: OpenPlane) -> Weights:
    return weights_from_peers(config, spec, open_plane) or weights_from_checkpoint(config, spec)


def stream_memory(config: RankConfig, shelf_fd: int) -> StreamMemory:
    """What this rank may have without computing it: its own pages, and those on the shelf."""
    shelf = None
    if config.shelf is not None:
        shelf = Shelf(shelf_fd, config.shelf, config.rank, threads=SHELF_THREADS[config.device])
    what = (config.model, config.load_format, str(config.seed), config.device)
    return StreamMemory(root("\n".join(what)), config.prefix_caching, shelf)


def mask_maker(config: RankConfig) -> MaskMaker | None:
    """None where nothing can be guided: see `Vocabulary`."""
    guide = shared(Path(config.directory))
    if guide is None:
        return None
    if config.device == "cpu":  # where all processors compute
        return MaskMaker(guide)
    return MaskMaker(guide, beside=False, threads=mask_threads(config.placement.num_ranks))


def mask_threads(ranks: int) -> int:
    """Of each rank: this host's processors for all of them, less the one that launches steps."""
    return min(MOST_MASK_THREADS, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def weights_from_checkpoint(config: RankConfig, spec: ModelSpec) -> Weights:
    folder, load_format = Path(config.model), config.load_format
    return load_weights(
        folder,
        spec,
        config.placement,
        config.rank,
        load_format=load_format,
        seed=config.seed,
        dtype=_dtype(config),
        rounding=config.rounding,
    )


def weights_from_peers(config: RankConfig, spec: ModelSpec, open_plane: OpenPlane) -> Weights | None:
    """None if there are no peers to ask, if the checkpoint is faster, or if they do not give what is needed."""
    if config.peers is None or _in_page_cache(config):
        return None
    plane = open_plane()
    if isinstance(plane, str):
        return None
    source = weight_source(Path(config.model), spec, config.load_format, config.seed)
    slots = config.placement.slots_per_rank
    weights = blank_weights(spec, slots, source, dtype=_dtype(config), rounding=config.rounding)
    try:
        fill_from_peers(plane, weights, config.placement, config.rank, config.peers, config.timing)
    except PullFailed:
        return None
    return weights


def _dtype(config: RankConfig) -> torch.dtype:
    return torch.bfloat16 if config.halves else torch.float32


def _in_page_cache(config: RankConfig) -> bool:
    return config.load_format != "dummy" and cached_share(Path(config.model)) >= MOSTLY
