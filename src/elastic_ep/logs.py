"""What an operator reads: one line a fact on stderr, through structlog. Other modules: `log = structlog.get_logger()`.

Not the event log (`event_log/`), which is for replay. Nothing that happens at every step is written here.
"""

from __future__ import annotations

import logging
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from elastic_ep.config import LogConfig


def configure(config: LogConfig, process: str = "") -> None:
    """Once a process, at its edge. `process` ("rank 2.1", "fork server") stands before each of its lines.

    What libraries say to the standard library's logging comes out alike.
    """
    level = logging.getLevelNamesMapping()[config.level.upper()]

    def name_process(_logger: object, _method: str, entry: EventDict) -> EventDict:
        return {"process": process, **entry} if process else entry

    structlog.configure(
        processors=[
            name_process,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *(_JSON if config.format == "json" else (_prefix, _printable, _console())),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Stderr,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.setLevel(max(level, logging.WARNING))
    root.handlers = [other for other in root.handlers if not isinstance(other, _FromLibraries)]
    root.addHandler(_FromLibraries())
    logging.captureWarnings(True)


_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
"""Libraries may have made some of their own between these."""


class _Stderr:
    """Writes lines to what `sys.stderr` is by then, as the launch display may stand in for it.

    HAZARD: a reader of a pipe that stands still (a pager, a stopped terminal) would stop the event loop, and one that
    has gone would raise. So a line that is not taken at once is dropped. No more than PIPE_BUF bytes at a time: so much a
    pipe that says that it takes some takes without waiting, and keeps apart from other processes' lines.
    """

    def __init__(self, *_arguments: object) -> None:
        pass

    def msg(self, line: str) -> None:
        line += "\n"
        size = select.PIPE_BUF if line.isascii() else select.PIPE_BUF // 4
        with suppress(OSError, ValueError):  # broken, or closed
            for start in range(0, len(line), size):
                if not _takes_some(sys.stderr):
                    return
                sys.stderr.write(line[start : start + size])
                sys.stderr.flush()

    debug = info = warning = error = critical = msg


def _takes_some(stream: TextIO) -> bool:
    """Raises OSError (or ValueError) for a stream that is closed."""
    try:
        fd = stream.fileno()
    except OSError:  # a test's own, in memory
        return True
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in poll.poll(0))


class _FromLibraries(logging.Handler):
    """From the standard library's logging into ours."""

    def emit(self, record: logging.LogRecord) -> None:
        level = max((known for known in _LEVELS if known <= record.levelno), default=logging.DEBUG)
        try:
            text = record.getMessage()
        except Exception:
            text = f"{record.msg} {record.args}"
        structlog.get_logger().log(level, text, logger=record.name, exc_info=record.exc_info)


def _prefix(_logger: object, _method: str, entry: EventDict) -> EventDict:
    process = entry.pop("process", "")
    if process:
        entry["event"] = f"{process}: {entry['event']}"
    return entry


def _printable(_logger: object, _method: str, entry: EventDict) -> EventDict:
    """Texts may be anybody's: they must not look like other lines, nor say anything to the terminal."""
    for name, value in entry.items():
        if isinstance(value, str) and not value.isprintable():
            kept = "\n" if name == "exception" else ""
            shown = (c if c.isprintable() or c in kept else repr(c)[1:-1] for c in value)
            entry[name] = "".join(shown)
    return entry


def _console() -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
    )


def _json_first(_logger: object, _method: str, entry: EventDict) -> dict[str, Any]:
    """Every line begins alike: when, how grave, what."""
    first = {name: entry[name] for name in ("timestamp", "level", "event")}
    return {**first, **entry}


_JSON: tuple[Processor, ...] = (_json_first, structlog.processors.JSONRenderer(default=str))
