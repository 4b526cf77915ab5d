"""What a rank needs on a GPU, and what it says when that is not there."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import StepShape
from elastic_ep.engine.ops_cuda.kernels import expert_ffn
from elastic_ep.engine.ops_cuda.memory import Budget, NotEnoughMemory, check_memory, needs_of
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.placement import launch_placement
from tests.engine.solo import TINY, dummy_weights

LIMITS = EngineLimits(max_model_len=320, num_pages=2000)
PLACEMENT = launch_placement(2, TINY.moe_layers, TINY.moe.experts, 2)
SHAPE = ExchangeShape(2, 64, TINY.hidden_size, 2, PLACEMENT.slots_per_rank, 4)
NEEDS = needs_of(TINY, LIMITS, PLACEMENT, SHAPE, 1 << 30)


def test_the_weights_are_counted_as_they_will_be_allocated() -> None:
    weights = dummy_weights(TINY, PLACEMENT)
    tensors = [*weights.dense().values()]
    tensors += [tensor for layer in weights.layers for tensor in (layer["gate_up"], layer["down"])]
    assert NEEDS.weights == 2 * sum(tensor.numel() for tensor in tensors)


def test_what_is_at_work_in_a_layer_is_counted_as_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: once for eager steps, once in the memory of the graphs."""
    at_work: dict[int, int] = {}

    def launch(
        tiles: Any, x: torch.Tensor, weights: Any, y: torch.Tensor, *rest: Any, **options: Any
    ) -> None:
        at_work.update((tensor.data_ptr(), tensor.nbytes) for tensor in (x, y))

    monkeypatch.setattr(expert_ffn, "_launch", launch)
    rows = SHAPE.num_ranks * SHAPE.max_tokens
    packed = torch.empty(SHAPE.slots_per_rank, rows, SHAPE.hidden, dtype=torch.bfloat16)
    down = torch.empty(SHAPE.slots_per_rank, TINY.moe.inner, TINY.hidden_size, dtype=torch.bfloat16)
    expert_ffn.expert_ffn(packed, cast(Any, None), cast(Any, None), down)
    assert len(at_work) == 3
    larger = needs_of(TINY, LIMITS, PLACEMENT, replace(SHAPE, max_tokens=2 * SHAPE.max_tokens), 1 << 30)
    assert larger.working - NEEDS.working == 2 * sum(at_work.values())


def test_logits_of_graphs_are_counted() -> None:
    """16 sequences are a tile of 64. Graphs: a decode and, of 256 tokens, four others; and an eager step, twice."""
    model = replace(TINY, vocab_size=TINY.vocab_size + 1)
    limits = EngineLimits(max_model_len=320, max_num_seqs=16, max_num_batched_tokens=256)
    counted = [needs_of(each, limits, PLACEMENT, SHAPE, 0).working for each in (TINY, model)]
    assert counted[1] - counted[0] == 4 * 64 * (1 + 4 + 2)
    many = replace(limits, max_num_seqs=512, max_num_batched_tokens=512)
    counted = [needs_of(each, many, PLACEMENT, SHAPE, 0).working for each in (TINY, model)]
    assert counted[1] - counted[0] == 4 * (64 + 128 + 192 + 256 + 4 * 512 + 2 * 512)


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


class Device:
    """`free` bytes are left, `reserved` ones are torch's in this process; each step runs out of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)

    def warm_up(self) -> None:
        def run_out(shape: StepShape, *, draw: bool) -> None:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nC++ CapturedTraceback:"
            )

        budget = Budget(NEEDS, LIMITS, PLACEMENT, torch.device("cuda"))
        runner = SimpleNamespace(_budget=budget, _shapes=lambda: [StepShape(64, True)], _warm_up=run_out)
        CudaRunner.warm_up(cast(Any, runner))


def test_running_out_in_the_warm_up_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this rank has allocated by then is not missing."""
    reserved = NEEDS.total - NEEDS.exchange - 1000 * NEEDS.kv_page
    device = Device(monkeypatch, free=0, reserved=reserved)
    with pytest.raises(NotEnoughMemory, match=r"GiB are missing; --num-gpu-blocks-override 1000 would do"):
        device.warm_up()


def test_running_out_where_the_count_says_enough_names_the_flags_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, free=1, reserved=NEEDS.total - NEEDS.exchange)
    with pytest.raises(
        NotEnoughMemory, match=r"override \(now 2000\) or --max-num-batched-tokens"
    ) as refused:
        device.warm_up()
    assert str(refused.value).endswith("Tried to allocate 2.00 GiB.")
    assert "\n" not in str(refused.value)
