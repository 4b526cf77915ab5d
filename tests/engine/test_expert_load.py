"""After any plan, the rows counted by slot are those of the experts that computed them: a reference counts by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.engine.ops_cuda.load import DeviceLoad
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.engine.scheduler import Chunk
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.group.expert_loads import REPORTS_KEPT, LoadWindow
from elastic_ep.models.registry import load_spec
from elastic_ep.placement import EMPTY, Change, Placement
from elastic_ep.run import BUNDLED_MODEL

RANKS, RANK, WIDTH, EXPERTS, LAYERS = 2, 1, 3, 4, 2
FIRST = Placement(0, RANKS, WIDTH, EXPERTS, ((0, 1, 2, 3, 0, EMPTY),) * LAYERS)


@dataclass
class OnHost:
    load: ExpertLoad

    def add(self, layer: int, slot: int, rows: int) -> None:
        self.load.by_slot[layer][slot] += rows


@dataclass
class OnDevice:
    load: DeviceLoad
    counts: torch.Tensor

    def add(self, layer: int, slot: int, rows: int) -> None:
        self.counts[layer, slot] += rows


def on_host() -> OnHost:
    return OnHost(ExpertLoad(FIRST, RANK))


def on_device() -> OnDevice:
    counts = torch.zeros(LAYERS, WIDTH, dtype=torch.int32)
    return OnDevice(DeviceLoad(FIRST, RANK, counts), counts)


class Runner(StepRunner):
    """Computes nothing; a new placement reaches the counters through it, as it does in a rank."""

    def __init__(self, load: ExpertLoad) -> None:
        weights = cast(Any, SimpleNamespace(spec=load_spec(BUNDLED_MODEL)))
        limits = EngineLimits(max_model_len=16)
        routing = cast(RoutingTable, type("NoTable", (), {"update": lambda *_given: True})())
        super().__init__(limits, weights, FIRST, RANK, cast(Any, None), routing, load)

    def warm_up(self) -> None: ...
    def _launch(self, chunks: list[Chunk]) -> None: ...
    def _complete(self) -> None:
        raise NotImplementedError

    def prove_well(self) -> None:
        raise NotImplementedError

    def _discard(self) -> None: ...
    def _sample(self, sequences: Any) -> list[Any]:
        return []


layers, slots, experts = st.integers(0, LAYERS - 1), st.integers(0, WIDTH - 1), st.integers(-1, EXPERTS - 1)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("rows"), layers, slots, st.integers(1, 9)),
        st.tuples(st.just("placed"), layers, slots, experts),
        st.tuples(st.just("cut"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@pytest.mark.parametrize("counters", [on_host, on_device])
@given(acts=ACTS)
@settings(max_examples=150, deadline=None)
def test_rows_are_counted_under_the_expert_that_lay_in_the_slot(
    counters: Callable[[], OnHost | OnDevice], acts: list[tuple[str, int, int, int]]
) -> None:
    counted = counters()
    runner = Runner(counted.load)
    by_name = [[0] * EXPERTS for _ in range(LAYERS)]
    taken = [[0] * EXPERTS for _ in range(LAYERS)]
    placement = FIRST

    def take() -> None:
        for row, more in zip(taken, runner.load.take(), strict=True):
            row[:] = [had + new for had, new in zip(row, more, strict=True)]

    for act, layer, slot, number in acts:
        physical = RANK * WIDTH + slot
        match act:
            case "rows":
                logical = placement.slots[layer][physical]
                if logical != EMPTY:  # nobody sends rows to an empty slot
                    counted.add(layer, slot, number)
                    by_name[layer][logical] += number
            case "placed":
                placement = placement.changed(placement.version + 1, [Change(layer, physical, number)])
                runner.set_routing({0, 1}, placement)
            case "cut":
                runner.load.cut()
            case "take":
                take()
    take()
    take()  # what came after a cut
    assert taken == by_name


reports = st.tuples(st.integers(0, RANKS), st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS))


@given(told=st.lists(reports, max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_window_is_the_newest_reports_of_each_rank(told: list[tuple[int, list[int]]]) -> None:
    window = LoadWindow()
    for rank, row in told:
        window.add(rank, (tuple(row), tuple(2 * n for n in row)))
    newest = [
        row for rank in range(RANKS + 1) for r, row in [t for t in told if t[0] == rank][-REPORTS_KEPT:]
    ]
    by_name = [sum(row[expert] for row in newest) for expert in range(EXPERTS)]
    assert window.of_layer(0, EXPERTS) == tuple(by_name)
    assert window.of_layer(1, EXPERTS) == tuple(2 * n for n in by_name)
