"""Runs the engine's tests through Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import INTERPRETED, TWICE

HERE = Path(__file__).parent


DEADLINE_S = 400.0


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize("name", TWICE)
def test_interpreted(name: str) -> None:
    # One thread: products this small lose more to waking the others than they win.
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(
        command,
        env=env,
        cwd=HERE.parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
