"""Runs test files through Triton's interpreter, which must be chosen before Triton is imported: in other processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.kit.bound import run

DEADLINE_S = 400.0
_ROOT = Path(__file__).parents[2]


def check(*words: str) -> None:
    """`words` are for pytest. Raises AssertionError with its output if it fails."""
    # One thread: products this small lose more to waking the others than they win.
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.kit.interpreter",
        *words,
    ]
    result = run(command, DEADLINE_S, env=env, cwd=_ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
