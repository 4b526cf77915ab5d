"""A `Store` in a directory, for ranks of one host: a key is a file, which appears whole."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

_PAUSE_S = 0.0005


class FileStore:
    """In `directory`, which exists and is private to the group."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, key: str) -> Path:
        return self._directory / key.replace("/", "+")

    def set(self, key: str, value: bytes) -> None:
        path = self._path(key)
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        part.write_bytes(value)
        part.replace(path)

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Raises TimeoutError, naming what is missing."""
        limit = time.monotonic() + timeout.total_seconds()
        while missing := [key for key in keys if not self._path(key).exists()]:
            if time.monotonic() > limit:
                raise TimeoutError(f"nobody has set {', '.join(missing)}")
            time.sleep(_PAUSE_S)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._path(key).read_bytes() for key in keys]

    def delete_key(self, key: str) -> bool:
        """False if there was none."""
        with suppress(FileNotFoundError):
            self._path(key).unlink()
            return True
        return False
