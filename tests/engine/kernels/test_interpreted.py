"""Runs the other files of this folder through Triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.kernels.conftest import ELSEWHERE, GPU_ONLY, INTERPRETED
from tests.kit.interpreted import DEADLINE_S, check

HERE = Path(__file__).parent
LONGEST = "test_paged_attention.py"
OTHERS = sorted({file.name for file in HERE.glob("test_*.py")} - ELSEWHERE - GPU_ONLY - {LONGEST})


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize("names", [[LONGEST], OTHERS], ids=("longest", "others"))
def test_interpreted(names: list[str]) -> None:
    check(*(str(HERE / name) for name in names))
