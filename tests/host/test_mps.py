"""The private MPS daemon, with a control program that starts a real process, which is told to quit through a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.host.mps import PROGRAM, find_program, mps_daemon
from elastic_ep.host.private_directory import Janitor
from elastic_ep.plan import make_plan
from elastic_ep.run import BUNDLED_MODEL
from tests.kit.bound import Bound
from tests.kit.harness import DEADLINE_S, alive, wait_until

FAKE = """#!/bin/sh
control="$CUDA_MPS_PIPE_DIRECTORY/control"
if [ "$1" = -d ]; then
    echo "start $CUDA_MPS_PIPE_DIRECTORY" >> calls
    {before}
    mkfifo "$control"
    setsid sh -c 'echo "pid $$" >> calls; read -r line < "$0"; echo "$line" >> calls' "$control" &
else
    echo "asked" >> calls
    [ -p "$control" ] || exit 1
    cat > "$control"
fi
"""
RUN = """
import signal
from elastic_ep.host.mps import mps_daemon
with mps_daemon():
    print("ready", flush=True)
    signal.pause()
"""


class Control:
    """A fake control program, which is the only one on the path; it does `before` before it starts its daemon."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = ":") -> None:
        self._calls = folder / "calls"
        self._calls.touch()
        program = folder / PROGRAM
        program.write_text(FAKE.replace("{before}", before).replace("calls", str(self._calls)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def said(self, word: str) -> list[str]:
        """What followed `word`, each time."""
        lines = [line.partition(" ") for line in self._calls.read_text().splitlines()]
        return [rest for first, _, rest in lines if first == word]

    @property
    def pipes(self) -> Path:
        (directory,) = self.said("start")
        return Path(directory)

    @property
    def pid(self) -> int:
        """Of the daemon."""
        wait_until(lambda: bool(self.said("pid")), DEADLINE_S, "the daemon runs")
        (pid,) = map(int, self.said("pid"))
        return pid

    def check_that_all_is_gone(self) -> None:
        """The daemon has been told, once, and its directory is removed."""
        wait_until(lambda: not alive(self.pid), DEADLINE_S, "the daemon's end")
        wait_until(lambda: not self.pipes.parent.exists(), DEADLINE_S, "the directory removed")
        assert self.said("quit") == ["-t 5"]
        assert len(self.said("asked")) == 1

    def clean_up(self) -> None:
        for pid in map(int, self.said("pid")):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    control = Control(tmp_path, monkeypatch)
    yield control
    control.clean_up()


@contextmanager
def running() -> Iterator[subprocess.Popen[str]]:
    with Bound([sys.executable, "-c", RUN], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_is_started_in_a_private_directory_and_stopped(control: Control) -> None:
    with mps_daemon() as environment:
        assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(control.pipes)
        assert control.pipes.is_dir()
        assert control.pipes.parent.stat().st_mode & 0o777 == 0o700
        assert alive(control.pid)
        assert control.said("quit") == []
    control.check_that_all_is_gone()


def test_it_is_stopped_after_an_error_too(control: Control) -> None:
    with pytest.raises(RuntimeError, match="inside"), mps_daemon():
        raise RuntimeError("inside")
    control.check_that_all_is_gone()


def test_it_is_stopped_without_its_janitor_too(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Janitor.finish

    def of_a_dead_one(janitor: Janitor) -> None:
        os.kill(janitor.pid, signal.SIGKILL)
        finish(janitor)

    monkeypatch.setattr(Janitor, "finish", of_a_dead_one)
    with mps_daemon():
        pass
    control.check_that_all_is_gone()


def test_it_does_not_outlive_a_run_process_that_is_killed(control: Control) -> None:
    with running() as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert alive(control.pid)
    control.check_that_all_is_gone()


def test_nor_one_that_is_killed_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    control = Control(tmp_path, monkeypatch, before=f"read -r _ < {gate}")
    try:
        with running():
            wait_until(lambda: bool(control.said("start")), DEADLINE_S, "the daemon about to start")
        gate.write_text("now\n")
        control.check_that_all_is_gone()
    finally:
        control.clean_up()


def test_one_that_does_not_start_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(tmp_path, monkeypatch, before="exit 3")
    with (
        pytest.raises(
            ConfigError, match=f"--mps: the MPS daemon does not start: {PROGRAM} -d ends with status 3"
        ),
        mps_daemon(),
    ):
        pass
    assert not control.pipes.parent.exists()


def test_one_that_starts_too_late_is_stopped(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Janitor, "hear", lambda self, timeout_s: "")
    with pytest.raises(ConfigError, match="-d takes too long"), mps_daemon():
        pass
    control.check_that_all_is_gone()


def test_a_missing_program_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"--mps: {PROGRAM} is not installed"):
        find_program()


def test_it_is_of_no_use_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--mps needs --device cuda"):
        make_plan(ServeConfig(ranks=1, model=str(BUNDLED_MODEL), device="cpu", mps=True))
