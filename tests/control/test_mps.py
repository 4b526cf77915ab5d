"""The private MPS daemon, with a program that only writes down how it was called."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.control.mps import PROGRAM, find_program, mps_daemon
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.serve_plan import make_plan


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, status: int = 0) -> Path:
    """The log of a fake control program, which is the only one on the path."""
    log = folder / "calls"
    program = folder / PROGRAM
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -d ]; then echo "start $CUDA_MPS_PIPE_DIRECTORY" >> {log}; exit {status}; fi\n'
        f'read -r line; echo "$line $CUDA_MPS_PIPE_DIRECTORY" >> {log}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


def test_it_is_started_in_the_private_directory_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install(tmp_path, monkeypatch)
    private = tmp_path / "private"
    private.mkdir()
    pipe = private / "mps-pipe"
    with mps_daemon(private) as environment:
        assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(pipe)
        assert pipe.is_dir()
        assert log.read_text() == f"start {pipe}\n"
    assert log.read_text() == f"start {pipe}\nquit -t 5 {pipe}\n"


def test_it_is_stopped_after_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="inside"), mps_daemon(tmp_path):
        raise RuntimeError("inside")
    assert "quit" in log.read_text()


def test_one_that_does_not_start_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, status=3)
    with pytest.raises(ConfigError, match="--mps: the MPS daemon does not start"), mps_daemon(tmp_path):
        pass


def test_a_missing_program_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"--mps: {PROGRAM} is not installed"):
        find_program()


def test_it_is_of_no_use_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--mps needs --device cuda"):
        make_plan(ServeConfig(ranks=1, model=str(BUNDLED_MODEL), device="cpu", mps=True))
