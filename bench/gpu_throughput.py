"""Decode throughput of one rank on one GPU, beside transformers' continuous batching and what reading weights costs.

Both sides have the same random bfloat16 weights of Qwen3-30B-A3B's layers (`--layers` of them, its vocabulary) and the
same prompts, and are counted alike: the tokens a second while all requests decode, from when the last one has begun
until the first one ends. transformers' best counts, of its implementations of experts, with and without CUDA graphs;
`generate` with one fixed batch stands beside it.

The roofline is the time in which the weights that a step needs could be copied: everything dense, and the experts
that its tokens hit, counted on the device in steps after the measured ones.

"idle_share" is the share of a step in which the device does not run the step's graph: its wall time, against that of
the same graph replayed without a pause. The copies of a step's inputs and results count as idle.

    python -m bench.gpu_throughput [--layers 24] [--out bench/results/gpu_throughput.json]
    TRITON_INTERPRET=1 python -m bench.gpu_throughput --smoke --out /tmp/throughput.json    # tries the script itself
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.kit.shapes import QWEN3_30B

from bench.kit import transformers_side
from bench.kit.command_line import command_line
from bench.kit.decode import BF16, Engine, full_rate, weight_bytes
from bench.kit.sections import Rows, Sections
from elastic_ep.config import EngineLimits
from elastic_ep.models import qwen3_moe
from elastic_ep.models.decoder_config import DecoderConfig
from elastic_ep.models.registry import load_spec
from elastic_ep.placement import launch_placement
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.weights.bank import Weights, dummy_source, load_weights

TINY = replace(
    QWEN3_30B,
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)
SEED = 0


@dataclass(frozen=True, slots=True)
class Plan:
    device: torch.device
    config: DecoderConfig
    batches: tuple[int, ...]
    prompt: int
    new: int
    steps: int
    max_tokens: int
    """Of a step."""
    tile: dict[str, Any]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Plan:
        if options.smoke:
            tile = {"tile": 4, "graphs": False}
            return cls(torch.device("cpu"), TINY, (1, 2), 6, 6, 2, 16, tile)
        config = replace(QWEN3_30B, num_hidden_layers=options.layers, vocab_size=options.vocabulary)
        batches = tuple(options.batches)
        return cls(torch.device("cuda", 0), config, batches, options.prompt, options.new, 100, 256, {})

    @property
    def limits(self) -> EngineLimits:
        """Room for all prompts to be computed, `new` tokens each, and the steps that are measured after."""
        length = self.prompt + self.new + 2 * self.steps + 64
        pages = max(self.batches) * -(-length // 16)
        return EngineLimits(
            max_model_len=length,
            max_num_seqs=max(self.batches),
            max_num_batched_tokens=max(self.max_tokens, *self.batches),
            num_pages=pages,
        )

    def prompts(self, batch: int, vocabulary: int) -> list[list[int]]:
        random_ = random.Random(batch)
        return [[random_.randrange(vocabulary) for _ in range(self.prompt)] for _ in range(batch)]


class Bench:
    def __init__(self, plan: Plan, sections: Sections, scratch: Path | None) -> None:
        self._plan = plan
        self._sections = sections
        self._scratch = scratch
        """For the exchange; None: in plain torch."""
        self._copy_tb_s = float("nan")
        self._first: dict[int, list[list[int]]] = {}
        self._rates: dict[int, dict[str, float]] = {batch: {} for batch in plan.batches}

    def run(self) -> None:
        run = self._sections.run
        if self._plan.device.type == "cuda":
            torch.cuda.set_device(self._plan.device)
            run("copy_tb_s", self._copy, 60)
        run("ours", self._ours, 150)
        self._free()
        run("bundled", self._bundled, 120)
        self._free()
        run("transformers", self._transformers, 240)
        self._sections.result["compared"] = self.compared()
        self._sections.write()

    def _free(self) -> None:
        gc.collect()
        if self._plan.device.type == "cuda":
            torch.cuda.empty_cache()
            print(f"           {torch.cuda.memory_allocated() / 2**30:.1f} GiB still allocated", flush=True)

    def _copy(self) -> float:
        from bench.kit.kernel_timing import measure_limits

        with torch.device(self._plan.device):
            self._copy_tb_s = measure_limits(10)["copy_tb_s"]
        self._free()
        return round(self._copy_tb_s, 3)

    def _engine(self, weights: Weights, name: str) -> Engine:
        directory = None
        if self._scratch is not None:
            directory = self._scratch / name
            directory.mkdir()
        if self._plan.device.type == "cuda":  # one that a graph may be captured on
            torch.cuda.synchronize()  # what was made on the stream before is used on this one
            torch.cuda.set_stream(torch.cuda.Stream(self._plan.device))
        return Engine(weights, self._plan.limits, directory, **self._plan.tile)

    def _bundled(self) -> list[dict[str, Any]]:
        """The model that comes with this project: small, so that what the host does is hardest to hide."""
        plan, spec = self._plan, load_spec(BUNDLED_MODEL)
        placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
        weights = load_weights(BUNDLED_MODEL, spec, placement, 0, device=plan.device, dtype=BF16)
        engine = self._engine(weights, "bundled")
        rows = self._rows_of_batches("bundled")
        try:
            for batch in plan.batches:
                rows.add(engine.steady(plan.prompts(batch, spec.vocab_size), plan.steps))
        finally:
            engine.close()
        return rows.measured

    def _ours(self) -> list[dict[str, Any]]:
        plan, spec = self._plan, qwen3_moe.spec(self._plan.config)
        placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
        weights = Weights(spec, placement, 0, dummy_source(spec, SEED, plan.device), plan.device, BF16)
        engine = self._engine(weights, "ours")
        rows = self._rows_of_batches("ours")
        try:
            for batch in plan.batches:
                prompts = plan.prompts(batch, spec.vocab_size)
                stamps, self._first[batch] = engine.decode(prompts, plan.new)
                rate = self._rates[batch]["ours"] = full_rate(stamps)
                row = engine.steady(prompts, plan.steps)
                moved = weight_bytes(weights, row["experts_hit_a_step"])
                roofline = self._copy_tb_s * 1e12 / moved * batch
                row |= {
                    "tokens_per_s": round(rate, 1),
                    "weights_gb_a_step": round(moved / 1e9, 3),
                    "roofline_tokens_per_s": round(roofline, 1),
                    "roofline_share": round(rate / roofline, 4),
                }
                self._rates[batch]["roofline"] = roofline
                rows.add(row)
        finally:
            engine.close()
        return rows.measured

    def _rows_of_batches(self, name: str) -> Rows:
        return self._sections.rows(name, [{"batch": batch} for batch in self._plan.batches])

    def _transformers(self) -> list[dict[str, Any]]:
        plan, config = self._plan, self._plan.config
        model = transformers_side.build(
            config, dummy_source(qwen3_moe.spec(config), SEED, plan.device), plan.device
        )
        candidates = [(name, call, batch) for name, call, some in self._candidates(model) for batch in some]
        planned = [{"batch": batch, "how": name} for name, _, batch in candidates]
        rows = self._sections.rows("transformers", planned)
        for name, call, batch in candidates:
            row: dict[str, Any] = {"batch": batch, "how": name}
            try:
                prompts = plan.prompts(batch, config.vocab_size)
                call(prompts, min(4, plan.new))
                stamps, tokens = call(prompts, plan.new)
                row["tokens_per_s"] = round(full_rate(stamps), 1)
                row["same_first_token"] = self._same(batch, tokens)
                kind = name.split()[0]
                self._rates[batch][kind] = max(row["tokens_per_s"], self._rates[batch].get(kind, 0.0))
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.add(row)
        return rows.measured

    def _candidates(self, model: Any) -> list[tuple[str, Any, Sequence[int]]]:
        """Name, call and batches. What might leave the device in a bad way, capturing graphs, comes last."""
        continuous = partial(transformers_side.continuous, model)
        every = self._plan.batches
        # "batched_mm" copies the weights for every pair of token and expert: worth a try for a token at a time.
        return [
            ("continuous grouped_mm", partial(continuous, experts="grouped_mm", graphs=None), every),
            ("static grouped_mm", partial(transformers_side.static, model, experts="grouped_mm"), every),
            ("continuous batched_mm", partial(continuous, experts="batched_mm", graphs=None), every[:1]),
            ("continuous grouped_mm graphs", partial(continuous, experts="grouped_mm", graphs=True), every),
            (
                "continuous batched_mm graphs",
                partial(continuous, experts="batched_mm", graphs=True),
                every[:1],
            ),
        ]

    def _same(self, batch: int, tokens: list[list[int]]) -> float | None:
        """The share of requests whose first token is ours too: both sides compute the same model."""
        if batch not in self._first:
            return None
        pairs = list(zip(self._first[batch], tokens, strict=True))
        return round(sum(ours[0] == theirs[0] for ours, theirs in pairs) / len(pairs), 3)

    def compared(self) -> list[dict[str, Any]]:
        rows = []
        for batch, rates in self._rates.items():
            row: dict[str, Any] = {
                "batch": batch,
                **{name: round(rate, 1) for name, rate in rates.items()},
            }
            for name in ("continuous", "static", "roofline"):
                if "ours" in rates and name in rates:
                    row[f"ours_over_{name}"] = round(rates["ours"] / rates[name], 3)
            rows.append(row)
            print(row, flush=True)
        return rows


def main() -> None:
    parser = command_line(__doc__, "gpu_throughput")
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--vocabulary", type=int, default=QWEN3_30B.vocab_size)
    add("--batches", type=int, nargs="+", default=[1, 16, 64])
    add("--prompt", type=int, default=128, help="tokens")
    add(
        "--new",
        type=int,
        default=192,
        help="tokens a request: prompts that come in turn leave 128 steps for all",
    )
    add("--smoke", action="store_true", help="tiny, on the processor")
    add("--commit", help="noted in the result where there is no git")
    options = parser.parse_args()
    plan = Plan.of(options)
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        exchange = "plain torch" if options.smoke else "peer memory"
        sections = Sections(options.out, options.commit, exchange=exchange)
        Bench(plan, sections, None if options.smoke else Path(name)).run()
    if sections.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
