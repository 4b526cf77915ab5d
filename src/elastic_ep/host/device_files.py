"""Keeps what a process has opened of the GPU driver open beyond its death, until its kernels have ended.

HAZARD: under MPS all clients share their faults. The kernel driver takes a dead client's memory away while its kernels
still run; they fault, and every other client on the GPU gets an illegal memory access. But the driver lets go of a
client only when the last descriptor of it is closed: a second process that holds duplicates decides when that is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_PIDFD_GETFD = 438
_DEVICE = "/dev/nvidia"
_SOCKET = "socket:"
_CLOSED = (errno.ENOENT, errno.EBADF)
_MPS_PROGRAMS = "nvidia-cuda-mps"
"""What the names of MPS's daemon and server begin with; /proc shows 15 characters of a name."""
_PEER = struct.Struct("3i")
_libc = ctypes.CDLL(None, use_errno=True)


class DeviceFiles:
    """Duplicates of all descriptors through which process `pid` reaches the driver and MPS, as of now."""

    def __init__(self, pid: int) -> None:
        """Raises OSError if the process is gone or may not be looked into (as for a debugger)."""
        self._fds: list[int] = []
        try:
            self._fds.extend(_duplicates(pid))  # one by one: what an error leaves behind is known
            self.complete = _has_files(pid)
            """False: the process may have been dying, with some of its descriptors closed already."""
        except OSError:
            self.release()
            raise

    def __len__(self) -> int:
        return len(self._fds)

    def release(self) -> None:
        """Let the driver take everything back. HAZARD: takes it tenths of a second, seconds with much pinned memory."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def _duplicates(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if not target.startswith((_DEVICE, _SOCKET)):
                    continue
                fd = _duplicate(pidfd, int(name))
            except OSError as error:
                if error.errno in _CLOSED:  # meanwhile, by the process itself
                    continue
                raise
            if target.startswith(_DEVICE) or _is_mps(fd):
                yield fd
            else:
                os.close(fd)
    finally:
        os.close(pidfd)


def _has_files(pid: int) -> bool:
    """A process that ends gives up the table of its descriptors first, and closes them then."""
    try:
        return bool(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def _duplicate(pidfd: int, number: int) -> int:
    fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"pidfd_getfd: {os.strerror(error)}")
    return fd


def _is_mps(fd: int) -> bool:
    """Whether a socket leads to MPS."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            pid, _, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        return Path(f"/proc/{pid}/comm").read_text().startswith(_MPS_PROGRAMS)
    except OSError:
        return False
