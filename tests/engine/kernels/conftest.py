"""The same tests twice: for real on a GPU, and on the CPU through Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, and interpreted kernels patch Triton's language module. Neither
may reach other tests, so the interpreter has a process of its own: `test_interpreted.py` starts it, with these same
files. In any other process the tests here carry the mark `gpu` and run on the device.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ELSEWHERE = {"test_interpreted.py", "test_compiles.py"}
"""Files that need neither a GPU nor the interpreter."""
GPU_ONLY = {"test_graphs.py"}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in ELSEWHERE and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)
