"""Reading a run's event log: every byte is checked, and the machines begin where the log does.

It is read line by line, so a long log takes no more memory than a short one. The run may still write it: what there is
when reading begins is read, whatever is renamed, deleted or written meanwhile.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from elastic_ep.config import EventLogMode
from elastic_ep.event_log.files import CURRENT, FORMAT, segment_name
from elastic_ep.machines.registry import MACHINES
from elastic_ep.machines.snapshot import restore
from elastic_ep.wire import privacy

_SEGMENT = re.compile(r"events\.(\d{6,})\.jsonl")
_TRIES = 100
"""To open files before the run renames or deletes one of them, which it does once in many seconds at most."""


class Unreadable(Exception):
    """There is no log to replay."""


class Differs(Exception):
    """A line is not what the run wrote, or not what the machines say."""


@dataclass(frozen=True)
class Line:
    """`where` names it for an operator."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class _File:
    """Open; `size` is how much of it there was."""

    path: Path
    opened: BinaryIO
    size: int

    @property
    def name(self) -> str:
        return self.path.name

    def line(self, limit: int = -1) -> bytes:
        try:
            return self.opened.readline(limit)
        except OSError as error:
            raise Unreadable(f"{self.path}: {error.strerror}") from error

    def first_line(self) -> bytes:
        """What is read next is the first line again."""
        line = self.line()
        self.opened.seek(0)
        return line.rstrip(b"\n")


class Log:
    """The log at `path`: the folder of a run, or one of its files. `begins` is the first line that is left.

    `since_ns` (CLOCK_MONOTONIC): files whose lines are all older are left out.

    Raises `Unreadable`, `Differs`.
    """

    def __init__(self, path: Path, since_ns: int | None = None) -> None:
        self.cut_off = False
        """Its last line is not whole."""
        self.growing = False
        """The run has written more meanwhile."""
        self._whole = path.is_dir() and since_ns is None
        self.segment = 1
        """The number of the first file that is left."""
        self._checksum = self._number = 0
        self._first = path
        """The first file that is read."""
        self._before = ""
        """The name of the file before the one that is being read."""
        self._checked = self._lines(path, since_ns)
        begins = next(self._checked, None)
        if begins is None or "run" not in begins.fields:
            raise Unreadable(f"{self._first}: no first line that says what the run was")
        self.begins = begins
        self.run: dict[str, Any] = begins.fields["run"]
        if (written := self.run.get("format", 1)) != FORMAT:
            raise Unreadable(
                f"{self._first}: the log of elastic_ep {self.run.get('version')} has format {written!r}, this one reads "
                f"{FORMAT}: replay it with the version that wrote it"
            )
        self.dropped: int = begins.fields.get("dropped", 0)
        """How many files the run has deleted, as far as heard."""
        self.segment = begins.fields.get("segment", 1)

    @property
    def private(self) -> bool:
        """Whether there is no text in it."""
        return bool(self.run.get("mode") == EventLogMode.IDS)

    def machines(self) -> dict[str, Any]:
        """As they were where the log begins."""
        try:
            made = {name: MACHINES[name].build(plain) for name, plain in self.run["machines"].items()}
            for name, state in self.begins.fields.get("states", {}).items():
                restore(made[name], state)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise Unreadable(
                f"{self.begins.where} does not describe the machines: {error!r}{self.of_another_version}"
            ) from error
        return made

    @property
    def of_another_version(self) -> str:
        """What to say of it, beside any fault."""
        written_by, here = self.run.get("version"), importlib.metadata.version("elastic-ep")
        if written_by in (None, here):
            return ""
        return f" (the log is of elastic_ep {written_by}, this is {here})"

    def lines(self) -> Iterator[Line]:
        """Those after the first, up to the last whole one."""
        for line in self._checked:
            if line.fields.get("note") == "segment_dropped":
                self.dropped = max(self.dropped, line.fields["segment"])
            yield line
        if self._whole and not self.cut_off and self.segment > self.dropped + 1:
            raise Differs(
                f"{segment_name(self.dropped + 1)} is missing, and it was not the run that deleted it"
            )

    def _lines(self, path: Path, since_ns: int | None) -> Iterator[Line]:
        with ExitStack() as stack:
            files = _opened(path, since_ns, stack)
            self._first = files[0].path
            self._checksum, self._number = _start(files[0])
            for place, file in enumerate(files):
                for number, raw in self._whole_lines(file, last=file is files[-1]):
                    if number == 1 and place:
                        self._check_continuity(file, self.segment + place, raw)
                    line = self._check(f"{file.name} line {number}", raw)
                    if (number == 1) is not ("run" in line.fields):
                        raise Differs(
                            f"{line.where}: the first line of a file, and no other, says what the run was"
                        )
                    yield line
                self._before = file.name
            self.growing = os.fstat(files[-1].opened.fileno()).st_size > files[-1].size

    def _whole_lines(self, file: _File, last: bool) -> Iterator[tuple[int, bytes]]:
        """Numbered from 1, without their ends."""
        left, number, raw = file.size, 0, b""
        while left and (raw := file.line(left)):
            left -= len(raw)
            number += 1
            if raw.endswith(b"\n"):
                yield number, raw[:-1]
        if not raw.endswith(b"\n"):
            if not last:
                raise Differs(f"{file.name}: its end is missing")
            self.cut_off = True

    def _check_continuity(self, file: _File, expected: int, raw: bytes) -> None:
        """A better word than that some checksum is wrong. `file` begins with `raw`."""
        head = _parsed(raw)
        if head is None:
            return
        if head.get("segment") != expected:
            raise Differs(f"{segment_name(expected)} is missing before {file.name}")
        if head["n"] != self._number or head.get("after") != self._checksum:
            raise Differs(f"{self._before}: its end is missing, or was changed")

    def _check(self, where: str, raw: bytes) -> Line:
        body, found, end = raw.rpartition(b',"crc":')
        self._checksum = zlib.crc32(body + b"}", self._checksum)
        if not found or end != b"%d}" % self._checksum:
            why = "the checksum does not match: this line was changed, or one before it is missing"
            raise Differs(f"{where}: {why}")
        fields = _parsed(raw)
        if fields is None:
            raise Differs(f"{where}: it is no line of a log")
        if fields["n"] != self._number:
            raise Differs(f"{where}: its number is {fields['n']}, expected {self._number}")
        self._number += 1
        return Line(where, fields)


