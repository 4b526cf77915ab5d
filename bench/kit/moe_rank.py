"""A rank of `bench.gpu_moe_layer`: every side is one graph of many layers, replayed in lockstep with its peers."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.kit.moe_plane import BF16, Case, Plane
from bench.kit.moe_sides import Layer, Sides
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
from elastic_ep.exchange.step_barrier import StepBarrier

_MEET_S = 60.0
_LAUNCH_CYCLES = 400_000


class Meeting:
    """All ranks at once, to within microseconds. Raises TimeoutError if one does not come."""

    def __init__(self, directory: Path, ranks: int, rank: int) -> None:
        self._barrier = StepBarrier(directory, ranks, rank)
        self._ranks = range(ranks)
        self._number = 0

    def __call__(self) -> None:
        self._number += 1
        self._barrier.say(self._number)
        limit = time.monotonic() + _MEET_S
        while any(self._barrier.of(rank) < self._number for rank in self._ranks):
            os.sched_yield()
            if time.monotonic() > limit:
                raise TimeoutError(f"a peer did not come to meeting {self._number}")


class Replay:
    """`layers` layers of a side: a graph on a GPU, a loop on a processor. Microseconds of one layer when called."""

    def __init__(self, plane: Plane, body: Layer) -> None:
        self._case = plane.case
        self._body = body
        self._graph: torch.cuda.CUDAGraph | None = None
        for layer in plane.weights:
            body(layer)
        if plane.device.type != "cuda":
            return
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            self._all()

    def _all(self) -> None:
        for layer in range(self._case.layers):
            self._body(layer % self._case.distinct)

    def __call__(self) -> float:
        if self._graph is None:
            began = time.perf_counter()
            self._all()
            return (time.perf_counter() - began) * 1e6 / self._case.layers
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # What a launch costs the host is in no side's time.
        torch.cuda._sleep(_LAUNCH_CYCLES)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / self._case.layers


@torch.inference_mode()
def measure(case: Case, rank: int, directory: Path) -> dict[str, Any]:
    """Every rank does the same here, operation for operation: the exchange counts them."""
    meet = Meeting(directory, case.ranks, rank)
    if case.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.cuda.set_stream(torch.cuda.Stream())
    plane = Plane(case, rank, directory)
    blank = torch.zeros(case.slots, dtype=torch.int32, device=plane.device)
    capacity = case.ranks * case.max_tokens
    packed = torch.zeros(case.slots, capacity, case.hidden, dtype=BF16, device=plane.device)
    # Compiled before anybody waits for anybody.
    expert_ffn(packed, blank, plane.gate_up[0], plane.down[0], expected_rows=plane.expected)
    del packed
    meet()
    plane.connect()
    meet()
    sides = Sides(plane)
    bodies = sides.all()
    error = _difference(bodies["ours"](0), bodies["raw_with_grouped"](0))
    replays: dict[str, Replay] = {}
    for name, body in bodies.items():
        meet()
        replays[name] = Replay(plane, body)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for round_ in range(case.rounds + 2):
        for name, replay in replays.items():
            meet()
            taken = replay()
            if round_ >= 2:
                times[name].append(taken)
    meet()
    plane.exchange.begin_step(0)
    lost = plane.exchange.end_step()
    if lost:
        raise RuntimeError(f"ranks {sorted(lost)} were masked meanwhile")
    counts = [int(received.counts.sum()) for received in sides.received]
    hit = [int((received.counts > 0).sum()) for received in sides.received]
    meet()
    return {"times": times, "rows": counts, "hit": hit, "difference": error}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def run_rank(case: Case, rank: int, directory: Path) -> None:
    """Leaves `rank.json` or `rank.error` behind. In a process of its own, which it ends."""
    try:
        result = measure(case, rank, directory)
        (directory / f"{rank}.json").write_text(json.dumps(result))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        (directory / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        status = 1
    os._exit(status)  # what a peer may still read stays until all have met
