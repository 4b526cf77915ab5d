"""How ranks leave each other small values (addresses of buffers) with the run process: set, ask, delete.

A value is a few hundred bytes to a few kilobytes. It never goes into the event log.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreSet:
    """Keep `value` under `key`, in place of what was there. Setting it again is no error."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class StoreGet:
    """Send me a `StoreValue` for each of `keys`: at once where there is a value, else as soon as there is one."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreDelete:
    """Forget `key`, whoever has set it. A key that is not there is no error."""

    key: str


@dataclass(frozen=True, slots=True)
class StoreValue:
    """What `key` holds."""

    key: str
    value: bytes
