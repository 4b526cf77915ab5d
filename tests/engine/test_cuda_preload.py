"""What the fork server imports for ranks on GPUs saves them time, and leaves it fit to fork."""

from __future__ import annotations

import sys

from tests.kit.bound import run

PROGRAM = """
import os
import torch
import elastic_ep.engine.ops_cuda.build
threads = len(os.listdir("/proc/self/task"))
import elastic_ep.engine.ops_cuda.preload
from triton.runtime import cache
print(cache.triton_key.cache_info().currsize)
print(len(os.listdir("/proc/self/task")) - threads)
print(torch.cuda.is_initialized())
"""


def test_triton_is_hashed_without_a_thread_or_a_device() -> None:
    done = run([sys.executable, "-c", PROGRAM], 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0", "False"]
