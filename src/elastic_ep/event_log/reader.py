"""Reading a run's event log: every byte is checked, and the machines begin where the log does."""

from __future__ import annotations

import importlib.metadata
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_ep.config import EventLogMode
from elastic_ep.event_log.files import CURRENT, FORMAT, segment_name
from elastic_ep.machines.registry import MACHINES
from elastic_ep.machines.snapshot import restore
from elastic_ep.wire import privacy

_SEGMENT = re.compile(r"events\.(\d{6,})\.jsonl")


class Unreadable(Exception):
    """There is no log to replay."""


class Differs(Exception):
    """A line is not what the run wrote, or not what the machines say."""


@dataclass(frozen=True)
class Line:
    """`where` names it for an operator."""

    where: str
    fields: dict[str, Any]


class Log:
    """The log at `path`: the folder of a run, or one of its files. `begins` is the first line that is left.

    `since_ns` (CLOCK_MONOTONIC): files whose lines are all older are left out.

    Raises `Unreadable`, `Differs`.
    """

    def __init__(self, path: Path, since_ns: int | None = None) -> None:
        self.cut_off = False
        """Its last line is not whole."""
        self._whole = path.is_dir() and since_ns is None
        self._files = _files(path) if since_ns is None else _newer(_files(path), since_ns)
        self.segment = 1
        """The number of the first file that is left."""
        first = self._files[0]
        self._checksum, self._number = _start(first)
        self._checked = self._lines()
        begins = next(self._checked, None)
        if begins is None or "run" not in begins.fields:
            raise Unreadable(f"{first}: no first line that says what the run was")
        self.begins = begins
        self.run: dict[str, Any] = begins.fields["run"]
        if (written := self.run.get("format", 1)) != FORMAT:
            raise Unreadable(
                f"{first}: the log of elastic_ep {self.run.get('version')} has format {written!r}, this one reads "
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

    def _lines(self) -> Iterator[Line]:
        for file in self._files:
            data = _read(file)
            if not data.endswith(b"\n"):
                if file is not self._files[-1]:
                    raise Differs(f"{file.name}: its end is missing")
                self.cut_off = True
            self._check_continuity(file, data)
            for index, raw in enumerate(data.split(b"\n")[:-1]):
                line = self._check(f"{file.name} line {index + 1}", raw)
                if (index == 0) is not ("run" in line.fields):
                    raise Differs(
                        f"{line.where}: the first line of a file, and no other, says what the run was"
                    )
                yield line

    def _check_continuity(self, file: Path, data: bytes) -> None:
        """A better word than that some checksum is wrong."""
        head = _parsed(data.partition(b"\n")[0])
        place = self._files.index(file)
        if head is None or place == 0:
            return
        expected = self.segment + place
        if head.get("segment") != expected:
            raise Differs(f"{segment_name(expected)} is missing before {file.name}")
        if head["n"] != self._number or head.get("after") != self._checksum:
            raise Differs(f"{self._files[place - 1].name}: its end is missing, or was changed")

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


def _newer(files: list[Path], since_ns: int) -> list[Path]:
    """Without those that were complete by then."""
    for place in range(len(files) - 1, 0, -1):
        first = _parsed(_first_line(files[place]))
        if first is not None and first["t_ns"] <= since_ns:
            return files[place:]
    return files


def _first_line(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.readline().rstrip(b"\n")
    except OSError as error:
        raise Unreadable(f"{file}: {error.strerror}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unreadable(f"{file}: {error.strerror}") from error


def _start(file: Path) -> tuple[int, int]:
    """The checksum and the number that the first line of `file` goes on from, as it says itself."""
    first = _parsed(_first_line(file)) or {}
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