def _files(path: Path) -> list[Path]:
    """In the order in which they were written."""
    try:
        if path.is_file():
            return [path]
        names = {file.name for file in path.iterdir()}
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    complete = sorted((int(found[1]), name) for name in names if (found := _SEGMENT.fullmatch(name)))
    files = [path / name for _, name in complete] + [path / CURRENT] * (CURRENT in names)
    if not files:
        raise Unreadable(f"{path}: there is no event log here; with --event-log off a run writes none")
    return files


def _opened(path: Path, since_ns: int | None, stack: ExitStack) -> list[_File]:
    """All of them at one time. They are closed with `stack`.

    HAZARD: a run that goes on renames the file that it writes, and deletes the oldest. Once they are open that is no
    matter, so they are opened again until their names were the same before and after.
    """
    for _ in range(_TRIES):
        with ExitStack() as here:
            paths = _files(path)
            try:
                files = [_open(file, here) for file in paths]
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Unreadable(f"{error.filename}: {error.strerror}") from error
            if paths == _files(path):
                stack.push(here.pop_all())
                return files if since_ns is None else _newer(files, since_ns)
    raise Unreadable(f"{path}: its files come and go all the time")


def _open(path: Path, stack: ExitStack) -> _File:
    opened = stack.enter_context(path.open("rb"))
    return _File(path, opened, os.fstat(opened.fileno()).st_size)


def _newer(files: list[_File], since_ns: int) -> list[_File]:
    """Without those that were complete by then."""
    for place in range(len(files) - 1, 0, -1):
        first = _parsed(files[place].first_line())
        if first is not None and first["t_ns"] <= since_ns:
            return files[place:]
    return files


def _start(file: _File) -> tuple[int, int]:
    """The checksum and the number that the first line of `file` goes on from, as it says itself."""
    first = _parsed(file.first_line()) or {}
    after, number = first.get("after", 0), first.get("n", 0)
    return (after if type(after) is int else 0), (number if type(number) is int else 0)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """None: it is none of a log's lines. Deleted tokens are zeros."""
    try:
        fields = json.loads(raw, object_hook=privacy.expanded)
    except (ValueError, RecursionError):
        return None
    wanted = isinstance(fields, dict) and type(fields.get("n")) is int and type(fields.get("t_ns")) is int
    return fields if wanted else None
