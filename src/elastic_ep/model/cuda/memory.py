"""Whether a rank fits onto its GPU: told before anything is loaded, with the flag that would help."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_ep.config import CannotRun, EngineLimits
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.model.checkpoint import expected_tensors
from elastic_ep.model.config import ModelConfig
from elastic_ep.placement import Placement

_ITEM = 2
"""Bytes of a bfloat16."""
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


def needs_of(
    model: ModelConfig, limits: EngineLimits, placement: Placement, shape: ExchangeShape, exchange_bytes: int
) -> Needs:
    """`exchange_bytes` is the size of the exchange's own buffer."""
    dense = sum(math.prod(size) for name, size in expected_tensors(model) if ".experts." not in name)
    if model.tie_word_embeddings:
        dense += model.vocab_size * model.hidden_size  # the transposed copy
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    slots = model.num_hidden_layers * placement.slots_per_rank
    token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    rows = placement.slots_per_rank * shape.num_ranks * shape.max_tokens
    return Needs(
        weights=(dense + slots * expert) * _ITEM,
        kv_page=token * limits.page_size * _ITEM,
        kv_pages=limits.num_pages + 1,
        exchange=exchange_bytes,
        working=rows * (model.hidden_size + model.moe_intermediate_size) * _ITEM + _WORKING_BYTES,
    )


def check_memory(needs: Needs, free: int, limits: EngineLimits, placement: Placement) -> None:
    """Raises NotEnoughMemory if `free` bytes are too few."""
    missing = needs.total - free
    if missing > 0:
        raise NotEnoughMemory(
            f"not enough GPU memory: a rank needs {_gib(needs.total)} (weights {_gib(needs.weights)}, KV cache "
            f"{_gib(needs.kv)}, exchange {_gib(needs.exchange)}, work {_gib(needs.working)}), {_gib(free)} are free, "
            f"{_gib(missing)} are missing; {_remedy(needs, missing, limits, placement)}"
        )


def _remedy(needs: Needs, missing: int, limits: EngineLimits, placement: Placement) -> str:
    pages = limits.num_pages - -(-missing // needs.kv_page)
    if pages * limits.page_size >= limits.max_model_len:
        return f"--num-gpu-blocks-override {pages} would do"
    if placement.num_ranks * placement.slots_per_rank > placement.num_experts:
        return "lower --ep-num-redundant-experts, or give it more --ranks on more GPUs"
    return "lower --max-num-batched-tokens, or give it more --ranks on more GPUs"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
