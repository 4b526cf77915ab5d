"""A private MPS daemon: with it the kernels of several ranks run on one GPU at the same time, not in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from elastic_ep.config import ConfigError

PROGRAM = "nvidia-cuda-mps-control"
_START_S = 20.0
_STOP_S = 15.0
_QUIT = "quit -t 5\n"


def find_program() -> str:
    """Raises `ConfigError` where there is none."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise ConfigError(f"--mps: {PROGRAM} is not installed; it comes with the NVIDIA driver")
    return program


@contextmanager
def mps_daemon(directory: Path) -> Iterator[Mapping[str, str]]:
    """A daemon of this run's own; the environment that its clients need before they touch CUDA. Raises `ConfigError`.

    `directory` is private to the run. A program without this environment does not use the daemon, and none that runs
    on the machine already is used or stopped.
    """
    program = find_program()
    places = {
        "CUDA_MPS_PIPE_DIRECTORY": directory / "mps-pipe",
        "CUDA_MPS_LOG_DIRECTORY": directory / "mps-log",
    }
    for place in places.values():
        place.mkdir(mode=0o700)
    environment = {name: str(place) for name, place in places.items()}
    everything = {**os.environ, **environment}
    try:
        subprocess.run(
            [program, "-d"],
            env=everything,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the daemon keeps what it is given: a pipe would never end
            check=True,
            timeout=_START_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--mps: the MPS daemon does not start: {error}") from error
    try:
        yield environment
    finally:
        _stop(program, everything)


def _stop(program: str, environment: Mapping[str, str]) -> None:
    """Ask; the clients are gone by now. A daemon that does not answer is left to its administrator."""
    try:
        subprocess.run(
            [program],
            input=_QUIT,
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=_STOP_S,
        )
    except subprocess.TimeoutExpired:
        print(
            f"elastic_ep: the MPS daemon does not stop; its pipes were in {environment['CUDA_MPS_PIPE_DIRECTORY']}"
        )
