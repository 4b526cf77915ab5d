"""The event log: `<log-dir>/<run id>/events.jsonl`, one JSON object a line, written through structlog.

It holds every event that a machine heard with the effects that it caused, so `elastic_ep.replay` can feed fresh
machines and compare. Other facts (measured stalls, times of death notices, steps) are notes between them. Every line
carries its number and a checksum chained over all lines before it: an edited, deleted or inserted line is found.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from elastic_ep.codec import to_plain

FLUSH_EVERY_NS = 50_000_000
"""A kill of the run process loses at most so much of the log's end."""

# Made once: json.dumps with separators makes an encoder for every call.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Note(Protocol):
    """Writes a fact that no machine has heard into the log; `EventLog.note` is one."""

    def __call__(self, kind: str, /, **facts: Any) -> None: ...


class _Chain:
    """The last processor: numbers the lines and chains their checksums."""

    def __init__(self) -> None:
        self.number = 0
        self.checksum = 0

    def __call__(self, _logger: object, _method: str, entry: Mapping[str, Any]) -> bytes:
        fields = {"n": self.number, **entry}
        fields.pop("event", None)
        body = _encode(fields).encode()
        self.number += 1
        self.checksum = zlib.crc32(body, self.checksum)
        return b'%s,"crc":%d}' % (body[:-1], self.checksum)


class EventLog:
    """Raises OSError when the folder cannot be written. One thread only.

    A disk that fills up later ends the log, with one line on stderr, and not the service. If not `recording`, only the
    first line is written.
    """

    def __init__(self, folder: Path, *, recording: bool = True) -> None:
        self.recording = recording
        self._pending: list[tuple[int, str, Any, Any]] = []
        self._encoded_ns = 0
        folder.mkdir(parents=True, exist_ok=False)
        self.path = folder / "events.jsonl"
        self._output = _BufferedLogger(self.path)
        # Bound once: a lazy proxy would bind anew for every line.
        self._log = structlog.wrap_logger(
            self._output, processors=[_Chain()], wrapper_class=structlog.BoundLogger
        ).bind()

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """The first line: what replay needs to build the same machines."""
        self._log.msg("", t_ns=time.monotonic_ns(), run=arguments)
        self._output.flush()

    def record(self, machine: str, event: object, effects: Sequence[object]) -> None:
        """Neither `event` nor `effects` may change afterwards: they are encoded later."""
        if self.recording:
            self._defer(machine, event, effects)

    def note(self, kind: str, /, **facts: Any) -> None:
        if self.recording:
            self._defer("", kind, facts)

    def close(self) -> None:
        """Idempotent."""
        self._encode()
        self._output.close()

    def _defer(self, machine: str, what: object, more: Any) -> None:
        """Lines are encoded some at a time: one by one, between other work, each costs twice as much."""
        now = time.monotonic_ns()
        self._pending.append((now, machine, what, more))
        if now - self._encoded_ns >= FLUSH_EVERY_NS:
            self._encoded_ns = now
            self._encode()

    def _encode(self) -> None:
        for t_ns, machine, what, more in self._pending:
            if machine:
                effects = [to_plain(effect) for effect in more]
                self._log.msg("", t_ns=t_ns, machine=machine, heard=to_plain(what), effects=effects)
            else:
                self._log.msg("", t_ns=t_ns, note=what, **more)
        self._pending.clear()
        self._output.flush()


class _BufferedLogger:
    """Like structlog's BytesLogger, which flushes after every line; this one when it is told to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._lines: list[bytes] = []
        self.closed = False

    def msg(self, line: bytes) -> None:
        if not self.closed:
            self._lines.append(line)

    def close(self) -> None:
        if not self.closed:
            self.flush()
        self.closed = True
        self._file.close()

    def flush(self) -> None:
        data = memoryview(b"\n".join([*self._lines, b""]))
        self._lines.clear()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.closed = True
            structlog.get_logger().warning(
                "the event log ends here", path=str(self._path), why=error.strerror
            )
