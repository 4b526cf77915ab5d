"""Runs the other files of this folder through Triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interpreted import DEADLINE_S, Interpreted

from .conftest import ELSEWHERE, GPU_ONLY, INTERPRETED

HERE = Path(__file__).parent
LONGEST = "test_paged_attention.py"
FILES = sorted(
    {file.name for file in HERE.glob("test_*.py")} - ELSEWHERE - GPU_ONLY, key=lambda name: name != LONGEST
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    runs = Interpreted([(str(HERE / name),) for name in FILES])
    yield runs
    runs.close()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize("name", FILES)
def test_interpreted(interpreted: Interpreted, name: str) -> None:
    interpreted.check((str(HERE / name),))
