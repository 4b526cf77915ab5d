"""Of every family, a sequence's logits are bitwise the same whatever else is in the batch, in chunks and one by one."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu import runner as runner_module
from elastic_ep.engine.ops_cpu.gate import choose
from elastic_ep.engine.ops_cpu.layers import ROWS
from elastic_ep.models.registry import FAMILIES
from elastic_ep.models.spec import Gate, ModelSpec, Moe, Scores
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights
from tests.engine.solo import SoloExchange, assign, drain, dummy_weights, solo_runner
from tests.engine.test_invariance import _forced, recorded_logits
from tests.models.small import OWN, small_spec

NAMES = sorted(family.MODEL_TYPE for family in FAMILIES)
VARIED = {
    "deepseek_v3 small": small_spec("deepseek_v3", v_head_dim=8, kv_lora_rank=10, q_lora_rank=None),
    "gpt_oss narrow": small_spec("gpt_oss", sliding_window=5, head_dim=8),
    "glm4_moe": small_spec("glm4_moe", use_qk_norm=True, attention_bias=True),
}
SPECS = {name: small_spec(name) for name in NAMES} | VARIED
PROMPT = [(7 * i * i + 3 * i + 5) % 190 for i in range(77)]
_weights: dict[str, Weights] = {}


def weights_of(name: str) -> Weights:
    spec = SPECS[name]
    if name not in _weights:
        _weights[name] = dummy_weights(spec, launch_placement(1, spec.moe_layers, spec.moe.experts, 0))
    return _weights[name]


def test_every_family_is_tried() -> None:
    assert OWN.keys() == set(NAMES)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_prefill_and_decode_give_the_same_bits(name: str) -> None:
    """One token at a time, into the second key block, against one chunk."""
    limits = EngineLimits(max_model_len=400, max_num_batched_tokens=200, num_pages=100)
    runner = solo_runner(SPECS[name], limits=limits, weights=weights_of(name))
    runner.add(assign(0, PROMPT[:57], max_tokens=13))
    with recorded_logits() as decoded, mock.patch.object(runner_module, "sample", _forced(PROMPT)):
        drain(runner)
    for length in (57, 58, 64, 65, 69):
        runner.add(assign(0, PROMPT[:length], max_tokens=1))
        with recorded_logits() as prefilled:
            drain(runner)
        assert torch.equal(prefilled[0, length], decoded[0, length]), length


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    budget=st.integers(17, 150),
    page_size=st.sampled_from([8, 16, 32]),
    others=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    first=st.booleans(),
)
def test_neighbours_and_chunks_change_no_bit(
    name: str, budget: int, page_size: int, others: list[int], first: bool
) -> None:
    def run(limits: EngineLimits, lengths: list[int]) -> dict[tuple[int, int], torch.Tensor]:
        runner = solo_runner(SPECS[name], limits=limits, weights=weights_of(name))
        asked = [assign(0, PROMPT, max_tokens=3)]
        asked += [
            assign(1 + i, [(i + j) % 190 for j in range(length)], max_tokens=4)
            for i, length in enumerate(lengths)
        ]
        for one in asked if first else reversed(asked):
            runner.add(one)
        with recorded_logits() as seen:
            drain(runner)
        return {key: row for key, row in seen.items() if key[0] == 0}

    alone = run(EngineLimits(400, 16, 200, 16, num_pages=100), [])
    together = run(EngineLimits(400, 16, budget, page_size, num_pages=2000 // page_size), others)
    assert alone.keys() == together.keys()
    assert all(torch.equal(row, together[key]) for key, row in alone.items())


@pytest.mark.parametrize("scores", [Scores.SIGMOID, Scores.SIGMOID_OF_CHOSEN])
def test_a_gate_gives_a_row_the_same_bits_in_any_place(scores: Scores) -> None:
    """Also with a number of experts that fills no vectors."""
    ffn = replace(small_spec("minimax_m2", num_local_experts=13).moe, gate=Gate(scores))
    logits = torch.randn(800, 13, generator=torch.Generator().manual_seed(1))
    whole = choose(logits, ffn, None)[0]
    tiles = torch.cat([choose(tile, ffn, None)[0] for tile in logits.split(ROWS)])
    assert torch.equal(whole, tiles)


def test_a_step_has_operations_of_the_layers_that_mix_experts_alone() -> None:
    spec = small_spec("qwen3_moe", mlp_only_layers=[0, 2])
    assert (len(spec.layers), spec.moe_layers, spec.mixtures) == (3, 1, (1,))
    exchange = SoloExchange(spec.moe.experts)
    runner = solo_runner(spec, exchange=exchange)
    runner.add(assign(0, PROMPT[:9], max_tokens=1))
    drain(runner)
    assert exchange.operations == 2
    assert [sum(row) for row in runner.load.take()] == [9 * spec.moe.top_k]


WITH_DENSE = [
    small_spec("qwen3_moe", mlp_only_layers=[1]),
    small_spec("deepseek_v3", first_k_dense_replace=1),
]


@pytest.mark.parametrize("spec", WITH_DENSE, ids=lambda spec: spec.family)
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_step_that_raised_in_any_layer_is_completed(spec: ModelSpec, broken: int) -> None:
    """Its peers get all the operations that they count on, and none twice."""
    exchange = SoloExchange(spec.moe.experts)
    runner = solo_runner(spec, exchange=exchange)
    runner.add(assign(0, PROMPT[:9], max_tokens=1))
    ops = runner._ops
    whole, left = ops.attend, [broken]

    def attend(queries: torch.Tensor, layer: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if [index] == left:
            left.clear()
            raise FloatingPointError("broken here")
        return whole(queries, layer, index)

    with mock.patch.object(ops, "attend", attend):
        runner.run_step(0, schedule=True)
    assert exchange.operations == 2 * sum(isinstance(layer.ffn, Moe) for layer in spec.layers)
