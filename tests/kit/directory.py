"""A private directory for what a test starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

KIT = Path(__file__).parent
ROOT = KIT.parent.parent


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private directory, and the kit importable in child processes."""
    old = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(KIT), str(ROOT), *([old] if old else [])]))
    path = Path(tempfile.mkdtemp(prefix="eep-test-"))
    (path / "socket").touch()
    yield path
    shutil.rmtree(path, ignore_errors=True)
