"""A run's private directories, and their removal whatever happens to the run process."""

from __future__ import annotations

import os
import select
import shutil
import stat
import subprocess
from collections.abc import Mapping
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

    A shell, since it costs a megabyte at most and starts in a millisecond. Raises `NotPrivate`.

    `script` is what it runs before the removal, `arguments` its $2 and so on. The script must read its input, where it
    finds a line (from `finish`) or an end of file: `hang_up`, or this process is dead.
    """

    def __init__(
        self,
        directory: Path,
        script: str = "read -r _",
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        check_private(directory)
        script += '\nexec rm -rf -- "$1"'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", script, "eep-janitor", str(directory.absolute()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
            cwd="/",
            env=environment,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def hear(self, timeout_s: float) -> str:
        """The next line that the script writes; "" if it ends without one, or writes none in time."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        return self._process.stdout.readline().decode().rstrip() if ready else ""

    def finish(self, timeout_s: float = 5.0) -> None:
        """Remove the directory now. Blocks for a few milliseconds."""
        try:
            self._process.communicate(b"\n", timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def hang_up(self, timeout_s: float = 5.0) -> None:
        """Let it do what it would if this process died; if that takes longer, it goes on by itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=timeout_s)
