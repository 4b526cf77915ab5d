"""How much of a checkpoint the kernel holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ep.weights.disk_cache import cached_share
from tests.kit.page_cache import drop_from_cache

SIZE = 1 << 20


def test_the_share_follows_reading_and_dropping(tmp_path: Path) -> None:
    files = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for file in files:
        file.write_bytes(bytes(SIZE))
    (tmp_path / "other.bin").write_bytes(bytes(SIZE))
    assert cached_share(tmp_path) == 1.0
    drop_from_cache(tmp_path)
    if cached_share(tmp_path) == 1.0:
        pytest.skip("this file system lives in the page cache")
    assert cached_share(tmp_path) < 0.1
    files[0].read_bytes()
    assert 0.45 < cached_share(tmp_path) < 0.55


def test_of_nothing_nothing_is_cached(tmp_path: Path) -> None:
    assert cached_share(tmp_path) == 0.0
    (tmp_path / "model.safetensors").touch()
    assert cached_share(tmp_path) == 0.0
