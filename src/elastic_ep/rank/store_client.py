"""A rank's half of the store on the control plane: what the exchange asks of a `Store`, from any thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from elastic_ep.timing import Timing
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet, StoreValue


class ControlStore:
    """`post` hands a message to the control loop, in order, from any thread; the loop gives `received` the answers.

    HAZARD: no lock is shared with the control loop. A thread that holds one may be kept from running on a busy machine,
    and the loop would miss its heartbeats: so answers travel through queues, which the loop fills without waiting.
    """

    def __init__(self, post: Callable[[StoreSet | StoreGet | StoreDelete], None], timing: Timing) -> None:
        self._post = post
        self._get_deadline = timedelta(milliseconds=timing.store_get_ms)
        self._listeners: list[queue.SimpleQueue[tuple[str, bytes]]] = []
        """One for each wait in progress. Appending, removing and copying are atomic."""
        self._found: dict[str, bytes] = {}
        """What waits have found and nobody has deleted yet."""

    # Any thread but the control loop's

    def set(self, key: str, value: bytes) -> None:
        """Does not wait. Setting a key again replaces its value."""
        self._post(StoreSet(key, value))

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Return when all `keys` are there; asks anew, whatever an earlier wait has found.

        Raises TimeoutError, naming what is missing, after `timeout`: also if it is shorter than an answer takes.
        """
        self._found.update(self._fetch(keys, timeout))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """What the last wait for each key has found. Asks for the others: TimeoutError if one does not come."""
        found = dict(self._found)
        if unknown := [key for key in keys if key not in found]:
            found.update(self._fetch(unknown, self._get_deadline))
        return [found[key] for key in keys]

    def delete_key(self, key: str) -> bool:
        """Does not wait: whether there was one, as far as this rank's waits have seen."""
        self._post(StoreDelete(key))
        return self._found.pop(key, None) is not None

    def _fetch(self, keys: Sequence[str], timeout: timedelta) -> dict[str, bytes]:
        limit = time.monotonic() + timeout.total_seconds()
        missing = dict.fromkeys(keys)
        found: dict[str, bytes] = {}
        with self._listening() as arrivals:
            self._post(StoreGet(tuple(missing)))
            while missing:
                try:
                    key, value = arrivals.get(timeout=max(0.0, limit - time.monotonic()))
                except queue.Empty:
                    raise TimeoutError(f"nobody has set {', '.join(missing)}") from None
                if key in missing:
                    found[key] = value
                    del missing[key]
        return found

    @contextmanager
    def _listening(self) -> Iterator[queue.SimpleQueue[tuple[str, bytes]]]:
        arrivals: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._listeners.append(arrivals)
        try:
            yield arrivals
        finally:
            self._listeners.remove(arrivals)

    # Control loop

    def received(self, message: StoreValue) -> None:
        """Never waits. An answer that comes when nobody waits any more is dropped."""
        for listener in tuple(self._listeners):
            listener.put((message.key, message.value))
