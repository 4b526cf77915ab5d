"""What a step of decodes fills in is what the general way fills in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import GRAPH_ROWS, StepInputs, StepShape, ladder
from elastic_ep.engine.ops_cuda.kernels.dense import plan_of
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.wire.messages import SamplingParams

LIMITS = EngineLimits(max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32, num_pages=64)
STARTS = [(), (0,), (15, 16, 17), (3, 0, 63, 16, 31, 32, 1, 48)]


def chunk(number: int, start: int) -> Chunk:
    pages = [7 * number + page for page in range(4)]
    tokens = [100 * number + position for position in range(start + 1)]
    return Chunk(Sequence(number, tokens, 1, SamplingParams(max_tokens=60), 0, 0, pages=pages), start, 1)


@pytest.mark.parametrize("mixed_between", [True, False])
@pytest.mark.parametrize("rows_before", [8, 16])
@pytest.mark.parametrize("before", STARTS)
@pytest.mark.parametrize("starts", STARTS)
def test_decodes(
    starts: tuple[int, ...], before: tuple[int, ...], rows_before: int, mixed_between: bool
) -> None:
    """Whatever the step before has left: as many decodes, more or fewer, or a step that is not of decodes alone."""
    quick, general = (StepInputs(LIMITS, 8, torch.device("cpu")) for _ in range(2))
    for inputs, decode in ((quick, True), (general, False)):
        chunks = [chunk(number + 1, 63 - start) for number, start in enumerate(before)]
        inputs.fill(chunks, StepShape(rows_before, decode))
        if mixed_between:
            inputs.fill([chunk(number, 9) for number in range(8)], StepShape(16, decode=False))
        inputs.fill([chunk(number, start) for number, start in enumerate(starts)], StepShape(16, decode))
    for name in ("tokens", "positions", "slots", "last_rows", "lengths", "bounds", "count", "tables"):
        assert torch.equal(getattr(quick, name), getattr(general, name)), name


def test_tables_follow_sequences_that_grow_change_rows_and_come_back() -> None:
    inputs = StepInputs(LIMITS, 8, torch.device("cpu"))
    first, second = chunk(1, 5), chunk(2, 7)

    def check(*chunks: Chunk) -> None:
        inputs.fill(chunks, StepShape(8, decode=True))
        for row, (sequence, _, _) in enumerate(chunks):
            assert inputs.tables[row, : len(sequence.pages)].tolist() == sequence.pages

    first.sequence.pages = [30, 31]
    check(first, second)
    first.sequence.pages += [32]
    check(first, second)
    check(second, first)
    first.sequence.pages = [40, 41, 42]
    check(second, first)


@given(
    seqs=st.integers(1, 600), tokens=st.integers(1, 3000), tile=st.sampled_from([1, 4, 64]), data=st.data()
)
def test_a_step_has_a_shape_that_fits_and_was_captured(
    seqs: int, tokens: int, tile: int, data: st.DataObject
) -> None:
    limits = EngineLimits(max_model_len=64, max_num_seqs=seqs, max_num_batched_tokens=max(seqs, tokens))
    inputs = StepInputs(limits, tile, torch.device("cpu"))
    count = data.draw(st.integers(0, seqs))
    extra = data.draw(st.integers(0, limits.max_num_batched_tokens - count)) if count else 0
    lengths = [1] * count
    if extra:
        lengths[0] += extra
    shape = inputs.shape_of([Chunk(chunk(0, 0).sequence, 0, length) for length in lengths])
    assert shape.decode == (not extra)
    assert shape.rows % tile == shape.outputs % tile == 0
    assert sum(lengths) <= shape.rows <= (inputs.max_sequences if shape.decode else inputs.max_rows)
    assert count <= shape.outputs <= inputs.max_sequences
    largest = inputs.largest()[not shape.decode]
    assert shape.rows <= largest.rows
    assert shape.outputs <= largest.outputs
    if shape.rows <= GRAPH_ROWS:
        assert shape in inputs.graphed()
        assert shape.rows <= 4 * max(tile, sum(lengths))
    else:
        assert shape.rows - sum(lengths) < tile


def test_few_graphs_are_captured() -> None:
    """Each makes a return longer."""
    fine = [256, 288, 384, 512, 576, 768, 1024, 1152, 1536, 2048, 2304, 3072, 4096, 4352]
    assert ladder(8192, 16) == [16, 64, 128, *fine]
    assert ladder(256, 16) == [16, 64, 128, 256]
    assert ladder(192, 16) == [16, 64, 128, 192]
    assert ladder(16, 16) == [16]
    inputs = StepInputs(EngineLimits(4096, 256, 1024), 16, torch.device("cpu"))
    assert len(inputs.graphed()) == 14


def test_no_step_is_the_first_to_cut_its_products_in_its_way() -> None:
    inputs = StepInputs(EngineLimits(4096, 256, 2048), 16, torch.device("cpu"))
    warm = {plan_of(shape.rows, 2048, torch.bfloat16) for shape in (*inputs.graphed(), *inputs.largest())}
    assert warm == {plan_of(rows, 2048, torch.bfloat16) for rows in range(16, 2049, 16)}
