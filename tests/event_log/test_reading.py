"""A log is read as it was when reading began, while its run goes on, and in no more memory than a few of its lines."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.event_log import reader
from elastic_ep.event_log.files import CURRENT, RANKS, segment_name
from elastic_ep.event_log.log import EventLog
from elastic_ep.event_log.reader import Log, Unreadable
from elastic_ep.film.read import film_of
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.replay import SAME, main, replay_ranks
from tests.event_log.test_event_log import CONFIG, contents, story


class Run:
    """Writes on whenever it is told to, and nothing meanwhile."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._machine = RoutingMachine(CONFIG)
        ticks = itertools.count()
        self._log = EventLog(folder, max_bytes=max_bytes, clock_ns=lambda: next(ticks))
        config = {"routing": {"config": ["RoutingConfig", *dataclasses.astuple(CONFIG)]}}
        self._log.begin({"version": "0.1.0", "machines": config}, {"routing": self._machine})
        self._story = story(5, 100_000)

    def go_on(self, events: int) -> None:
        for place, then in enumerate(itertools.islice(self._story, events)):
            event = then(self._machine)
            self._log.record("routing", event, self._machine.step(event))
            if place % 20 == 0:
                self._log.flush()
        self._log.flush()

    def end(self) -> None:
        self._log.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Some of its files are deleted already."""
    made = Run(tmp_path / "run", max_bytes=120_000)
    made.go_on(2500)
    assert segment_name(1) not in contents(made.folder)
    yield made
    made.end()


def numbers(log: Log) -> list[int]:
    return [log.begins.fields["n"], *(line.fields["n"] for line in log.lines())]


def lines_in(folder: Path) -> list[int]:
    """How many lines the files have that a reader finds."""
    return [len(data.splitlines()) for data in contents(folder).values()]


def test_what_is_read_is_what_there_was_when_reading_began(run: Run) -> None:
    there = sum(lines_in(run.folder))
    log = Log(run.folder)
    before = set(contents(run.folder))
    run.go_on(2500)
    assert before & set(contents(run.folder)) == {CURRENT}, "all of them were renamed or deleted"
    found = numbers(log)
    assert found == list(range(found[0], found[0] + there))
    assert not log.cut_off


@pytest.mark.parametrize("from_the_end", [1, 4])
@pytest.mark.parametrize("events", [110, 1000])
def test_files_that_come_and_go_while_they_are_opened_are_opened_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, from_the_end: int, events: int
) -> None:
    """One more, or all of them."""
    opened, times = reader._open, itertools.count()
    place = len(contents(run.folder)) - from_the_end

    def slowly(path: Path, stack: ExitStack) -> Any:
        if next(times) == place:
            run.go_on(events)
        return opened(path, stack)

    monkeypatch.setattr(reader, "_open", slowly)
    log = Log(run.folder)
    assert len(numbers(log)) == sum(lines_in(run.folder)), "all of them, and all of each"
    assert next(times) > place + 1


def test_opening_them_is_given_up_in_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = reader._open

    def too_slowly(path: Path, stack: ExitStack) -> Any:
        run.go_on(300)
        return opened(path, stack)

    monkeypatch.setattr(reader, "_TRIES", 3)
    monkeypatch.setattr(reader, "_open", too_slowly)
    with pytest.raises(Unreadable, match="come and go"):
        Log(run.folder)


def test_a_film_and_a_replay_of_a_run_that_goes_on_say_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run.folder), "--quiet"]) == SAME
    assert "goes on" not in capsys.readouterr().out
    checked = Log._check

    def meanwhile(self: Log, where: str, raw: bytes) -> Any:
        if where == f"{CURRENT} line 2":
            run.go_on(3)
        return checked(self, where, raw)

    monkeypatch.setattr(Log, "_check", meanwhile)
    assert main([str(run.folder), "--html", str(tmp_path / "film.html"), "--quiet"]) == SAME
    told = capsys.readouterr()
    assert "the run goes on" in told.out
    assert "not whole: the run goes on" in told.err
    assert film_of(run.folder, since_ns=0)["partial"] == "", "whoever asks for one loss knows that"


def test_logs_of_ranks_that_are_deleted_meanwhile_are_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0.1", "0.2"):
        rank = Run(run.folder / RANKS / name, max_bytes=0)
        rank.go_on(5)
        rank.end()
    opened = reader._opened

    def too_late(path: Path, *rest: Any) -> Any:
        if path.name == "0.1":
            (path / CURRENT).unlink()
            path.rmdir()
        return opened(path, *rest)

    monkeypatch.setattr(reader, "_opened", too_late)
    assert replay_ranks(run.folder) == 1


def test_a_log_is_not_read_into_memory(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", max_bytes=0)
    run.go_on(1500)
    run.end()
    size = (run.folder / CURRENT).stat().st_size
    log = Log(run.folder)
    lines = log.lines()
    for _ in range(50):  # what is made once
        next(lines)
    tracemalloc.start()
    with suppress(StopIteration):
        while next(lines):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
