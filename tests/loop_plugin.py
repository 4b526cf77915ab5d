"""No event loop may stand still: not a test's own, nor that of a server that the test has started.

A test that holds a loop on purpose says why: ``@pytest.mark.holds_the_loop("why")``.
"""

from __future__ import annotations

import gc
import json
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from elastic_ep.loop_watch import HELD_S, Held, WatchedSelector

TOLERATED_S = 4 * HELD_S
"""A machine that tests run on may be some times slower than a server's, and what others take of it is not always told."""
_HELD = pytest.StashKey[list[str]]()
_READ = pytest.StashKey[dict[Path, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Every event loop of this process is watched: asyncio asks for a `DefaultSelector` when it makes one."""
    held = config.stash[_HELD] = []
    config.stash[_READ] = {}
    collected = _Collections()
    gc.callbacks.append(collected)

    def note(seen: Held) -> None:
        if "(Popen._execute_child)" in seen.where:
            return  # a test starts a program: until the kernel has begun it, on a busy machine, this process waits
        if seen.seconds - collected.since(seen.began_s) > TOLERATED_S:
            held.append(f"{seen.seconds * 1000:.0f} ms, {seen.where}")

    class Watched(WatchedSelector):
        def __init__(self) -> None:
            super().__init__(note)

    selectors.DefaultSelector = Watched  # type: ignore[misc]


class _Collections:
    """How long the collector took: a process full of tests has many objects, which a server has not."""

    def __init__(self) -> None:
        self._began = 0.0
        self._took: tuple[tuple[float, float], ...] = ()
        """(when it ended, how long). HAZARD: it may come while these are looked at: they are replaced, not changed."""

    def __call__(self, phase: str, _info: object) -> None:
        now = time.monotonic()
        if phase == "start":
            self._began = now
        else:
            self._took = (*self._took[-99:], (now, now - self._began))

    def since(self, began_s: float) -> float:
        return sum(took for ended, took in self._took if ended > began_s)


@contextmanager
def not_held_against_it(config: pytest.Config) -> Iterator[None]:
    """For what a server does before its loop runs, and a test while its own does; the loop has a turn before the end."""
    held = config.stash[_HELD]
    known = len(held)
    yield
    del held[known:]


@pytest.fixture(autouse=True)
def loops_never_stand_still(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    held = request.config.stash[_HELD]
    held.clear()
    # As servers do; structlog's own way to show a traceback takes a quarter of a second.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, plain])
    yield
    if request.node.get_closest_marker("holds_the_loop"):
        return
    served = request.node.get_closest_marker("e2e") or request.node.get_closest_marker("gpu")
    found = [*held, *(_of_servers(request.config, tmp_path_factory.getbasetemp()) if served else [])]
    assert not found, f"an event loop stood still: {found}"


def _of_servers(config: pytest.Config, folder: Path) -> list[str]:
    """What the event logs of servers say that nobody has read yet."""
    read = config.stash[_READ]
    found = []
    for path in folder.rglob("events*.jsonl"):
        with path.open("rb") as file:
            file.seek(read.get(path, 0))
            whole, _, _ = file.read().rpartition(b"\n")
        read[path] = read.get(path, 0) + len(whole)
        for line in whole.split(b"\n"):
            if b'"note":"loop_held"' in line:
                note = json.loads(line)
                if note["ms"] > TOLERATED_S * 1000:
                    found.append(f"{note['ms']} ms in the server, {note['where']}")
    return found
