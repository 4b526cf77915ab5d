"""The engine in kernels against the engine in plain torch, and what must not change a bit.

On a processor there are no graphs: what a graph captures, the step's body, is what runs here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.ops_cuda.memory import Share, needed_by_graphs
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.guided import grammars
from elastic_ep.models import mixtral, olmoe, qwen3_moe
from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.quantisation import quantised
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights, dummy_source
from elastic_ep.wire.messages import Token
from tests.engine import test_invariance
from tests.engine.cuda.conftest import INTERPRETED
from tests.engine.cuda.solo import SMALL, Logits, cuda_runner, recorded
from tests.engine.guided import END, mask_maker, opened, text
from tests.engine.solo import TINY, TINY_CONFIG, SoloExchange, assign, drain, ids
from tests.kit.solo_exchange import SoloDeviceExchange
from tests.models.small import OWN, small_spec

# The interpreter computes padding too, whose memory holds anything: numpy would warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LIMITS = EngineLimits(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=24, num_pages=40)
PROMPT = [(7 * i * i + 3 * i + 5) % 200 for i in range(27)]
SHORT = [11, 4, 150]
NEW = 4


FAMILIES = {
    TINY.family: TINY,
    "mixtral": mixtral.spec(replace(TINY_CONFIG, num_hidden_layers=1)),
    "olmoe": olmoe.spec(replace(TINY_CONFIG, num_hidden_layers=1), clip_qkv=0.05),
}
ON_A_GPU = {name: small_spec(name) for name in sorted(OWN.keys() - FAMILIES.keys())} | {
    "kimi_k2": small_spec("deepseek_v3", model_type="kimi_k2", n_group=1, topk_group=1)
}
"""The interpreter would take too long: there tests/engine/test_cuda_ops.py does."""
if not INTERPRETED:
    FAMILIES |= ON_A_GPU


def on_processor(*, round_to: torch.dtype, spec: ModelSpec) -> tuple[Logits, dict[int, list[Token]]]:
    """The same requests through the engine of engine/ops_cpu/runner.py, in float32, with weights rounded to a dtype."""
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    source = dummy_source(spec, 0)
    weights = Weights(spec, placement, 0, lambda name: source(name).to(round_to).float(), torch.device("cpu"))
    runner = ModelRunner(LIMITS, weights, placement, 0, SoloExchange(spec.moe.experts))
    runner.add(assign(1, PROMPT, max_tokens=NEW))
    runner.add(assign(2, SHORT, max_tokens=NEW))
    with test_invariance.recorded_logits() as seen:
        return seen, drain(runner)


ROUNDED = {"gpt_oss": 0.2, "llama4_text": 0.2}
"""0.15 was seen on an H200. Their float32 agrees to 2e-5, so it is taken for near-ties of the gate, as tokens of these
small models go to one expert or to few; which tie it was has not been shown."""


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        *[(family, torch.float32, 2e-5) for family in sorted(FAMILIES)],
        *[
            (family, torch.bfloat16, ROUNDED.get(family, 4e-2))
            for family in (sorted(FAMILIES) if not INTERPRETED else [TINY.family])
        ],
    ],
)
def test_logits_are_those_of_the_processor(
    device: torch.device, dtype: torch.dtype, tolerance: float, family: str
) -> None:
    """Largest difference of a logit as a share of the largest logit."""
    spec = FAMILIES[family]
    expected, tokens = on_processor(round_to=dtype, spec=spec)
    runner, _ = cuda_runner(device, spec, dtype=dtype)
    runner.add(assign(1, PROMPT, max_tokens=NEW))
    runner.add(assign(2, SHORT, max_tokens=NEW))
    with recorded() as seen:
        got = drain(runner)
    # In bfloat16 a near-tie may fall to the other side; then all that follows is another text.
    same = {request: ids(tokens[request]) == ids(got[request]) for request in (1, 2)}
    assert dtype == torch.bfloat16 or all(same.values())
    for (request, known), row in seen.items():
        if same[request] or known == len(PROMPT if request == 1 else SHORT):
            wanted = expected[request, known]
            error = (row - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, f"request {request} after {known} tokens: {error:.1e}"


QWEN = qwen3_moe.spec(replace(TINY_CONFIG, num_hidden_layers=1, num_experts=2, moe_intermediate_size=24))
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 64]}
CODED = {
    "float 8": (QWEN, FP8, 2e-5),
    "float 8, rows too": (QWEN, FP8 | {"weight_block_size": [32, 128]}, 6e-2),
    "mxfp4": (small_spec("gpt_oss", intermediate_size=96), {"quant_method": "mxfp4"}, 2e-5),
}
"""Rows that become codes are not what the processor computes with."""


@pytest.mark.parametrize("name", CODED)
def test_experts_are_computed_from_their_codes(device: torch.device, name: str) -> None:
    plain, asked, tolerance = CODED[name]
    spec = quantised(plain, ConfigFields(Path("config.json"), {"quantization_config": asked}))
    expected, _ = on_processor(round_to=torch.float32, spec=spec)
    runner, _ = cuda_runner(device, spec)
    assert {"gate_up", "down"}.isdisjoint(runner.weights.mixture(0))
    runner.add(assign(2, SHORT, max_tokens=1))
    with recorded() as seen:
        drain(runner)
    assert len(seen) == 1
    for key, row in seen.items():
        error = (row - expected[key]).abs().max() / expected[key].abs().max()
        assert error < tolerance, error
        assert tolerance < 1e-3 or error > 1e-5, "no row was rounded to a code"


def test_a_greedy_step_fetches_the_tokens_that_the_logits_say(device: torch.device) -> None:
    runner, _ = cuda_runner(device)
    runner.add(assign(1, PROMPT, max_tokens=3))
    tokens = ids(drain(runner)[1])
    runner, _ = cuda_runner(device)
    runner.add(assign(1, PROMPT, max_tokens=3, logprobs=2))
    assert ids(drain(runner)[1]) == tokens


def test_neighbours_chunking_and_replay_change_no_bit(device: torch.device) -> None:
    runner, _ = cuda_runner(device, limits=replace(LIMITS, max_num_batched_tokens=40))
    runner.add(assign(1, PROMPT, max_tokens=NEW))
    with recorded() as alone:
        first = ids(drain(runner)[1])
    runner, _ = cuda_runner(device)
    runner.add(assign(7, SHORT, max_tokens=3))
    runner.run_step(0, schedule=True)
    runner.add(assign(1, PROMPT, first[:2], max_tokens=NEW))
    runner.add(assign(8, PROMPT[:20], max_tokens=3))
    with recorded() as seen:
        again = ids(drain(runner)[1])
    assert again == first[2:]
    compared = [key for key in seen if key[0] == 1]
    assert len(compared) == NEW - 2
    for key in compared:
        assert torch.equal(seen[key], alone[key]), key


def test_a_guided_text_beside_a_free_one(device: torch.device) -> None:
    """The second step is poisoned: its masks are computed again, too."""
    maker = mask_maker(beside=False)
    runner, exchange = cuda_runner(device, masks=maker)
    runner.add(assign(1, SHORT, ignore_eos=False, grammar=grammars.regex("[ab]2")))
    runner.add(assign(2, SHORT, max_tokens=2, temperature=1.0))
    opened(runner)
    seen: dict[int, list[int]] = {}
    for step in range(10):
        if not runner.has_work:
            break
        if step == 1:
            exchange.poison, exchange.garbage = frozenset({3}), True
        for token in runner.run_step(step, schedule=True).tokens:
            seen.setdefault(token.request_id, []).append(token.token)
    maker.close()
    assert re.fullmatch("[ab]2", text(seen[1]))
    assert (len(seen[1]), seen[1][-1], len(seen[2])) == (3, END, 2)


def run_through(
    runner_and_exchange: tuple[CudaRunner, SoloDeviceExchange], poisoned: set[int]
) -> dict[int, list[int]]:
    runner, exchange = runner_and_exchange
    runner.add(assign(1, PROMPT, max_tokens=4))
    runner.add(assign(2, SHORT, max_tokens=4))
    tokens: dict[int, list[int]] = {}
    for step in range(40):
        if not runner.has_work:
            return tokens
        if step in poisoned:
            exchange.poison, exchange.garbage = frozenset({3}), True
        result = runner.run_step(step, schedule=True)
        assert result.masked == (frozenset({3}) if step in poisoned else frozenset())
        assert not (result.masked and result.tokens)
        for token in result.tokens:
            tokens.setdefault(token.request_id, []).append(token.token)
    raise AssertionError("not done")


@functools.cache
def undisturbed(device: torch.device) -> dict[int, list[int]]:
    return run_through(cuda_runner(device), set())


def test_poisoned_steps_run_again(device: torch.device) -> None:
    """NaN from a poisoned step reaches no later one."""
    assert run_through(cuda_runner(device), {0, 2, 3, 5}) == undisturbed(device)


def test_every_step_performs_the_same_operations(device: torch.device) -> None:
    runner, exchange = cuda_runner(device)
    counts = []
    for step in range(4):
        if step == 1:
            runner.add(assign(1, PROMPT[:26], max_tokens=1))
        before = exchange.operations
        runner.run_step(step, schedule=step != 0)
        counts.append(exchange.operations - before)
    assert counts == [2 * SMALL.moe_layers] * 4


def test_warm_up_leaves_no_trace(device: torch.device) -> None:
    expected = undisturbed(device)
    warm = cuda_runner(device)
    warm[0].warm_up()
    assert not any(map(any, warm[0].load.take())), "its rows are nobody's"
    assert run_through(warm, set()) == expected
    assert sum(map(sum, warm[0].load.take())) > 0


class Sized:
    """A budget with room for `room` pages when the steps have been seen."""

    share = Share(0.9, 1)

    def __init__(self, room: int) -> None:
        self.room = room
        self.later = 0
        self.kept = nullcontext

    def pages(self, later: int) -> int:
        self.later = later
        return self.room


def test_the_kv_cache_is_as_large_as_memory_lets_it(device: torch.device) -> None:
    """Graphs come afterwards: they know where it is."""
    plain, _ = cuda_runner(device)
    plain.add(assign(2, SHORT, max_tokens=2))
    expected = ids(drain(plain)[2])
    budget = Sized(LIMITS.num_pages)
    least = replace(LIMITS, num_pages=LIMITS.sequence_pages)
    runner, _ = cuda_runner(device, limits=least, graphs=not INTERPRETED, budget=cast(Any, budget))
    before = runner._ops.caches.data_ptr()
    # What is captured may not be on the default stream.
    with nullcontext() if INTERPRETED else torch.cuda.stream(torch.cuda.Stream(device)):
        runner.warm_up()
    assert runner.num_pages == LIMITS.num_pages
    assert runner._scheduler.pages.num_pages == LIMITS.num_pages
    assert runner._ops.caches.shape[2] == LIMITS.cache_pages
    assert runner._ops.caches.data_ptr() != before
    assert budget.later >= needed_by_graphs(0)
    runner.add(assign(2, SHORT, max_tokens=2))
    assert ids(drain(runner)[2]) == expected


def test_rows_that_the_experts_had_are_counted(device: torch.device) -> None:
    runner, _ = cuda_runner(device)
    runner.add(assign(1, PROMPT, max_tokens=1))
    drain(runner)
    assert [sum(row) for row in runner.load.take()] == [len(PROMPT) * SMALL.moe.top_k] * SMALL.moe_layers
    assert not any(map(any, runner.load.take()))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")
def test_graphs_give_the_bits_of_eager_steps(device: torch.device) -> None:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.bfloat16):
            eager, captured = cuda_runner(device, dtype=dtype), cuda_runner(device, dtype=dtype, graphs=True)
            captured[0].warm_up()
            logits = []
            for runner, _ in (eager, captured):
                runner.add(assign(1, PROMPT, max_tokens=NEW))
                runner.add(assign(2, SHORT, max_tokens=NEW))
                with recorded() as seen:
                    drain(runner)
                logits.append(seen)
            assert logits[0].keys() == logits[1].keys()
            assert all(torch.equal(row, logits[1][key]) for key, row in logits[0].items())


def test_hosts_meet_once_a_step_and_before_its_first_operation(device: torch.device) -> None:
    runner, exchange = cuda_runner(device)
    calls: list[str] = []

    def told(name: str) -> Callable[..., Any]:
        method = getattr(exchange, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return method(*arguments)

        return call

    for name in ("begin_step", "meet", "dispatch", "end_step"):
        setattr(exchange, name, told(name))
    runner.add(assign(1, SHORT, max_tokens=1))
    runner.run_step(0, schedule=True)
    assert calls[:3] == ["begin_step", "meet", "dispatch"]
    assert calls.count("meet") == 1


def test_prompts_are_cut_as_the_pace_of_the_group_says(device: torch.device) -> None:
    """It hears what all ranks did in each step that counts, and is asked while there are prompts."""
    runner, exchange = cuda_runner(device)
    told: list[tuple[int, int]] = []
    asked: list[int] = []

    class Pace:
        def observe(self, tokens: int, decodes: int, duration: int) -> None:
            assert duration > 0
            told.append((tokens, decodes))

        def budget(self, decodes: int) -> int:
            asked.append(decodes)
            return 10 if decodes else 24

    runner._pace = cast(Any, Pace())
    runner.add(assign(1, SHORT, max_tokens=6))
    runner.run_step(0, schedule=True)
    runner.run_step(1, schedule=True)
    runner.add(assign(2, PROMPT[:15], max_tokens=2))
    exchange.poison = frozenset({1})
    for step in range(2, 7):
        runner.run_step(step, schedule=True)
    assert told == [(3, 0), (0, 1), (10, 1), (5, 1), (0, 2), (0, 1)]
    assert asked == [0, 1, 1]


PLACES = ["before 1", "sampled"]
if not INTERPRETED:  # where each takes half a minute
    PLACES += ["fill", "draws", "before 0", "before 2", "before 3"]


def break_requests(runner: CudaRunner, bad: frozenset[int], place: str) -> None:
    """From now on a step with one of them in it raises at `place`: "before n" is an operation of the exchange."""
    what, _, operation = place.partition(" ")
    in_batch = False
    patched: Any = runner

    def breaks(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            nonlocal in_batch
            if in_batch:
                in_batch = False
                raise RuntimeError(place)
            return function(*arguments)

        setattr(owner, name, call)

    shape_of = runner._inputs.shape_of

    def watch(chunks: Any) -> Any:
        nonlocal in_batch
        in_batch = any(chunk.sequence.request_id in bad for chunk in chunks)
        return shape_of(chunks)

    patched._inputs.shape_of = watch
    carrier = patched._carrier

    class Breaking:
        def __getattr__(self, name: str) -> Any:
            nonlocal in_batch
            if in_batch and carrier._performed == int(operation):
                in_batch = False
                raise RuntimeError(place)
            return getattr(carrier, name)

    match what:
        case "fill":
            breaks(patched._inputs, "fill")
        case "draws":
            breaks(patched._device_exchange, "read_masks")
        case "sampled":
            breaks(patched, "_sample")
        case _:
            patched._carrier = Breaking()


@pytest.mark.parametrize("place", PLACES)
def test_a_request_that_makes_a_step_raise_fails_alone(device: torch.device, place: str) -> None:
    """Whatever the step has done by then, its operations are completed, and the other texts are the same."""
    expected = undisturbed(device)
    runner, exchange = cuda_runner(device)
    break_requests(runner, frozenset({7}), place)
    runner.add(assign(1, PROMPT, max_tokens=4))
    runner.add(assign(7, SHORT[:2], max_tokens=4))
    runner.add(assign(2, SHORT, max_tokens=4))
    tokens: dict[int, list[int]] = {}
    failed: dict[int, str] = {}
    for step in range(40):
        if not runner.has_work:
            break
        before = exchange.operations
        result = runner.run_step(step, schedule=True)
        assert exchange.operations - before == 2 * len(SMALL.layers)
        failed |= dict(result.failed)
        for token in result.tokens:
            tokens.setdefault(token.request_id, []).append(token.token)
    assert not runner.has_work
    assert tokens == expected
    assert failed.keys() == {7}
