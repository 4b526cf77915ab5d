"""The engine on a GPU. Files in `TWICE` run on the CPU too, through Triton's interpreter, as tests/engine/kernels do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TWICE = ("test_engine.py", "test_pages.py")
NO_DEVICE = ("test_compiles.py", "test_interpreted.py")
"""Files that need neither a GPU nor the interpreter."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent != here or item.path.name in NO_DEVICE:
            continue
        if INTERPRETED and item.path.name in TWICE:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
