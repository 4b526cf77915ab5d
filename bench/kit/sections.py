"""What the benchmarks on a GPU share: sections that fail alone, quartiles, and what the machine was."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tests.kit.served import percentile, write_result


def gpu() -> str:
    """Name and driver; touches no device."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return ""
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def quartiles(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    ends = [round(percentile(values, share), digits) for share in (0.25, 0.75)]
    return {"median": round(percentile(values, 0.5), digits), "quartiles": ends, "n": len(values)}


_UNFINISHED = ("so_far", "not_reached")


class Expired(BaseException):
    """A section took too long. Not an Exception: libraries that go on after any of those must not go on after this."""


class Rows:
    """A section's rows, which come in the order in which they were planned."""

    def __init__(self, planned: Sequence[dict[str, Any]], write: Callable[[], None]) -> None:
        self.measured: list[dict[str, Any]] = []
        self.not_reached = list(planned)
        self._write = write

    def add(self, row: dict[str, Any]) -> None:
        self.measured.append(row)
        del self.not_reached[0]
        print(f"           {row}", flush=True)
        self._write()


class Sections:
    """Parts of a result. One that fails or lasts too long leaves `failed: ...` in its place, and the rest goes on.

    The file is written anew after every section, and after every row of those that have `rows`: whatever ends the
    process, it has them as `<name>_so_far`, and the others as `<name>_not_reached`. Both stay if the section fails.
    `commit` says where the code is from if the machine has no git.
    """

    def __init__(self, out: Path, commit: str | None, **facts: Any) -> None:
        self.result: dict[str, Any] = {"gpu": gpu(), "torch": torch.__version__, **facts}
        if commit is not None:
            self.result["commit"] = commit
        self._out = out
        self._began = time.monotonic()

    def run(self, name: str, call: Callable[[], Any], seconds: int) -> Any:
        """What `call` returns, None if it failed. Main thread only."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {name}", flush=True)
        value = None
        before = signal.signal(signal.SIGALRM, _expired)
        signal.alarm(seconds)
        try:
            value = self.result[name] = call()
            for kind in _UNFINISHED:
                self.result.pop(f"{name}_{kind}", None)
        except (Exception, Expired) as error:
            traceback.print_exc()
            self.result[name] = f"failed: {type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        print(f"           {self.result[name]}", flush=True)
        self.write()
        return value

    def rows(self, name: str, planned: Sequence[dict[str, Any]]) -> Rows:
        """For section `name` while it runs. What is planned says what a row is of."""
        rows = Rows(planned, self.write)
        for kind, these in zip(_UNFINISHED, (rows.measured, rows.not_reached), strict=True):
            self.result[f"{name}_{kind}"] = these
        self.write()
        return rows

    def write(self) -> None:
        self.result["took_s"] = round(time.monotonic() - self._began, 1)
        with suppress(OSError):
            write_result(self._out, self.result)

    @property
    def failed(self) -> list[str]:
        return [name for name, value in self.result.items() if str(value).startswith("failed: ")]


def _expired(signum: int, frame: FrameType | None) -> None:
    raise Expired("the section took too long")
