"""Runs a module as `python -m` does, and notes how long each turn of its event loop took.

    python bench/kit/loop_turns.py FILE MODULE ARGUMENT ...

A turn is the time between two waits of the loop's selector: nothing else of the loop runs in it. Those from `LEAST_NS` on
are written to FILE at exit, as JSON rows of when each began (CLOCK_MONOTONIC) and how long it took, nanoseconds. Standard
library only, and started by its path: it runs beside any version of this project.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import selectors
import sys
import time
from pathlib import Path

LEAST_NS = 200_000


def note_turns(file: Path) -> None:
    wait, owner = selectors.DefaultSelector.select, os.getpid()
    turns: list[tuple[int, int]] = []
    began = 0

    def select(
        self: selectors.DefaultSelector, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        nonlocal began
        took = time.monotonic_ns() - began
        if began and took >= LEAST_NS:
            turns.append((began, took))
        found = wait(self, timeout)
        began = time.monotonic_ns()
        return found

    def write() -> None:
        if os.getpid() == owner:
            file.write_text(json.dumps(turns))

    selectors.DefaultSelector.select = select  # type: ignore[method-assign]  # of every loop of this process
    atexit.register(write)


if __name__ == "__main__":
    file, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    sys.path[0] = os.getcwd()  # instead of this file's folder
    note_turns(Path(file))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
