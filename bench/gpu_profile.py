"""Where the time of a step goes on one GPU: the profiler's kernels by what they belong to, and the rest, which is idle.

One rank with all experts, random bfloat16 weights of Qwen3-30B-A3B's layers. For each batch, steps in which all sequences
decode; then one prompt, in steps of `--chunk` tokens; then chunks of a prompt beside long sequences that decode. "idle"
is wall time in which no kernel ran, as the profiler saw it: it slows the host down, so bench.gpu_throughput says how long
steps take, and this only what they consist of.

    python -m bench.gpu_profile [--layers 24] [--batches 1 16 64 256] [--out bench/results/gpu_profile.json]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.kit.shapes import QWEN3_30B
from torch.profiler import ProfilerActivity, profile

from bench.kit.command_line import command_line
from bench.kit.decode import BF16, Engine
from bench.kit.sections import Sections
from elastic_ep.config import EngineLimits
from elastic_ep.machines.requests.records import HORIZON
from elastic_ep.models import qwen3_moe
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights, dummy_source
from elastic_ep.wire.messages import Assign, SamplingParams

STEPS = 20
BESIDE, LONG = 8, 4096
"""Sequences that decode beside a prompt, and the length of theirs."""
PARTS = {
    "experts": ("_experts_kernel",),
    "attention": ("_decode_kernel", "_merge_group", "_prefill_kernel"),
    "dense products": ("_dense_kernel",),
    "gate": ("_gate_kernel",),
    "norms, rotary, cache": ("_add_norm_kernel", "_norm_rope_kernel"),
    "exchange": ("_send_kernel", "_arrive_kernel", "_ready_kernel", "_done_kernel", "_fetch_kernel"),
}
"""Names of kernels begin so. What is none of these counts as "other"."""


def part_of(kernel: str) -> str:
    return next((part for part, names in PARTS.items() if kernel.startswith(names)), "other")


def profiled(run: Callable[[], int]) -> dict[str, Any]:
    """`run` returns how many steps it made. Milliseconds a step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        steps = run()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - began) * 1000
    parts: Counter[str] = Counter()
    other: Counter[str] = Counter()
    launched = 0
    for event in seen.key_averages():
        took_ms = event.self_device_time_total / 1000
        part = part_of(event.key)
        parts[part] += took_ms
        launched += event.count
        if part == "other":
            other[event.key[:60]] += took_ms
    busy_ms = sum(parts.values())
    return {
        "steps": steps,
        "wall_ms": round(wall_ms / steps, 4),
        "kernels_ms": round(busy_ms / steps, 4),
        "idle_ms": round((wall_ms - busy_ms) / steps, 4),
        "kernels": round(launched / steps, 1),
        "parts_ms": {part: round(ms / steps, 4) for part, ms in parts.most_common()},
        "most_of_other_ms": {name: round(ms / steps, 4) for name, ms in other.most_common(5)},
    }


def measure(options: Any, sections: Sections, directory: Path) -> None:
    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    config = replace(QWEN3_30B, num_hidden_layers=options.layers)
    spec = qwen3_moe.spec(config)
    length = max(2 * options.chunk, LONG + 200)
    most = max(options.batches)
    limits = EngineLimits(
        max_model_len=length,
        max_num_seqs=most,
        max_num_batched_tokens=max(options.chunk, most),
        num_pages=(most * (options.prompt + 2 * HORIZON) + 2 * BESIDE * (length + HORIZON)) // 16,
    )
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    weights = Weights(spec, placement, 0, dummy_source(spec, 0, device), device, BF16)
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream(device))
    engine = Engine(weights, limits, directory)

    def prompts(count: int, length: int) -> list[list[int]]:
        dice = random.Random(count)
        return [[dice.randrange(spec.vocab_size) for _ in range(length)] for _ in range(count)]

    def decodes(batch: int) -> dict[str, Any]:
        with engine.decoding(prompts(batch, options.prompt)) as step:

            def run() -> int:
                for _ in range(STEPS):
                    step()
                return STEPS

            return profiled(run)

    def one_prompt() -> dict[str, Any]:
        tokens = prompts(1, options.chunk)
        engine.decode(tokens, 1)  # what is compiled or captured at first use
        (other,) = prompts(2, options.chunk)[1:]  # nothing of it is in the cache
        before = engine.steps

        def run() -> int:
            engine.decode([other], 1)
            return engine.steps - before

        return profiled(run)

    def chunks_beside() -> dict[str, Any]:
        """Half of `--chunk` tokens in each step."""
        runner = engine.runner
        with (
            engine.decoding(prompts(BESIDE, LONG)),
            mock.patch.object(runner, "_prompt_tokens", return_value=options.chunk // 2),
        ):
            params = SamplingParams(max_tokens=1, ignore_eos=True)
            for number, tokens in enumerate(prompts(-(-STEPS * options.chunk // (2 * LONG)) + 1, LONG)):
                runner.add(Assign(BESIDE + number, tuple(tokens), (), params, 0, 0))
            engine.step()

            def run() -> int:
                for _ in range(STEPS):
                    engine.step()
                return STEPS

            try:
                return profiled(run)
            finally:
                for request in runner.held:
                    runner.cancel(request)

    try:
        for batch in options.batches:
            sections.run(f"decode, {batch} sequences", lambda batch=batch: decodes(batch), 60)  # type: ignore[misc]  # bound now
        sections.run(f"a prompt of {options.chunk} tokens", one_prompt, 60)
        half = options.chunk // 2
        sections.run(f"{half} tokens beside {BESIDE} decodes after {LONG}", chunks_beside, 60)
    finally:
        engine.close()


def main() -> None:
    parser = command_line(__doc__, "gpu_profile")
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    add("--prompt", type=int, default=128, help="tokens, of each sequence that decodes")
    add("--chunk", type=int, default=2048, help="tokens, of the one prompt and of a step")
    add("--commit", help="noted in the result where there is no git")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        sections = Sections(options.out, options.commit, layers=options.layers)
        measure(options, sections, Path(name))
    if sections.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
