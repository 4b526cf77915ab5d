"""From a run's folder to its film."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_ep.event_log.reader import Differs, Log
from elastic_ep.film.data import BEFORE_MS, film


class _Ends(ValueError):
    """The log cannot be read any further."""


def film_of(path: Path, only: tuple[int, int] | None = None, since_ns: int | None = None) -> dict[str, Any]:
    """The film of the log at `path`, of the loss of `only` if it is given; what was over before `since_ns` is not read.

    Its `partial` says what is missing. Raises `Unreadable` if nothing can be read.
    """
    log = Log(path, None if since_ns is None else since_ns - round(BEFORE_MS * 1e6))
    made = film(log.run, _lines(log), only)
    if since_ns is not None:  # of a run that goes on, of course
        return made
    if not made["partial"] and log.growing:
        made["partial"] = "the run goes on; this is what its log held when it was read"
    elif not made["partial"] and log.cut_off:
        made["partial"] = "the log is cut off in mid-line; this is what was read up to there"
    elif not made["partial"] and log.segment > 1:
        made["partial"] = f"it begins with file {log.segment} of the run: what came before was deleted"
    return made


def _lines(log: Log) -> Iterator[dict[str, Any]]:
    try:
        for line in log.lines():
            yield line.fields
    except Differs as error:
        raise _Ends(str(error)) from error
