"""Where two ranks leave each other the addresses of their buffers: the contract, and keys that name incarnations.

No torch here: the run process reads the keys too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

from elastic_ep.wire.messages import Member

_BETWEEN_RANKS = re.compile(r"(.+)/(\d+)/(\d+)")
_BETWEEN_MEMBERS = re.compile(r".+/(\d+)\.(\d+)/(\d+)\.(\d+)")
_SLICE = timedelta(seconds=0.05)


class Store(Protocol):
    """Any thread."""

    def set(self, key: str, value: bytes) -> None: ...

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Return when all `keys` are there. Raises TimeoutError, naming what is missing, after `timeout`."""
        ...

    def multi_get(self, keys: Sequence[str]) -> list[bytes]: ...

    def delete_key(self, key: str) -> bool: ...


class PeerGone(ConnectionError):
    """The member that was being connected to is masked, or superseded by its next incarnation."""


def members_named(key: str) -> tuple[Member, ...]:
    """From whom to whom a key of `IncarnationStore` leads; nobody if it leads nowhere."""
    match = _BETWEEN_MEMBERS.fullmatch(key)
    if match is None:
        return ()
    source, source_incarnation, target, target_incarnation = map(int, match.groups())
    return Member(source, source_incarnation), Member(target, target_incarnation)


class IncarnationStore:
    """Mooncake's keys name ranks; here they name incarnations, so what a dead one left behind is never read.

    `is_wanted` says whether a wait still has a purpose.
    """

    def __init__(self, store: Store, is_wanted: Callable[[Member], bool] = lambda member: True) -> None:
        self._store = store
        self._is_wanted = is_wanted
        self.incarnations: dict[int, int] = {}

    def _key(self, key: str) -> str:
        match = _BETWEEN_RANKS.fullmatch(key)
        if match is None:
            return key
        prefix, source, target = match.group(1), int(match.group(2)), int(match.group(3))
        return f"{prefix}/{source}.{self.incarnations[source]}/{target}.{self.incarnations[target]}"

    def set(self, key: str, value: bytes) -> None:
        self._store.set(self._key(key), value)

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Raises PeerGone as soon as the wait is in vain, TimeoutError after `timeout`."""
        named = [self._key(key) for key in keys]
        peers = {member for key in named for member in members_named(key)}
        limit = time.monotonic() + timeout.total_seconds()
        while True:
            try:
                self._store.wait(named, min(timeout, _SLICE))
                return
            except TimeoutError:
                if not all(map(self._is_wanted, peers)):
                    raise PeerGone(f"gone while being connected to: {sorted(peers)}") from None
                if time.monotonic() > limit:
                    raise

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._store.multi_get([self._key(key) for key in keys])

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._key(key))
