"""The directory of a run's sockets, and its removal whatever happens to the run process."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path


class NotPrivate(ValueError):
    """This is not a directory that one run made for itself."""


def check_private(directory: Path) -> None:
    """Raises `NotPrivate` unless it is a real directory, ours, with mode 0700 (as from tempfile.mkdtemp)."""
    try:
        status = os.lstat(directory)
    except OSError as error:
        raise NotPrivate(f"{directory}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise NotPrivate(f"{directory} is not a directory")
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise NotPrivate(f"{directory} must belong to this user and have mode 0700")


def remove(directory: Path) -> None:
    """Remove it if it is (still) a private directory; else leave it alone."""
    with suppress(NotPrivate):
        check_private(directory)
        shutil.rmtree(directory, ignore_errors=True)


class Janitor:
    """A tiny process that outlives this one just long enough to remove `directory`.

    The fork server removes it too; this covers a run process that is killed while no fork server lives. A shell,
    since it costs a megabyte at most and starts in a millisecond. Raises `NotPrivate`.
    """

    def __init__(self, directory: Path) -> None:
        check_private(directory)
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; exec rm -rf -- "$1"', "eep-janitor", str(directory.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            cwd="/",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self, timeout_s: float = 5.0) -> None:
        """Remove the directory now. Blocks for a few milliseconds."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
