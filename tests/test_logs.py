"""The operator's lines: their form, their level, and that a reader who does not read holds nobody up."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elastic_ep import logs
from elastic_ep.config import LOG_LEVELS, ConfigError, LogConfig, ServeConfig
from elastic_ep.group.display import LaunchDisplay
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.placement import launch_placement
from tests.kit.bound import run


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.setLevel(level)
    root.handlers = handlers


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "stdout is for what is not a log"
    return captured.err.splitlines()


def test_a_line_of_json_says_when_how_grave_what_and_who(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig("info", "json"), "rank 2.1")
    structlog.get_logger().warning("rank lost", path=Path("x"), tokens=[1, 2], text='a "quote"\nand a line')
    (line,) = lines(capsys)
    entry = json.loads(line)
    assert list(entry)[:3] == ["timestamp", "level", "event"]
    assert entry["timestamp"].endswith("Z")
    del entry["timestamp"]
    assert entry == {
        "level": "warning", "event": "rank lost", "process": "rank 2.1", "path": "x", "tokens": [1, 2],
        "text": 'a "quote"\nand a line',
    }  # fmt: skip


def test_on_a_console_the_process_stands_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig("info", "console"), "rank 2.1")
    structlog.get_logger().info("hello", why="a reason")
    (line,) = lines(capsys)
    assert "rank 2.1: hello" in line
    assert "why='a reason'" in line
    assert "\x1b" not in line, "colours are for terminals"


@pytest.mark.parametrize("form", ["json", "console"])
@given(text=st.text(max_size=30))
@example(text="\x1b[31m\n2026-01-01 [info] another\r\u2028line\x85\udc80")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_is_one_line_that_says_nothing_to_the_terminal(
    form: str, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    logs.configure(LogConfig("info", form), "rank 2.1")
    structlog.get_logger().info(f"said {text}", why=text)
    (line,) = lines(capsys)
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["why"] == text


@pytest.mark.parametrize("level", LOG_LEVELS)
def test_each_level_shows_itself_and_what_is_graver(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig(level, "json"))
    for each in LOG_LEVELS:
        getattr(structlog.get_logger(), each)("said")
    assert [json.loads(line)["level"] for line in lines(capsys)] == list(
        LOG_LEVELS[LOG_LEVELS.index(level) :]
    )


@pytest.mark.parametrize("form", ["json", "console"])
def test_what_libraries_log_comes_out_alike(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig("info", form))
    logs.configure(LogConfig("info", form))  # twice is once
    logging.getLogger("some.library").info("chatter")
    try:
        raise KeyError("gone")
    except KeyError:
        logging.getLogger("some.library").exception("%s of %s", "one", "two")
    said = lines(capsys)
    assert "one of two" in said[0]
    assert not any("chatter" in line for line in said)
    if form == "json":
        (line,) = said
        entry = json.loads(line)
        assert entry["logger"] == "some.library"
        assert "KeyError: 'gone'" in entry["exception"]
    else:
        assert said[-1] == "KeyError: 'gone'"


@pytest.mark.parametrize("level", [31, 39, 55])
def test_a_library_may_have_levels_and_mistakes_of_its_own(
    level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(LogConfig("info", "json"))
    record = logging.LogRecord("some.library", level, "", 0, "%s of %s", ("one",), None)
    for handler in logging.getLogger().handlers:
        if type(handler).__module__ == logs.__name__:
            handler.handle(record)
    (line,) = lines(capsys)
    assert "%s of %s" in json.loads(line)["event"]


def test_pythons_warnings_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig("info", "json"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # catch_warnings has put back what showed them before
        logging.captureWarnings(True)
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    (line,) = lines(capsys)
    entry = json.loads(line)
    assert "DeprecationWarning: old ways" in entry["event"]
    assert entry["level"] == "warning"


def test_beside_the_live_table_lines_come_out_whole_and_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    logs.configure(LogConfig("info", "json"))
    machine = MembershipMachine(2, launch_placement(2, 1, 2, 2))

    def drawn() -> int:
        return terminal.getvalue().count("incarnation")

    async def beside_lines() -> str:
        table = asyncio.create_task(LaunchDisplay(machine).show())
        async with asyncio.timeout(30):
            while drawn() < 1:
                await asyncio.sleep(0.01)
            structlog.get_logger().warning("rank lost", why="[/markup] and \\[more]")
            drawn_then = drawn()
            while drawn() == drawn_then:
                await asyncio.sleep(0.01)
            shown = terminal.getvalue()
            machine.records[0].reason = "[/nothing] that closes"
            while "that closes" not in terminal.getvalue():
                await asyncio.sleep(0.01)
            table.cancel()
        return shown

    shown = asyncio.run(beside_lines())
    line = next(line for line in shown.splitlines() if "rank lost" in line)
    assert json.loads(line[line.index("{") : line.rindex("}") + 1])["why"] == "[/markup] and \\[more]"
    assert shown.rindex("incarnation") > shown.index("rank lost")
    assert terminal is sys.stderr


def test_elsewhere_the_table_is_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(LaunchDisplay(MembershipMachine(2, launch_placement(2, 1, 2, 2))).show())
    assert lines(capsys) == []


def test_words_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--log-level loud"):
        ServeConfig(ranks=1, model="", log_level="loud")
    with pytest.raises(ConfigError, match="--log-format xml"):
        ServeConfig(ranks=1, model="", log_format="xml")


_WRITER = """
import sys, structlog
from elastic_ep import logs
from elastic_ep.config import LogConfig
logs.configure(LogConfig("info", "json"))
for number in range(2000):
    structlog.get_logger().info("a line", number=number, padding="x" * int(sys.argv[1]))
print("done")
"""


def write_many(stderr: int, padding: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WRITER, str(padding)]
    return run(command, 60, stderr=stderr)


@pytest.mark.parametrize("padding", [100, 9000])
def test_a_reader_that_stands_still_holds_nobody_up(padding: int) -> None:
    read_end, write_end = os.pipe()
    try:
        assert write_many(write_end, padding).stdout == "done\n"
        os.close(write_end)
        with os.fdopen(read_end, "rb", closefd=False) as reader:
            first = reader.readline()
        assert json.loads(first)["number"] == 0, "what fits is written whole"
    finally:
        os.close(read_end)


def test_a_reader_that_has_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = write_many(write_end, 100)
    os.close(write_end)
    assert done.stdout == "done\n"
