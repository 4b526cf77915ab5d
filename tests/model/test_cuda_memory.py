"""What a rank needs on a GPU, and what it says when that is not there."""

from __future__ import annotations

import re

import pytest

from elastic_ep.config import EngineLimits
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.model.cuda.memory import NotEnoughMemory, check_memory, needs_of
from elastic_ep.placement import launch_placement

from .solo import TINY, dummy_weights

LIMITS = EngineLimits(max_model_len=320, num_pages=2000)
PLACEMENT = launch_placement(2, TINY.num_hidden_layers, TINY.num_experts, 2)
SHAPE = ExchangeShape(2, 64, TINY.hidden_size, 2, PLACEMENT.slots_per_rank, 4)
NEEDS = needs_of(TINY, LIMITS, PLACEMENT, SHAPE, 1 << 30)


def test_the_weights_are_counted_as_they_will_be_allocated() -> None:
    weights = dummy_weights(TINY, PLACEMENT)
    tensors = [*weights.dense().values()]
    tensors += [tensor for layer in weights.layers for tensor in (layer.gate_up, layer.down)]
    repeated = sum(layer.qk_norm.numel() - 2 * TINY.head_dim for layer in weights.layers)
    assert NEEDS.weights == 2 * (sum(tensor.numel() for tensor in tensors) - repeated)


def test_enough_is_enough() -> None:
    check_memory(NEEDS, NEEDS.total, LIMITS, PLACEMENT)


def test_a_smaller_cache_is_proposed_and_would_fit() -> None:
    free = NEEDS.total - 1000 * NEEDS.kv_page - 1
    with pytest.raises(NotEnoughMemory, match=r"GiB are missing; --num-gpu-blocks-override (\d+)") as refused:
        check_memory(NEEDS, free, LIMITS, PLACEMENT)
    found = re.search(r"override (\d+)", str(refused.value))
    assert found
    pages = int(found.group(1))
    assert pages == 999
    limits = EngineLimits(max_model_len=320, num_pages=pages)
    check_memory(needs_of(TINY, limits, PLACEMENT, SHAPE, 1 << 30), free, limits, PLACEMENT)


def test_where_the_cache_cannot_shrink_so_far_fewer_experts_are() -> None:
    with pytest.raises(NotEnoughMemory, match="--ep-num-redundant-experts"):
        check_memory(NEEDS, NEEDS.total - NEEDS.kv, LIMITS, PLACEMENT)
