"""Runs the engine's tests through Triton's interpreter, in two processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interpreted import DEADLINE_S, Interpreted

from .conftest import INTERPRETED, TWICE

FILES = tuple(str(Path(__file__).parent / name) for name in TWICE)
SLOW = "poisoned or neighbours"
"""About half of the work."""
RUNS = ((*FILES, "-k", SLOW), (*FILES, "-k", f"not ({SLOW})"))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    runs = Interpreted(RUNS)
    yield runs
    runs.close()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize("words", RUNS, ids=("slow", "others"))
def test_interpreted(interpreted: Interpreted, words: tuple[str, ...]) -> None:
    interpreted.check(words)
