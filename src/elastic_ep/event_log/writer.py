"""Encodes the event log's lines some at a time; a thread numbers and chains them, begins new files and deletes old ones.

HAZARD: encoding is not the thread's. It takes the interpreter lock for most of its time, and the event loop, which gives
that away at each system call, would wait for it again and again: together they take twice as long.

A line is a JSON object. It carries its number and a checksum over all lines of the run up to it, so an edited, deleted
or inserted line is found. A file begins with what the run was and, from the second on, with the state of every machine:
replay can begin at any of them, when older ones have been deleted. That is said in the log before it is done.
"""

from __future__ import annotations

import json
import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import structlog

from elastic_ep.config import EventLogMode
from elastic_ep.event_log.files import FORMAT, LogFiles
from elastic_ep.machines import snapshot
from elastic_ep.wire import codec, privacy

BATCH_S = 0.05
"""A kill of the run process loses about so much of the log's end."""
SLICE_S = 2e-4
"""So much is encoded in a turn of the event loop, or `SHARE` of the time since the last turn, if that is more."""
SHARE = 0.2
MAX_PENDING = 50_000
"""Lines that wait for a disk that hangs, before the log ends: some tens of MB."""
PATIENCE_S = 5.0
_BUFFERED_BYTES = 1 << 18
_NOTE_BYTES = 256
"""More than it takes to say that a file is deleted, or what is the same in each first line."""
_ROW = 4096
_EFFECTS_AT_ONCE = 16
_EFFECTS_IN_A_TURN = 512
"""What has more is encoded by the thread."""
_LINES_AT_ONCE = 256
"""The thread is given so many, at least, while there are more to encode."""

Later: TypeAlias = Callable[[float, Callable[[], None]], object]
"""Calls a function after so many seconds; 0: in the next turn of the event loop."""
Item: TypeAlias = tuple[int, str, Any, Any, int]
"""(time, machine, event, effects, cause); a note has no machine: (time, "", kind, facts, 0)."""

# Made once: json.dumps with separators makes an encoder for every call.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_encode_quickly = msgspec.json.Encoder().encode
_operators = structlog.get_logger()


class _Line(NamedTuple):
    """Encoded, but for its number and its checksum."""

    t_ns: int
    text: bytes


class _States(NamedTuple):
    """Between two items: a new file begins here."""

    t_ns: int
    states: Mapping[str, snapshot.State]


class TooSmall(OSError):
    """The limit leaves no room for a line."""


