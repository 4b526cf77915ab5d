"""Programs and processes that end with the one that started them, however that ends: what tests and benches start.

As a script: `bound.py FD PROGRAM ...` becomes PROGRAM, tied to the life line whose read end is FD; with `parent:PID`
instead of FD tied to its parent, which must be that process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from elastic_ep.host import life_line

_PR_SET_PDEATHSIG = 1
_PARENT = "parent:"


class Bound(subprocess.Popen[str]):
    """`subprocess.Popen` in text mode; the kernel kills the program when this process ends or forgets about it."""

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int] = (), **options: Any) -> None:
        read_end, write_end = life_line.create()
        try:
            super().__init__(
                [sys.executable, __file__, str(read_end), *command],
                pass_fds=(*pass_fds, read_end),
                text=True,
                **options,
            )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        weakref.finalize(self, os.close, write_end)


def run(command: Sequence[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, output captured, for a program that is not to outlive this process.

    Raises `subprocess.TimeoutExpired`.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with Bound(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def tied(target: Callable[..., object], *arguments: Any) -> None:
    """Call `target`, in a process of `multiprocessing` that dies with the one that started it.

    HAZARD: to the kernel the parent may be a fork server, and that lives as long as its children do: each of them has the
    pipe by which it would notice its end. So the pipe counts by which a child knows of the process that started it.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None, "no process of multiprocessing"
    life_line.bind(starter.sentinel)
    target(*arguments)


def _die_with_parent() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    if sys.argv[1].startswith(_PARENT):
        _die_with_parent()
        if os.getppid() != int(sys.argv[1].removeprefix(_PARENT)):
            sys.exit(1)
    else:
        life_line.bind(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
