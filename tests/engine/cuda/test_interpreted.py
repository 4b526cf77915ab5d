"""Runs the engine's tests through Triton's interpreter, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.cuda.conftest import INTERPRETED, TWICE
from tests.kit.interpreted import DEADLINE_S, check

FILES = tuple(str(Path(__file__).parent / name) for name in TWICE)
PARTS = ("poisoned or neighbours", "logits", "raise")
"""Each about a quarter of the work, as what is left."""


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize("chosen", [*PARTS, f"not ({' or '.join(PARTS)})"], ids=(*PARTS, "others"))
def test_interpreted(chosen: str) -> None:
    check(*FILES, "-k", chosen)
