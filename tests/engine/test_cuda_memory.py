"""What a rank needs on a GPU, and what it says when that is not there."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import StepInputs, StepShape
from elastic_ep.engine.ops_cuda.kernels import decode_attention, expert_ffn, latent_attention
from elastic_ep.engine.ops_cuda.memory import (
    MOST_PAGES,
    Budget,
    NotEnoughMemory,
    Share,
    _parts,
    check_memory,
    needs_of,
    pages_within,
)
from elastic_ep.engine.ops_cuda.ops import CudaOps
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.quantisation import quantised
from elastic_ep.models.spec import LatentAttention
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Held, Weights, dummy_source
from tests.engine.solo import TINY, dummy_weights
from tests.kit.published import published
from tests.models.small import small_spec

LIMITS = EngineLimits(max_model_len=320, num_pages=2000)
PLACEMENT = launch_placement(2, TINY.moe_layers, TINY.moe.experts, 2)
SHAPE = ExchangeShape(2, 64, TINY.hidden_size, 2, PLACEMENT.slots_per_rank, 4)
NEEDS = needs_of(TINY, LIMITS, PLACEMENT, SHAPE, 1 << 30, copies_rows=True)


def test_the_weights_are_counted_as_they_will_be_allocated() -> None:
    weights = dummy_weights(TINY, PLACEMENT)
    tensors = [*weights.dense().values()]
    tensors += [tensor for layer in weights.layers for tensor in (layer["gate_up"], layer["down"])]
    assert NEEDS.weights == 2 * sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("columns", [64, 128])
def test_codes_take_what_their_parts_take(columns: int) -> None:
    """A byte a number, and the scales, of experts and where rows become codes too of all; two bytes where widened."""
    asked = {"quant_method": "fp8", "weight_block_size": [32, columns]}
    spec = quantised(TINY, ConfigFields(Path("config.json"), {"quantization_config": asked}))
    source = dummy_source(spec, 0)
    for held, widened in ((Held.CODES, False), (Held.NUMBERS, True)):
        weights = Weights(spec, PLACEMENT, 0, source, torch.device("cpu"), torch.bfloat16, held=held)
        tensors = [*weights.dense().values()]
        tensors += [layer[name] for layer in weights.layers for name in weights.expert_parts(0)]
        needs = needs_of(spec, LIMITS, PLACEMENT, SHAPE, 1 << 30, copies_rows=True, widened=widened)
        assert needs.weights == sum(tensor.nbytes for tensor in tensors)


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
    sizes = (TINY.hidden_size, 2 * TINY.moe.inner), (TINY.moe.inner, TINY.hidden_size)
    weights = [torch.empty(SHAPE.slots_per_rank, *size, dtype=torch.bfloat16) for size in sizes]
    counts = torch.zeros(SHAPE.slots_per_rank, dtype=torch.int32)
    expert_ffn.expert_ffn(packed, counts, *weights, out=packed)
    assert len(at_work) == 2
    for copies_rows, counted in (
        (True, [*at_work.values()]),
        (False, [at_work[key] for key in at_work if key != packed.data_ptr()]),
    ):
        small, large = (
            needs_of(
                TINY,
                LIMITS,
                PLACEMENT,
                replace(SHAPE, max_tokens=times * SHAPE.max_tokens),
                1 << 30,
                copies_rows=copies_rows,
            )
            for times in (1, 2)
        )
        assert large.working - small.working == 2 * sum(counted)


def test_logits_are_counted() -> None:
    """In whole tiles, once: no two steps have any at a time."""
    model = replace(TINY, vocab_size=TINY.vocab_size + 1)
    limits = EngineLimits(max_model_len=320, max_num_seqs=9, max_num_batched_tokens=256)
    counted = [
        needs_of(each, limits, PLACEMENT, SHAPE, 0, copies_rows=True).working for each in (TINY, model)
    ]
    assert counted[1] - counted[0] == 4 * 16


def test_the_parts_of_long_contexts_are_counted_as_they_are_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once eagerly and once in the graphs."""
    parts: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *tensors, **options: parts.append(sum(part.nbytes for part in tensors[6:9]))

    monkeypatch.setattr(decode_attention, "_decode_kernel", Kernel())
    kind = TINY.grouped
    queries = torch.empty(16, kind.heads, kind.head_dim, dtype=torch.bfloat16)
    keys = torch.empty(2, kind.kv_heads, 16, kind.head_dim, dtype=torch.bfloat16)
    for longest in (320, 40_000):
        tables = torch.empty(16, longest // 16, dtype=torch.int32)
        decode_attention.decode_attention(queries, keys, keys, tables, torch.empty(16, dtype=torch.int32))
    needs = [
        needs_of(TINY, replace(LIMITS, max_model_len=longest), PLACEMENT, SHAPE, 0, copies_rows=True)
        for longest in (320, 40_000)
    ]
    assert needs[1].working - needs[0].working == 2 * (parts[1] - parts[0])


def test_a_token_has_576_numbers_a_layer_in_pages_of_latents() -> None:
    spec, page, meta = published("DeepSeek-V3"), LIMITS.page_size, torch.device("meta")
    made = CudaOps(spec, LIMITS, StepInputs(LIMITS, 16, meta), 1, 1, torch.bfloat16, meta)
    assert spec.kv_page_bytes("cuda", page) == 2 * len(spec.layers) * 576 * page
    assert made.caches.nbytes == LIMITS.cache_pages * spec.kv_page_bytes("cuda", page)


@pytest.mark.parametrize("sequences", [16, 64])
def test_the_parts_of_latents_are_counted_as_they_are_allocated(
    monkeypatch: pytest.MonkeyPatch, sequences: int
) -> None:
    parts: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *tensors, **options: parts.append(sum(part.nbytes for part in tensors[4:7]))

    monkeypatch.setattr(latent_attention, "_latent_decode_kernel", Kernel())
    monkeypatch.setattr(latent_attention, "PARTS_BYTES", 2_000_000)
    monkeypatch.setattr(latent_attention, "counters", lambda device: None)
    spec, longest = small_spec("deepseek_v3"), 100_000
    kind = spec.attention
    assert isinstance(kind, LatentAttention)
    latent_attention.latent_decode(
        torch.empty(sequences, kind.heads, kind.kv_elements, dtype=torch.bfloat16, device="meta"),
        torch.empty(2, 16, kind.kv_elements, dtype=torch.bfloat16, device="meta"),
        torch.empty(sequences, longest // 16, dtype=torch.int32, device="meta"),
        torch.empty(sequences, dtype=torch.int32, device="meta"),
        rank=kind.kv_rank,
        scale=1.0,
    )
    limits = replace(LIMITS, max_num_seqs=sequences, max_model_len=longest)
    assert len(parts) == -(-sequences // 32)
    assert _parts(spec, limits) == max(parts)


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
    check_memory(needs_of(TINY, limits, PLACEMENT, SHAPE, 1 << 30, copies_rows=True), free, limits, PLACEMENT)


def test_where_the_cache_cannot_shrink_so_far_fewer_experts_are() -> None:
    with pytest.raises(NotEnoughMemory, match="--ep-num-redundant-experts"):
        check_memory(NEEDS, NEEDS.total - NEEDS.kv, LIMITS, PLACEMENT)


GIB = 1 << 30
sizes = st.integers(0, 200 * GIB)


@example(
    utilization=1.0, ranks=4, early=True, page=1 << 20, total=80 * GIB, free=80 * GIB, own=0, later=0, less=0
)
@given(
    utilization=st.floats(0.01, 1),
    ranks=st.integers(1, 8),
    early=st.booleans(),
    page=st.integers(1, GIB),
    total=sizes,
    free=sizes,
    own=sizes,
    later=sizes,
    less=sizes,
)
def test_a_cache_keeps_to_the_ranks_share_and_to_what_is_free(
    utilization: float, ranks: int, early: bool, page: int,
    total: int, free: int, own: int, later: int, less: int,
) -> None:  # fmt: skip
    """And what is free is the only thing by which a rank that returns may come to another number: a smaller one."""
    needs = replace(NEEDS, kv_page=page)
    share = Share(utilization, ranks, early)

    def pages(free: int) -> int:
        return pages_within(share, needs, total=total, free=free, own=own, later=later)

    took = own + later + (pages(free) + 1) * page
    if pages(free) >= 0:
        assert took * ranks <= utilization * total + 1
        assert took - own <= free
        if early:
            assert took * ranks + needs.total - needs.kv <= total + 1, "one that returns has no room"
    assert pages(max(0, free - less)) <= pages(free)
    one_more = took + page
    assert early or pages(free) == MOST_PAGES or one_more > min(utilization * total / ranks, free + own) - 1


class Device:
    """`free` bytes are left, `reserved` ones are torch's in this process; each step runs out of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int) -> None:
        self.free = free
        self.waited = 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)

    def warm_up(self, share: Share | None = None) -> None:
        def run_out(shape: StepShape, *, draw: bool) -> None:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nC++ CapturedTraceback:"
            )

        budget = Budget(NEEDS, LIMITS, PLACEMENT, torch.device("cuda"), share)
        shape = StepShape(64, decode=True)
        runner = SimpleNamespace(
            _budget=budget,
            _inputs=SimpleNamespace(graphed=lambda: [shape], largest=lambda: [shape]),
            _run_once=run_out,
            _reserved=lambda: 0,
            _give_back=lambda: None,
        )
        CudaRunner.warm_up(cast(Any, runner))

    def freed(self, monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
        """While somebody waits."""

        def pause(seconds: float) -> None:
            self.waited += 1
            self.free += amount

        monkeypatch.setattr(time, "sleep", pause)


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


@pytest.mark.parametrize(
    ("share", "flag"), [(None, "--num-gpu-blocks-override"), (Share(0.9, 1), "--gpu-memory-util")]
)
def test_what_makes_the_cache_smaller_is_named(
    monkeypatch: pytest.MonkeyPatch, share: Share | None, flag: str
) -> None:
    device = Device(monkeypatch, free=1, reserved=NEEDS.total)
    with pytest.raises(NotEnoughMemory, match=f"lower {flag}"):
        device.warm_up(share)


def test_what_was_asked_for_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch, free=80 * GIB, reserved=0)
    assert Budget(NEEDS, LIMITS, PLACEMENT, torch.device("cuda")).pages(later=0) == LIMITS.num_pages


ALONE = Budget(NEEDS, replace(LIMITS, num_pages=20), PLACEMENT, torch.device("cuda"), Share(0.9, 1), 5.0)


def test_a_rank_that_returns_waits_for_its_predecessors_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, free=78 * GIB, reserved=GIB)
    pages = ALONE.pages(later=GIB)
    device.free = NEEDS.total // 2
    device.freed(monkeypatch, NEEDS.total // 4)
    ALONE.check()
    assert device.waited == 2
    device.freed(monkeypatch, 10 * GIB)
    assert ALONE.pages(later=GIB) == pages
    assert device.waited > 2


def test_a_neighbour_that_grew_costs_pages_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, free=78 * GIB, reserved=GIB)
    budget = replace(ALONE, patience_s=0.0)
    before = budget.pages(later=GIB)
    device.free = 3 * GIB
    assert 0 < budget.pages(later=GIB) < before
    device.free = GIB
    with pytest.raises(NotEnoughMemory, match="raise --gpu-memory-utilization") as refused:
        budget.pages(later=GIB)
    assert "\n" not in str(refused.value)