class LogWriter:
    """One thread calls it. Raises OSError when the folder cannot be made or written."""

    def __init__(self, folder: Path, mode: EventLogMode, max_bytes: int) -> None:
        self.wanted = 0
        """So many files are to begin after the first: put the machines' states once for each, then one begins."""
        self._files = LogFiles(folder, max_bytes)
        self._mode = mode
        private = mode is not EventLogMode.FULL
        self._plain = privacy.without_text if private else codec.to_plain
        # To msgspec infinity is null; logprobs may be infinite.
        self._encoded = _quickly if private else _encoded
        self._blanks = privacy.blanks if private else None
        self._run = ""
        self._turns = 0
        self._number = 0
        self._checksum = 0
        self._lines: list[bytes] = []
        self._bytes = 0
        self._later: Later
        self._items: deque[Item | _States] = deque()
        """To be encoded."""
        self._due = False
        """`_encode_some` will be called."""
        self._left_off = math.inf
        """When the last turn ended that did not encode them all."""
        self._pending: deque[_Line | Item | _States | threading.Event] = deque()
        """For the thread."""
        self._ended = False
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="event log", daemon=True)

    @property
    def path(self) -> Path:
        """Of the file that is written to."""
        return self._files.path

    def begin(self, t_ns: int, run: Mapping[str, Any], later: Later) -> None:
        """Write the first line; the thread begins. `later` calls what encodes, on the thread that calls all the rest."""
        self._later = later
        self._run = "".join(_pieces({"format": FORMAT, "mode": self._mode, "began_ns": t_ns, **run}))
        self._begin_file(t_ns, "{}")
        self._thread.start()

    def put(self, item: Item) -> None:
        """Does not block."""
        if self._ended:
            return
        if len(self._items) + len(self._pending) >= MAX_PENDING:
            self._end("the disk does not keep up")
            return
        self._put(item)

    def put_states(self, t_ns: int, states: Mapping[str, snapshot.State]) -> None:
        self._put(_States(t_ns, states))

    def flush(self) -> None:
        """Return when what was put is written, or the log has ended."""
        self._encode_until(math.inf)
        if self._thread.is_alive():
            written = threading.Event()
            self._pending.append(written)
            self._wake.set()
            written.wait(PATIENCE_S)

    def close(self) -> None:
        if self._closing:
            return
        self._encode_until(math.inf)
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._end("the disk does not keep up")
            return
        self._ended = True
        self._files.close()
        if self._files.empty:
            self._files.remove()

    def _put(self, item: Item | _States) -> None:
        self._items.append(item)
        if not self._due:
            self._due = True
            self._later(BATCH_S, self._encode_some)

    def _encode_some(self) -> None:
        """Lines are encoded some at a time: one by one, between other work, each costs twice as much."""
        began = time.monotonic()
        self._encode_until(began + max(SLICE_S, SHARE * (began - self._left_off)))
        self._due = bool(self._items)
        self._left_off = time.monotonic() if self._due else math.inf
        if not self._due or len(self._pending) >= _LINES_AT_ONCE:
            self._wake.set()
        if self._due:
            self._later(0, self._encode_some)

    def _encode_until(self, end: float) -> None:
        if self._ended:
            self._items.clear()
        try:
            while self._items:
                item = self._items.popleft()
                as_it_is = isinstance(item, _States) or len(item[3]) > _EFFECTS_IN_A_TURN
                self._pending.append(item if as_it_is else self._line(*item))
                if time.monotonic() >= end:
                    break
        except Exception as error:
            self._items.clear()
            _operators.exception("an event cannot be encoded")
            self._end(repr(error))

    # The thread

    def _main(self) -> None:
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing
            try:
                self._take()
            except OSError as error:
                self._end(error.strerror or str(error))
            except Exception as error:
                _operators.exception("an event cannot be encoded")
                self._end(repr(error))
            if closing:
                break
        while self._pending:
            item = self._pending.popleft()
            if isinstance(item, threading.Event):
                item.set()

    def _take(self) -> None:
        for _ in range(len(self._pending)):
            item = self._pending.popleft()
            if isinstance(item, threading.Event):
                try:
                    self._write()
                finally:
                    item.set()  # also when the disk is full: nobody is to wait for it
            elif isinstance(item, _States):
                self._turn(item)
            else:
                self._add(item if isinstance(item, _Line) else self._line(*item))
        self._write()
        self.wanted = self._turns + self._files.long

    def _end(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            _operators.warning("the event log ends here", path=str(self.path), why=why)

    # Lines

    def _line(self, t_ns: int, machine: str, what: Any, more: Any, cause: int) -> _Line:
        if not machine:
            # What is in a note nobody has made plain, and JSON's own encoder takes nothing else.
            return _Line(t_ns, _encoded({"t_ns": t_ns, "note": what, **more}))
        effects = [self._plain(effect) for effect in more]
        heard = {"t_ns": t_ns, "machine": machine, "heard": self._plain(what)}
        fields = {**heard, **({"cause": cause} if cause else {}), "effects": effects}
        return _Line(t_ns, _text(fields, self._encoded))

    def _turn(self, put: _States) -> None:
        """Begin a new file, with the machines' states."""
        plain = {name: snapshot.to_plain(state, self._blanks) for name, state in put.states.items()}
        states = "".join(_pieces(plain))
        self._make_room(len(self._run) + len(states) + _NOTE_BYTES, put.t_ns)  # which is said in the old file
        self._write()
        self._files.turn()
        self._begin_file(put.t_ns, states)
        self._turns += 1

    def _begin_file(self, t_ns: int, states: str) -> None:
        files = self._files
        place = f'"segment":{files.number},"after":{self._checksum},"dropped":{files.dropped}'
        self._chain(f'{{"t_ns":{t_ns},"run":{self._run},{place},"states":{states}}}'.encode())
        self._write()
        files.head_written()

    def _add(self, line: _Line) -> None:
        self._make_room(len(line.text), line.t_ns)
        self._chain(line.text)

    def _make_room(self, size: int, t_ns: int) -> None:
        """For a line, and for one more that says what is deleted."""
        while not self._files.room(self._bytes + size + 2 * _NOTE_BYTES):
            oldest = self._files.oldest
            if oldest is None:
                raise TooSmall(0, f"--event-log-max-mb has no room for {size / 1e6:.1f} MB more")
            self._chain(_encode({"t_ns": t_ns, "note": "segment_dropped", "segment": oldest}).encode())
            self._write()
            self._files.drop_oldest()

    def _chain(self, text: bytes) -> None:
        body = b'{"n":%d,%s' % (self._number, text[1:])
        self._number += 1
        self._checksum = zlib.crc32(body, self._checksum)
        self._lines.append(b'%s,"crc":%d}\n' % (body[:-1], self._checksum))
        self._bytes += len(self._lines[-1])
        if self._bytes >= _BUFFERED_BYTES:
            self._write()

    def _write(self) -> None:
        data = b"".join(self._lines)
        self._lines.clear()
        self._bytes = 0
        self._files.write(data)


def _text(fields: Mapping[str, Any], encoded: Callable[[Any], bytes]) -> bytes:
    """HAZARD: as for `_pieces`: an event may have thousands of effects. They come last."""
    effects = fields.get("effects", ())
    if len(effects) <= _EFFECTS_AT_ONCE:
        return encoded(fields)
    head = encoded({**fields, "effects": []})
    return b"%s%s]}" % (head[:-2], b",".join([encoded(effect) for effect in effects]))


def _encoded(value: Any) -> bytes:
    return _encode(value).encode()


def _quickly(value: Any) -> bytes:
    try:
        return _encode_quickly(value)
    except UnicodeEncodeError:  # half a character, as in a file's name: UTF-8 has no bytes for it
        return _encoded(value)


def _pieces(value: Any) -> Iterator[str]:
    """HAZARD: the encoder is a call that keeps the interpreter lock, and the event loop with it: so bit by bit."""
    if type(value) is dict:
        for place, (key, item) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_encode(key)}:"
            yield from _pieces(item)
        yield "}" if value else "{}"
    elif type(value) is not list and type(value) is not tuple:
        yield _encode(value)
    elif any(type(item) in (list, tuple, dict) for item in value):
        for place, item in enumerate(value):
            yield "," if place else "["
            yield from _pieces(item)
        yield "]"
    else:
        for start in range(0, len(value), _ROW):
            yield f"{',' if start else '['}{_encode(value[start : start + _ROW])[1:-1]}"
        yield "]" if value else "[]"
