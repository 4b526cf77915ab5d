"""The file that the run process makes for its ranks."""

from __future__ import annotations

import os
import sys

import pytest

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.exchange.windows import Windows, WindowsError
from elastic_ep.wire.messages import Member
from tests.kit.bound import run

SHAPE = ExchangeShape(
    num_ranks=8, max_tokens=64, hidden=128, top_k=4, slots_per_rank=4, operations_per_step=8
)


def test_the_run_process_makes_windows_without_torch() -> None:
    code = (
        "import sys, elastic_ep.exchange.windows; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert run([sys.executable, "-c", code], 60).returncode == 0


def test_new_windows_are_zero_and_cannot_change_their_size() -> None:
    fd = Windows.create(SHAPE)
    try:
        total = Windows.layout(SHAPE).total
        assert os.fstat(fd).st_size == total
        assert os.pread(fd, total, 0) == bytes(total)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, total - 4096)
    finally:
        os.close(fd)


def test_too_little_memory_is_told_before_any_rank_starts() -> None:
    needed = Windows.layout(SHAPE).total
    with pytest.raises(WindowsError, match="MiB"):
        Windows.create(SHAPE, available=needed - 1)
    os.close(Windows.create(SHAPE, available=needed))


def test_windows_of_another_shape_are_refused() -> None:
    fd = Windows.create(SHAPE)
    try:
        other = ExchangeShape(8, 64, 256, 4, 4, 8)
        with pytest.raises(ValueError, match="bytes"):
            ShmExchange(fd, other, Member(0, 1))
    finally:
        os.close(fd)
