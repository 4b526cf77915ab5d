"""Runs test files through Triton's interpreter, which must be chosen before Triton is imported: in other processes.

Two at a time, as whoever asks for one of them only waits meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

DEADLINE_S = 400.0
_ROOT = Path(__file__).parent.parent


class Interpreted:
    """`runs` are words for pytest, one tuple a process; all are begun at once, in their order."""

    def __init__(self, runs: Sequence[tuple[str, ...]]) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._done = {words: self._pool.submit(_run, words) for words in runs}

    def check(self, words: tuple[str, ...]) -> None:
        """Wait for that one. Raises AssertionError with its output if it failed."""
        done: Future[subprocess.CompletedProcess[str]] = self._done[words]
        result = done.result(DEADLINE_S)
        assert result.returncode == 0, result.stdout + result.stderr

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _run(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # One thread: products this small lose more to waking the others than they win.
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command, env=env, cwd=_ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
