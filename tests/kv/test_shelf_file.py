"""Where everything is in the shelf's file."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.kv.shelf_file import LINE, RegionCounts, ShelfError, ShelfLayout
from tests.kit.bound import run
from tests.kit.shelf import shelf_file


@given(st.integers(1, 64), st.integers(1, 1 << 22), st.integers(0, 1 << 44))
def test_the_parts_follow_each_other_within_what_was_given(regions: int, page_bytes: int, total: int) -> None:
    layout = ShelfLayout.fit(regions, page_bytes, total)
    if layout is None:
        assert total // regions < page_bytes + (64 << 10)
        return
    last = (layout.regions - 1, layout.slots - 1)
    assert regions * LINE <= layout.tags < layout.places < layout.headers < layout.data
    assert layout.places + 4 * 8 * layout.buckets * regions <= layout.headers
    assert layout.header_at(*last) + LINE <= layout.data == layout.page_at(0, 0)
    assert layout.page_at(*last) + page_bytes == layout.total <= total
    assert 2 * layout.slots <= 8 * layout.buckets, "the index is at most half full"


def test_pages_take_memory_only_when_they_are_written() -> None:
    layout = ShelfLayout.fit(8, 32 << 10, 1 << 30)
    assert layout is not None
    assert layout.regions * layout.slots * layout.page_bytes > 0.98 * (1 << 30)
    with shelf_file(layout) as fd:
        assert os.fstat(fd).st_size == layout.total
        assert os.fstat(fd).st_blocks * 512 < (1 << 30) // 200
        assert layout.counts(fd) == [RegionCounts()] * 8
        with pytest.raises(PermissionError):
            os.ftruncate(fd, layout.total - 4096)


def test_what_the_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ShelfError, match="Cannot allocate"):
        ShelfLayout(1, 1, 1).create()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_run_process_makes_a_shelf_without_torch_and_numpy() -> None:
    code = "import sys, elastic_ep.kv.shelf_file; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run([sys.executable, "-c", code], 60).returncode == 0
