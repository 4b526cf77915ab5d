"""What follows from the command line: the size of the KV cache, the shared memory."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_ep import plan
from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.event_log.log import EventLog
from elastic_ep.exchange.windows import Windows, WindowsError
from elastic_ep.gateway.settings import SamplingDefaults
from elastic_ep.models import qwen3_moe
from elastic_ep.plan import engine_limits, first_placement, make_plan
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.serve import RunProcess
from tests.kit.shapes import QWEN3_30B

CONFIG = ServeConfig(ranks=4, model=str(BUNDLED_MODEL), device="cpu")


@pytest.mark.parametrize(
    ("sequences", "tokens", "device", "expected"),
    [
        (None, None, "cpu", (16, 64)),
        (None, None, "cuda", (256, 4352)),
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
    ("ranks", "redundant", "eplb", "backend", "slots"),
    [
        (3, 1, False, "peer-memory", 43),
        (3, 1, False, "mooncake", 44),
        (3, 4, False, "mooncake", 44),
        (3, 4, True, "mooncake", 46),
        (4, 4, False, "mooncake", 33),
    ],
)
def test_mooncake_gets_an_even_number_of_physical_experts(
    ranks: int, redundant: int, eplb: bool, backend: str, slots: int
) -> None:
    model = qwen3_moe.spec(replace(QWEN3_30B, num_hidden_layers=1))
    config = replace(CONFIG, ranks=ranks, enable_eplb=eplb, all2all_backend=backend)
    assert first_placement(config, model, redundant, "cuda").slots_per_rank == slots
    assert first_placement(config, model, redundant, "cpu").slots_per_rank <= slots


@pytest.mark.parametrize(
    ("ranks", "given", "slots"), [(1, None, 16), (1, 3, 19), (2, None, 16), (4, None, 8)]
)
def test_a_single_rank_keeps_no_room_for_second_copies_unless_it_is_told_to(
    ranks: int, given: int | None, slots: int
) -> None:
    placement = make_plan(replace(CONFIG, ranks=ranks, ep_num_redundant_experts=given)).placement
    assert placement.num_experts == 16
    assert placement.slots_per_rank == slots


def test_what_carries_rows_between_gpus_is_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="--all2all-backend mooncake: the ranks run on the CPU"):
        make_plan(replace(CONFIG, device="cpu", all2all_backend="mooncake"))


MODEL = qwen3_moe.spec(QWEN3_30B)
PAGE = 2 * 48 * 4 * 128 * 16 * 4
"""Bytes, on a processor."""


@pytest.mark.parametrize(
    ("available", "length", "pages"),
    [
        (10 * 4 * 100 * PAGE, 1024, 100),
        (10 * 4 * 100 * PAGE - 1, 1024, 99),
        (1 << 60, 1024, 16 * 64),
        (4 * 64 * PAGE, 1024, 64),
    ],
    ids=("a tenth", "nearly", "all that sequences need", "one sequence at least"),
)
def test_a_cache_on_the_processor_takes_a_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, available: int, length: int, pages: int
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: available)
    limits = engine_limits(replace(CONFIG, max_model_len=length), MODEL, "cpu")
    assert limits.num_pages == pages
    assert engine_limits(replace(CONFIG, max_model_len=length, num_pages=77), MODEL, "cpu").num_pages == 77


def test_a_sequence_that_memory_cannot_hold_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: 4 * 64 * PAGE - 1)
    with pytest.raises(ConfigError, match="lower --max-model-len or --ranks"):
        engine_limits(replace(CONFIG, max_model_len=1024), MODEL, "cpu")


@pytest.mark.parametrize(
    ("given", "utilization", "pages", "flag"),
    [
        ({}, 0.9, 64, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": 0.5}, 0.5, 64, "--gpu-memory-utilization"),
        ({"num_pages": 99, "gpu_memory_utilization": 0.5}, None, 99, "--num-gpu-blocks-override"),
    ],
)
def test_ranks_on_gpus_size_their_cache_unless_told(
    given: dict[str, Any], utilization: float | None, pages: int, flag: str
) -> None:
    """What they are told is the least that will do."""
    config = replace(CONFIG, max_model_len=1024, **given)
    there = replace(
        make_plan(CONFIG), config=config, device="cuda", limits=engine_limits(config, MODEL, "cuda")
    )
    told = there.rank_config(Path("x"))
    assert (told.gpu_memory_utilization, told.limits.num_pages, there.cache_flag) == (
        utilization,
        pages,
        flag,
    )


def test_a_share_of_a_gpu_means_nothing_on_the_processor() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization: .*--num-gpu-blocks-override"):
        make_plan(replace(CONFIG, gpu_memory_utilization=0.9))
    assert make_plan(CONFIG).rank_config(Path("x")).gpu_memory_utilization is None


def test_how_long_steps_may_get_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"--prompt-stretch: .*--max-num-batched-tokens"):
        make_plan(replace(CONFIG, prompt_stretch=8.0))
    assert engine_limits(CONFIG, MODEL, "cuda").prompt_stretch == 8
    assert engine_limits(replace(CONFIG, prompt_stretch=3.0), MODEL, "cuda").prompt_stretch == 3


def test_only_ranks_on_the_processor_need_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(shape: Any) -> int:
        raise WindowsError(12, "too little of it")

    monkeypatch.setattr(Windows, "create", refuse)
    on_cpu = make_plan(CONFIG)
    with pytest.raises(ConfigError, match="too little of it"), RunProcess(on_cpu, EventLog(None))._windows():
        pass
    with RunProcess(replace(on_cpu, device="cuda"), EventLog(None))._windows() as fd:
        assert os.fstat(fd).st_size == 0, "the fork server hands it on"


def test_another_tokenizer_and_other_defaults(tmp_path: Path) -> None:
    """By folders of their own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("mine")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25}')
    given = ServeConfig(model=str(BUNDLED_MODEL), tokenizer=str(tmp_path), generation_config=str(tmp_path))
    plan = make_plan(given)
    assert plan.text.render_chat([]) == "mine"
    assert plan.defaults.temperature == 0.25
    assert make_plan(replace(given, generation_config="vllm")).defaults == SamplingDefaults()
    with pytest.raises(ConfigError, match="--generation-config"):
        make_plan(replace(given, generation_config=str(tmp_path / "no")))
    with pytest.raises(ConfigError, match="tokenizer"):
        make_plan(replace(given, tokenizer=str(tmp_path / "no")))


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no key")
    for file in ("missing", "x"):
        with pytest.raises(ConfigError, match="--ssl-certfile and --ssl-keyfile"):
            make_plan(
                ServeConfig(
                    model=str(BUNDLED_MODEL),
                    ssl_keyfile=str(tmp_path / file),
                    ssl_certfile=str(tmp_path / file),
                )
            )
