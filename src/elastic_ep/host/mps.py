"""A private MPS daemon: with it the kernels of several ranks run on one GPU at the same time, not in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

from elastic_ep.config import ConfigError
from elastic_ep.host.private_directory import Janitor, remove

PROGRAM = "nvidia-cuda-mps-control"
_START_S = 20
_STOP_S = 15
_MARGIN_S = 5
_QUIT = "quit -t 5"
_TIMED_OUT = ("124", "137", "")
"""What timeout(1) ends with after SIGTERM and SIGKILL; nothing, if not even those ended the program."""
_SCRIPT = f"""
timeout -k 1 {_START_S} "$2" -d </dev/null >/dev/null 2>&1
(echo $?)
read -r _ || echo {_QUIT} | timeout -k 1 {_STOP_S} "$2" >/dev/null
"""
"""The janitor's, which also starts the daemon: so no quit comes too early where the run process dies meanwhile.

The daemon keeps the descriptors that it is given: a pipe would never end. The status goes out from a subshell, which
alone gets a SIGPIPE. HAZARD: at an end of file ranks may still be dying, and a plain quit would wait for those that hang.
"""


def find_program() -> str:
    """Raises `ConfigError` where there is none."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise ConfigError(f"--mps: {PROGRAM} is not installed; it comes with the NVIDIA driver")
    return program


@contextmanager
def mps_daemon() -> Iterator[Mapping[str, str]]:
    """A daemon of this run's own; the environment that its clients need before they touch CUDA. Raises `ConfigError`.

    It ends when this process does, however that ends. A program without this environment does not use it, and none
    that runs on the machine already is used or stopped.

    HAZARD: the daemon is reached through its pipes alone, and the run's private directory is removed as soon as the run
    process is dead: so they are in a directory of their own, which goes after the daemon was told to quit.
    """
    program = find_program()
    directory = Path(tempfile.mkdtemp(prefix="elastic_ep-mps-"))
    places = {
        "CUDA_MPS_PIPE_DIRECTORY": directory / "pipe",
        "CUDA_MPS_LOG_DIRECTORY": directory / "log",
    }
    for place in places.values():
        place.mkdir(mode=0o700)
    environment = {name: str(place) for name, place in places.items()}
    everything = {**os.environ, **environment}
    janitor = Janitor(directory, _SCRIPT, program, environment=everything)
    started = False
    try:
        status = janitor.hear(_START_S + _MARGIN_S)
        if status != "0":
            what = "takes too long" if status in _TIMED_OUT else f"ends with status {status}"
            raise ConfigError(f"--mps: the MPS daemon does not start: {PROGRAM} -d {what}")
        started = True
        yield environment
    finally:
        if started:
            _stop(program, everything)
            janitor.finish()
            remove(directory)  # if somebody has killed the janitor
        else:
            janitor.hang_up()


def _stop(program: str, environment: Mapping[str, str]) -> None:
    """Ask; the clients are gone by now. A daemon that does not answer is left to its administrator."""
    try:
        subprocess.run(
            [program],
            input=f"{_QUIT}\n",
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=_STOP_S,
        )
    except subprocess.TimeoutExpired:
        structlog.get_logger().warning(
            "the MPS daemon does not stop", pipes=environment["CUDA_MPS_PIPE_DIRECTORY"], waited_s=_STOP_S
        )
