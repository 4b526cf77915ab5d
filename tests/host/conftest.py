from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private directory, and this folder importable in child processes."""
    old = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{old}" if old else str(HERE))
    path = Path(tempfile.mkdtemp(prefix="eep-test-"))
    (path / "socket").touch()
    yield path
    shutil.rmtree(path, ignore_errors=True)
