"""What a step of decodes fills in is what the general way fills in."""

from __future__ import annotations

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import StepInputs, StepShape
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
