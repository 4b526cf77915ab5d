"""What follows from the command line: the size of the KV cache, the shared memory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.exchange.windows import Windows, WindowsError
from elastic_ep.models import qwen3_moe
from elastic_ep.plan import KV_CACHE_BYTES, engine_limits, first_placement, make_plan
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.serve import RunProcess
from tests.kit.shapes import QWEN3_30B

CONFIG = ServeConfig(ranks=4, model=str(BUNDLED_MODEL), device="cpu")


@pytest.mark.parametrize(
    ("sequences", "tokens", "device", "expected"),
    [
        (None, None, "cpu", (16, 64)),
        (None, None, "cuda", (64, 256)),
        (100, None, "cpu", (100, 100)),
        (None, 8, "cuda", (8, 8)),
        (4, 32, "cuda", (4, 32)),
    ],
)
def test_the_size_of_a_step_that_nobody_gave_suits_what_was_given(
    sequences: int | None, tokens: int | None, device: str, expected: tuple[int, int]
) -> None:
    config = replace(CONFIG, max_num_seqs=sequences, max_num_batched_tokens=tokens)
    limits = engine_limits(config, make_plan(CONFIG).model, device)
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == expected


@pytest.mark.parametrize(
    ("ranks", "redundant", "eplb", "device", "slots"),
    [
        (3, 1, False, "cpu", 43),
        (3, 1, False, "cuda", 44),
        (3, 4, False, "cuda", 44),
        (3, 4, True, "cuda", 46),
        (4, 4, False, "cuda", 33),
    ],
)
def test_a_gpu_gets_an_even_number_of_physical_experts(
    ranks: int, redundant: int, eplb: bool, device: str, slots: int
) -> None:
    model = qwen3_moe.spec(replace(QWEN3_30B, num_hidden_layers=1))
    config = replace(CONFIG, ranks=ranks, enable_eplb=eplb)
    assert first_placement(config, model, redundant, device).slots_per_rank == slots


@pytest.mark.parametrize(("device", "item"), [("cpu", 4), ("cuda", 2)])
def test_the_kv_cache_takes_so_many_bytes_on_every_device(device: str, item: int) -> None:
    model = qwen3_moe.spec(QWEN3_30B)
    limits = engine_limits(
        replace(CONFIG, max_model_len=1024, max_num_seqs=4096, max_num_batched_tokens=4096), model, device
    )
    page = 2 * 48 * 4 * 128 * limits.page_size * item
    assert KV_CACHE_BYTES[device] - page < limits.num_pages * page <= KV_CACHE_BYTES[device]


def test_only_ranks_on_the_processor_need_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(shape: Any) -> int:
        raise WindowsError(12, "too little of it")

    monkeypatch.setattr(Windows, "create", refuse)
    plan = make_plan(CONFIG)
    with pytest.raises(ConfigError, match="too little of it"), RunProcess(plan)._windows():
        pass
    with RunProcess(replace(plan, device="cuda"))._windows() as fd:
        assert os.fstat(fd).st_size == 0, "the fork server hands it on"
