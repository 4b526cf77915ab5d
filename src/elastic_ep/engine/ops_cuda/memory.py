"""Whether a rank fits onto its GPU: told before anything is loaded, with the flag that would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from elastic_ep.config import CannotRun, EngineLimits
from elastic_ep.engine.ops_cuda import draws
from elastic_ep.engine.ops_cuda.graphs import GRAPH_ROWS
from elastic_ep.engine.ops_cuda.linear import TILE_ROWS
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import Placement

_ITEM = 2
"""Bytes of a bfloat16."""
_WIDE_ITEM = 4
"""Bytes of a float32."""
_WORKING_BYTES = 256 << 20
"""For libraries, graphs and everything small."""


class NotEnoughMemory(CannotRun):
    """The text says how much is missing and which flag lowers the need."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of one rank."""

    weights: int
    kv_page: int
    kv_pages: int
    exchange: int
    working: int

    @property
    def kv(self) -> int:
        return self.kv_page * self.kv_pages

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.exchange + self.working

    def __str__(self) -> str:
        return (
            f"{_gib(self.total)} (weights {_gib(self.weights)}, KV cache {_gib(self.kv)}, exchange "
            f"{_gib(self.exchange)}, work {_gib(self.working)})"
        )


def needs_of(
    spec: ModelSpec, limits: EngineLimits, placement: Placement, shape: ExchangeShape, exchange_bytes: int
) -> Needs:
    """`exchange_bytes` is the size of the exchange's own buffer.

    What is at work in a layer is as large in every step, for the exchange may deliver every peer's tokens to every
    slot: what dispatch returns, what lies between the experts' two products, and what they return, all at once. It is
    there twice: the graphs have a memory pool of their own, and between two captures a step runs eagerly. Then the
    logits, of an eager step and of every graph, which keeps its own, and what drawing tokens from them takes. All else
    is taken to fit into `_WORKING_BYTES`.
    """
    slots = spec.moe_layers * placement.slots_per_rank
    rows = placement.slots_per_rank * shape.num_ranks * shape.max_tokens
    return Needs(
        weights=(spec.dense_elements + slots * spec.expert_elements) * _ITEM,
        kv_page=spec.kv_page_bytes("cuda", limits.page_size),
        kv_pages=limits.cache_pages,
        exchange=exchange_bytes,
        working=2 * rows * (2 * spec.hidden_size + spec.moe.inner) * _ITEM
        + _rows_of_logits(limits) * spec.vocab_size * _WIDE_ITEM
        + draws.WORKING_BYTES
        + _WORKING_BYTES,
    )


def _rows_of_logits(limits: EngineLimits) -> int:
    sequences, tokens = (
        -(-most // TILE_ROWS) * TILE_ROWS for most in (limits.max_num_seqs, limits.max_num_batched_tokens)
    )
    decodes = range(TILE_ROWS, min(sequences, GRAPH_ROWS) + 1, TILE_ROWS)
    others = min(tokens, GRAPH_ROWS) // TILE_ROWS
    eager = 2 * sequences  # the tiles, and all of them in one
    return eager + sum(decodes) + others * sequences


def check_memory(needs: Needs, free: int, limits: EngineLimits, placement: Placement) -> None:
    """Raises NotEnoughMemory if `free` bytes are too few, those included that the rank has already."""
    missing = needs.total - free
    if missing > 0:
        raise NotEnoughMemory(
            f"not enough GPU memory: a rank needs {needs}, there are {_gib(free)} for it, {_gib(missing)} are missing; "
            f"{_remedy(needs, missing, limits, placement)}"
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """What a rank needs on its device, and what could be lowered."""

    needs: Needs
    limits: EngineLimits
    placement: Placement
    device: torch.device

    def check(self) -> None:
        """Before anything is allocated. Raises NotEnoughMemory."""
        check_memory(self.needs, torch.cuda.mem_get_info(self.device)[0], self.limits, self.placement)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Once the exchange has its buffer: if the device runs out of memory within, it is NotEnoughMemory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info(self.device)[0]
            ours = torch.cuda.memory_reserved(self.device) + self.needs.exchange
            # Another process may have taken it meanwhile.
            check_memory(self.needs, free + ours, self.limits, self.placement)
            raise NotEnoughMemory(
                f"not enough GPU memory: a rank needs more than {self.needs}; lower --num-gpu-blocks-override (now "
                f"{self.limits.num_pages}) or --max-num-batched-tokens; {str(error).splitlines()[0]}"
            ) from error


def _remedy(needs: Needs, missing: int, limits: EngineLimits, placement: Placement) -> str:
    pages = limits.num_pages - -(-missing // needs.kv_page)
    if pages * limits.page_size >= limits.max_model_len:
        return f"--num-gpu-blocks-override {pages} would do"
    if placement.num_ranks * placement.slots_per_rank > placement.num_experts:
        return "lower --ep-num-redundant-experts, or give it more --ranks on more GPUs"
    return "lower --max-num-batched-tokens, or give it more --ranks on more GPUs"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
