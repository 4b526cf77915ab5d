"""The sampler on the processor and on the device, beside each other: what a step's tokens cost with a large vocabulary.

    python -m bench.sampler [--device cuda] [--vocabulary 151936] [--out bench/results/sampler.json]

A draw on the device counts from its launch to its end; on the processor the logits are there already.
"""

from __future__ import annotations

from typing import Any

import torch
from tests.kit.served import median_ms, write_result

from bench.kit.command_line import command_line
from elastic_ep.engine.ops_cuda.draws import Draws
from elastic_ep.engine.sampler import sample
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.wire.messages import SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k and top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "logprobs": {"logprobs": 5},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.5},
}


def main() -> None:
    parser = command_line(__doc__, "sampler")
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--vocabulary", type=int, default=151936)
    add("--sequences", type=int, nargs="+", default=[1, 16, 64])
    add("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    for count in options.sequences:
        logits = torch.randn(count, options.vocabulary, generator=torch.Generator().manual_seed(0)) * 3
        there = logits.to(device)
        for name, fields in KINDS.items():
            params = SamplingParams(max_tokens=100, **fields)
            batch = [Sequence(i, list(range(50 + i)), 20, params, i, 0) for i in range(count)]

            def on_device(batch: list[Sequence] = batch, there: torch.Tensor = there) -> list[int]:
                drawn = Draws(batch, device).run(there).to_host()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                return [one.token for one in drawn.sampled(batch)]

            def on_processor(batch: list[Sequence] = batch, logits: torch.Tensor = logits) -> list[int]:
                return [one.token for one in sample(logits, batch)]

            row = {
                "sequences": count,
                "kind": name,
                "processor_ms": median_ms(on_processor, options.repeats),
                "device_ms": median_ms(on_device, options.repeats),
                "same_tokens": on_device() == on_processor(),
            }
            rows.append(row)
            print(row, flush=True)
    write_result(options.out, {"device": str(device), "vocabulary": options.vocabulary, "rows": rows})


if __name__ == "__main__":
    main()
