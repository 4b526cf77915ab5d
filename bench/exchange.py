"""All-to-all between processes of one machine: the exchange against gloo and ZeroMQ, same bytes, same run.

Every rank sends `--rows` rows of `--hidden` float32 to each rank (itself included, as in all_to_all_single), and
the backends take turns, `--rounds` times. "dispatch" is the time inside dispatch; "pair / 2" half the wall time
of a dispatch and the combine that sends as many bytes back, which is what one all-to-all costs. "cpu" is the
processor time of all ranks together for one all-to-all, their helper threads included: it tells more than wall time
does when the machine has other work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq
from tests.kit.bound import tied
from tests.kit.served import write_result

from bench.kit.command_line import command_line
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.wire.messages import Member

Measured = dict[str, float]
Measure = Callable[[int], Measured]
"""Performs that many all-to-alls; seconds each, by name."""


def main() -> None:
    options = _options()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        shape = _shape(options)
        windows = Windows.create(shape)
        barrier, results = context.Barrier(options.ranks), context.Queue()
        ranks = [
            context.Process(
                target=tied,
                args=(_rank, rank, options, shape, windows, Path(folder), barrier, results),
                daemon=True,
            )
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        reports = [results.get(timeout=600) for _ in ranks]
        for process in ranks:
            process.join()
    _report(options, reports, load)


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, None, ranks=8)
    parser.add_argument("--rows", type=int, default=32, help="rows to each rank")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each backend in each round, about")
    return parser.parse_args()


def _shape(options: argparse.Namespace) -> ExchangeShape:
    return ExchangeShape(
        num_ranks=options.ranks,
        max_tokens=options.rows * options.ranks,
        hidden=options.hidden,
        top_k=1,
        slots_per_rank=1,
        operations_per_step=2,
    )


def _rank(
    rank: int,
    options: argparse.Namespace,
    shape: ExchangeShape,
    windows: int,
    folder: Path,
    barrier: Barrier,
    results: Queue[dict[str, list[Measured]]],
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    data = torch.empty(options.ranks, options.rows, options.hidden)
    for peer in range(options.ranks):
        data[peer] = rank * options.ranks + peer
    backends: dict[str, Measure] = {
        "elastic_ep": _elastic_ep(rank, shape, windows, data),
        "zeromq": _zeromq(rank, options.ranks, folder, data, barrier),
        "gloo": _gloo(rank, options.ranks, folder, data),
    }
    measured: dict[str, list[Measured]] = {name: [] for name in backends}
    for name, backend in backends.items():
        backend(3)
        barrier.wait()
        seconds = max(backend(20).values())
        # All ranks must agree on the count; rank 0's guess is as good as any.
        box = [max(20, int(options.seconds / seconds))]
        dist.broadcast_object_list(box, src=0)
        measured[name].append({"count": float(box[0])})
    for _ in range(options.rounds):
        for name, backend in backends.items():
            barrier.wait()
            count = int(measured[name][0]["count"])
            cpu = time.process_time()
            figures = backend(count)
            cpu = time.process_time() - cpu
            measured[name].append({**figures, "cpu": cpu / count / (2 if name == "elastic_ep" else 1)})
    results.put({name: rounds[1:] for name, rounds in measured.items()})
    barrier.wait()
    dist.destroy_process_group()


def _elastic_ep(rank: int, shape: ExchangeShape, windows: int, data: torch.Tensor) -> Measure:
    exchange = ShmExchange(windows, shape, Member(rank, 1))
    for peer in range(shape.num_ranks):
        exchange.activate(Member(peer, 1))
    x = data.view(-1, shape.hidden)
    experts = torch.arange(shape.num_ranks).repeat_interleave(shape.max_tokens // shape.num_ranks)[:, None]
    weights = torch.ones(shape.max_tokens, 1)
    step = 0

    def measure(count: int) -> Measured:
        nonlocal step
        inside = 0.0
        started = time.perf_counter()
        for _ in range(count):
            exchange.begin_step(step)
            dispatch_started = time.perf_counter()
            received = exchange.dispatch(x, experts)
            inside += time.perf_counter() - dispatch_started
            returned = exchange.combine(received.packed, weights)
            assert not exchange.end_step()
            step += 1
        seconds = time.perf_counter() - started
        _check(rank, received.packed.view(data.shape))
        assert torch.equal(returned, x)
        return {"dispatch": inside / count, "pair / 2": seconds / count / 2}

    return measure


def _zeromq(rank: int, ranks: int, folder: Path, data: torch.Tensor, barrier: Barrier) -> Measure:
    context = zmq.Context()
    incoming: list[zmq.Socket[bytes]] = []
    outgoing: list[zmq.Socket[bytes]] = []
    for peer in range(ranks):
        incoming.append(context.socket(zmq.PULL))
        incoming[peer].bind(f"ipc://{folder}/{peer}-{rank}")
    barrier.wait()
    for peer in range(ranks):
        outgoing.append(context.socket(zmq.PUSH))
        outgoing[peer].connect(f"ipc://{folder}/{rank}-{peer}")
    received = torch.empty_like(data)
    into = [received[peer].numpy().reshape(-1).data.cast("B") for peer in range(ranks)]
    parts = [data[peer].numpy().reshape(-1).data.cast("B") for peer in range(ranks)]
    order = [(rank + offset) % ranks for offset in range(1, ranks)]

    def measure(count: int) -> Measured:
        started = time.perf_counter()
        for _ in range(count):
            for peer in order:
                outgoing[peer].send(parts[peer])
            into[rank][:] = parts[rank]
            for peer in order:
                into[peer][:] = incoming[peer].recv()
        seconds = time.perf_counter() - started
        _check(rank, received)
        return {"all-to-all": seconds / count}

    return measure


def _gloo(rank: int, ranks: int, folder: Path, data: torch.Tensor) -> Measure:
    dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=ranks)
    received = torch.empty_like(data)

    def measure(count: int) -> Measured:
        started = time.perf_counter()
        for _ in range(count):
            dist.all_to_all_single(received, data)
        seconds = time.perf_counter() - started
        _check(rank, received)
        return {"all-to-all": seconds / count}

    return measure


def _check(rank: int, received: torch.Tensor) -> None:
    ranks = len(received)
    for peer in range(ranks):
        assert bool((received[peer] == peer * ranks + rank).all()), f"wrong data from rank {peer}"


def _report(options: argparse.Namespace, reports: list[dict[str, list[Measured]]], load: float) -> None:
    """Of the wall time the slowest rank counts in each round, of the processor time the sum; medians of the rounds."""
    table: dict[str, dict[str, Any]] = {}
    for name in reports[0]:
        for figure in reports[0][name][0]:
            combine = sum if figure == "cpu" else max
            rounds = [
                combine(report[name][turn][figure] for report in reports) * 1e3
                for turn in range(options.rounds)
            ]
            table[name if figure == "all-to-all" else f"{name}, {figure}"] = {
                "median_ms": round(statistics.median(rounds), 4),
                "best_ms": round(min(rounds), 4),
                "rounds_ms": [round(value, 4) for value in rounds],
            }
    gloo, ours = table["gloo"]["median_ms"], table["elastic_ep, pair / 2"]["median_ms"]
    gloo_cpu, our_cpu = table["gloo, cpu"]["median_ms"], table["elastic_ep, cpu"]["median_ms"]
    per_peer = options.rows * options.hidden * 4
    print(f"all-to-all, {options.ranks} processes, {os.cpu_count()} cores, {per_peer} bytes to each peer")
    for name, row in table.items():
        print(f"  {name:24} median {row['median_ms']:7.3f} ms   best {row['best_ms']:7.3f} ms")
    print(
        f"  gloo / elastic_ep: {gloo / ours:.1f} times by wall time, {gloo_cpu / our_cpu:.1f} by processor time"
    )
    if options.out is not None:
        write_result(
            options.out,
            {
                "torch": torch.__version__,
                "zeromq": zmq.zmq_version(),
                "ranks": options.ranks,
                "bytes_per_peer": per_peer,
                "all_to_all": table,
                "times_faster_than_gloo": round(gloo / ours, 2),
                "times_less_processor_time_than_gloo": round(gloo_cpu / our_cpu, 2),
                "load_average_before": load,
            },
        )


if __name__ == "__main__":
    main()
