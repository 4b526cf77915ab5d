"""Dispatch and combine alone, layer after layer in one CUDA graph: peers' memory beside Mooncake EP, in turns.

    python -m bench.gpu_exchange [--ranks 4] [--mps] [--tokens 64 1024] [--out bench/results/gpu_exchange.json]

Rows of 2048, the top 8 of 128 experts, which give back what they get. Each rank is a process, on GPU rank modulo their
number. Every sum is compared with the exact one; the wall time of a step from its begin to its end is divided by layers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tests.kit.bound import tied
from tests.kit.file_store import FileStore
from tests.kit.served import write_result

from bench.kit.command_line import command_line
from bench.kit.sections import gpu, quartiles
from elastic_ep.exchange.base import ExchangeShape, Work
from elastic_ep.exchange.device import BufferExchange
from elastic_ep.exchange.mooncake import MooncakeExchange
from elastic_ep.exchange.peer_memory import PeerMemoryExchange
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.host.mps import mps_daemon
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Member

KINDS: dict[str, type[BufferExchange]] = {"mooncake": MooncakeExchange, "peer_memory": PeerMemoryExchange}
LAYERS, HIDDEN, TOP_K, EXPERTS = 24, 2048, 8, 128
EAGER, STEPS = 4, 40
DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    kind: str
    ranks: int
    tokens: int
    """Of each rank."""


def rank_main(case: Case, rank: int, place: str, pipe: Connection) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    shape = ExchangeShape(case.ranks, case.tokens, HIDDEN, TOP_K, EXPERTS // case.ranks, 2 * LAYERS)
    exchange = KINDS[case.kind](
        shape,
        Member(rank, 0),
        FileStore(Path(place)),
        barrier=StepBarrier(Path(place), case.ranks, rank),
        timeout_ms=20_000,
        connect_timeout_ms=USUAL.store_get_ms,
    )
    generator = torch.Generator(device).manual_seed(rank)
    x = torch.randn(case.tokens, HIDDEN, device=device, generator=generator).bfloat16()
    chosen = torch.rand(case.tokens, EXPERTS, device=device, generator=generator).topk(TOP_K).indices
    weights = torch.rand(case.tokens, TOP_K, device=device, generator=generator)
    weights /= weights.sum(dim=1, keepdim=True)

    def body() -> torch.Tensor:
        y = x
        for _ in range(LAYERS):
            y = exchange.combine(exchange.dispatch(y, chosen).packed, weights)
        return y

    def step(number: int, run: Any) -> float:
        began = time.perf_counter()
        exchange.begin_step(number)
        exchange.meet(Work(0, 0))
        run()
        exchange.read_masks()
        lost = exchange.end_step()
        assert not lost, lost
        return (time.perf_counter() - began) * 1e6 / LAYERS

    step(-1, body)  # alone: compiles
    others = [Member(other, 0) for other in range(case.ranks) if other != rank]
    for member in others:
        exchange.connect(member)
    pipe.send("connected")
    pipe.recv()
    for member in others:
        exchange.activate(member)
    for number in range(EAGER):
        step(number, body)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        y = body()
    taken = [step(EAGER + number, graph.replay) for number in range(STEPS)]
    pipe.send((taken, bool(torch.equal(y.float(), expected(x, weights)))))
    pipe.recv()
    os._exit(0)  # what peers have mapped goes when they have gone


def expected(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of experts that give back what they get."""
    y = x.float()
    for _ in range(LAYERS):
        total = torch.zeros_like(y)
        for k in range(TOP_K):
            total += weights[:, k, None] * y
        y = total.bfloat16().float()
    return y


def measure(case: Case, environment: dict[str, str]) -> dict[str, Any]:
    os.environ.update(environment)
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="exchange-") as place, ExitStack() as stack:
        pipes = []
        for rank in range(case.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=tied, args=(rank_main, case, rank, place, theirs))
            process.start()
            stack.callback(process.kill)
            pipes.append(ours)
        heard(pipes)
        tell(pipes)
        results = heard(pipes)
        tell(pipes)
    return {
        "layer_us": quartiles([one for taken, _ in results for one in taken], 1),
        "exact": all(exact for _, exact in results),
    }


def heard(pipes: Sequence[Connection]) -> list[Any]:
    """Raises RuntimeError if a rank says nothing in time, and EOFError if it is gone."""
    answers = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(DEADLINE_S):
            raise RuntimeError(f"rank {rank} says nothing for {DEADLINE_S:g} s")
        answers.append(pipe.recv())
    return answers


def tell(pipes: Sequence[Connection]) -> None:
    for pipe in pipes:
        pipe.send(None)


def main() -> None:
    parser = command_line(__doc__, "gpu_exchange", ranks=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--mps", action="store_true")
    options: argparse.Namespace = parser.parse_args()
    rows = []
    with ExitStack() as stack:
        environment = dict(stack.enter_context(mps_daemon())) if options.mps else {}
        for tokens in options.tokens:
            row: dict[str, Any] = {"tokens": tokens}
            for kind in KINDS:
                row[kind] = measure(Case(kind, options.ranks, tokens), environment)
            medians = [row[kind]["layer_us"]["median"] for kind in KINDS]
            row["peer_memory_of_mooncake"] = round(medians[1] / medians[0], 3)
            print(row, flush=True)
            rows.append(row)
    write_result(options.out, {"gpu": gpu(), "ranks": options.ranks, "mps": options.mps, "rows": rows})


if __name__ == "__main__":
    main()
