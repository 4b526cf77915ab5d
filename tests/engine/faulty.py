"""Requests that make a step raise, wherever in the step that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from elastic_ep.engine.ops_cpu import runner as runner_module
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.scheduler import Chunk

PLACES = ("make", "attend 0", "attend 1", "gate 1", "experts 0", "experts 1", "sample", "append")


class Poisoned(RuntimeError):
    pass


@contextmanager
def faulty(runner: ModelRunner, bad: frozenset[int], place: str) -> Iterator[None]:
    """While it lasts, `runner`'s steps with one of the requests `bad` in it raise at `place` ("what layer")."""
    what, _, layer = place.partition(" ")
    calls: dict[str, int] = {}
    in_batch = False
    make = runner._batches.make

    def watch(chunks: list[Chunk]) -> Any:
        nonlocal in_batch
        in_batch = any(chunk.sequence.request_id in bad for chunk in chunks)
        calls.clear()
        if in_batch and what == "make":
            raise Poisoned(place)
        return make(chunks)

    def raising(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal in_batch
            number = calls[what] = calls.get(what, -1) + 1
            if in_batch and number == int(layer or 0):
                in_batch = False
                raise Poisoned(place)
            return function(*arguments)

        return call

    owners: dict[str, Any] = dict.fromkeys(("attend", "gate", "experts"), runner._ops)
    owners["sample"] = runner_module
    with mock.patch.object(runner._batches, "make", watch):
        if what in owners:
            with mock.patch.object(owners[what], what, raising(getattr(owners[what], what))):
                yield
        elif what == "append":
            with mock.patch.object(runner._scheduler, "commit", _break_stops(runner, bad)):
                yield
        else:
            yield


def _break_stops(runner: ModelRunner, bad: frozenset[int]) -> Any:
    """What `_append` looks a token up in raises."""
    commit = runner._scheduler.commit

    class Raises(frozenset[int]):
        def __contains__(self, token: object) -> bool:
            raise Poisoned("append")

    def broken(chunks: list[Chunk]) -> None:
        commit(chunks)
        for chunk in chunks:
            if chunk.sequence.request_id in bad:
                chunk.sequence.stops = Raises()

    return broken


def interrupt(runner: ModelRunner, bad: int, operation: int) -> None:
    """From now on `runner`'s steps with request `bad` in them raise right before that operation of the exchange.

    Only this runner's: others may run on other threads.
    """
    forward, make = runner._model.forward, runner._batches.make
    in_batch = False

    def watch(chunks: list[Chunk]) -> Any:
        nonlocal in_batch
        in_batch = any(chunk.sequence.request_id == bad for chunk in chunks)
        return make(chunks)

    class Interrupted:
        def __init__(self, carrier: Any) -> None:
            self._carrier, self._count = carrier, 0

        def __getattr__(self, name: str) -> Any:
            if in_batch and self._count == operation:
                raise Poisoned(f"before operation {operation}")
            self._count += 1
            return getattr(self._carrier, name)

    patched: Any = runner
    patched._model.forward = lambda batch, carrier: forward(batch, Interrupted(carrier))
    patched._batches.make = watch
