"""`python -m tests.e2e.mortal_server`: the real thing, in which a signal tells a rank where in a copy of pages to die.

It does so, by a SIGKILL of its own, when it next comes there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from elastic_ep.engine.ops_cpu.pages import CpuPages
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.kv.copier import Done, PageCopier
from elastic_ep.kv.shelf import Shelf
from elastic_ep.rank import process as rank

ALL_STORED = signal.SIGUSR1
"""Between two steps, when all its streams have output and every full page has been stored."""
IN_READ = signal.SIGUSR2
"""With pages read from the cache, of which the shelf has nothing yet."""
IN_PUT = signal.SIGRTMIN
"""With half of a page's bytes on the shelf."""
IN_WRITE = signal.SIGRTMAX
"""With one page fetched from the shelf that is in the cache, and more to come."""
_WAYS = (ALL_STORED, IN_READ, IN_PUT, IN_WRITE)
_told: set[int] = set()


def _die_if_told(way: signal.Signals) -> None:
    if way in _told:
        os.kill(os.getpid(), signal.SIGKILL)


def _after(call: Callable[..., Any], way: signal.Signals) -> Callable[..., Any]:
    def and_then(*arguments: Any, **named: Any) -> Any:
        result = call(*arguments, **named)
        _die_if_told(way)
        return result

    return and_then


def _watch_what_waits() -> None:
    """Count the pages that a copier was told to store, and dies when there are none."""
    waiting: dict[PageCopier, int] = {}
    store, take_done, run_step = PageCopier.store, PageCopier.take_done, StepRunner.run_step

    def counted_store(self: PageCopier, pages: Sequence[Any]) -> None:
        waiting[self] = waiting.get(self, 0) + len(pages)
        store(self, pages)

    def counted_take_done(self: PageCopier) -> Done:
        done = take_done(self)
        waiting[self] = waiting.get(self, 0) - len(done.stored)
        return done

    def mortal_step(self: StepRunner, *arguments: Any, **named: Any) -> Any:
        result = run_step(self, *arguments, **named)
        scheduler = self._scheduler
        streams = scheduler.running
        unnamed = scheduler._filled or scheduler._copies.store
        if streams and all(one.output_len for one in streams) and not (unnamed or any(waiting.values())):
            _die_if_told(ALL_STORED)
        return result

    PageCopier.store = counted_store  # type: ignore[method-assign]  # to see what waits
    PageCopier.take_done = counted_take_done  # type: ignore[method-assign]
    StepRunner.run_step = mortal_step  # type: ignore[method-assign]


def _in_halves(write: Callable[[Shelf, int, Any], None]) -> Callable[..., None]:
    def halfway(self: Shelf, slot: int, page: Any) -> None:
        if IN_PUT in _told:
            write(self, slot, page[: len(page) // 2])
            _die_if_told(IN_PUT)
        write(self, slot, page)

    return halfway


def _page_by_page(write: Callable[[CpuPages, Sequence[int], Any], None]) -> Callable[..., None]:
    def slowly(self: CpuPages, pages: Sequence[int], data: Any) -> None:
        for place, page in enumerate(pages):
            write(self, [page], data[place : place + 1])
            _die_if_told(IN_WRITE)

    return slowly


def main(config_json: str, files: SharedFiles, life_fd: int) -> int:
    for way in _WAYS:
        signal.signal(way, lambda number, _frame: _told.add(number))
    _watch_what_waits()
    CpuPages.read = _after(CpuPages.read, IN_READ)  # type: ignore[method-assign]  # to die there
    CpuPages.write = _page_by_page(CpuPages.write)  # type: ignore[method-assign]
    Shelf._write = _in_halves(Shelf._write)  # type: ignore[method-assign]
    return rank.main(config_json, files, life_fd)


if __name__ == "__main__":
    from elastic_ep.run import parse
    from elastic_ep.serve import serve

    sys.exit(serve(parse(), "tests.e2e.mortal_server:main"))
