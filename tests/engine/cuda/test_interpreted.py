"""Runs the engine's tests through Triton's interpreter, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.cuda.conftest import INTERPRETED, TWICE
from tests.kit.interpreted import DEADLINE_S, check

FILES = tuple(str(Path(__file__).parent / name) for name in TWICE)
UNDISTURBED = "poisoned or raise or warm_up"
"""What compares itself with an undisturbed run, which one process computes once: half of the work."""


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize("chosen", [UNDISTURBED, f"not ({UNDISTURBED})"], ids=("undisturbed", "others"))
def test_interpreted(chosen: str) -> None:
    check(*FILES, "-k", chosen)
