"""A short slice for one thread, seen with the kernel's eyes."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

import pytest

from elastic_ep.host.scheduling import SHORT_SLICE_NS, make_ordinary, make_prompt

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def slice_ns() -> int:
    buffer = ctypes.create_string_buffer(48)
    number = ctypes.c_long(SCHED_GETATTR[platform.machine()])
    assert ctypes.CDLL(None).syscall(number, 0, buffer, len(buffer), 0) == 0
    fields: tuple[int, ...] = struct.unpack("IIQiIQQQ", buffer.raw)
    return fields[5]


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="unknown system call number")
@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (6, 12), reason="slices came with Linux 6.12"
)
def test_prompt_and_back_for_this_thread_only() -> None:
    seen: list[object] = []

    def body() -> None:
        before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        usual = slice_ns()
        seen.extend([make_prompt(), slice_ns()])
        seen.extend([make_ordinary(), slice_ns() == usual])
        make_prompt()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True, SHORT_SLICE_NS, True, True, True]
    assert slice_ns() != SHORT_SLICE_NS
