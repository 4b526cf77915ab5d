"""The fork server: imports what ranks need once, then forks them in milliseconds.

``python -m elastic_ep.host.fork_server CONTROL_FD MODULE...``: imports the modules, then asks for what else it must know
(see `server_process.py`). It stays single-threaded and never touches
a device, so its forks are sound. It ends when the other end of the control socket
closes, which the agent and its keeper both have; then it kills its ranks and removes the run's private directory.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog

from elastic_ep import logs, titles
from elastic_ep.host import life_line
from elastic_ep.host.death_watch import hold_until_death
from elastic_ep.host.fork_messages import (
    PACKET_BYTES,
    Exited,
    Fork,
    FromServer,
    Imported,
    LaunchOptions,
    Resync,
    Resynced,
    SharedFiles,
    ToServer,
    status_text,
)
from elastic_ep.host.private_directory import NotPrivate, check_private, remove
from elastic_ep.host.robust_mutex import RobustMutexes
from elastic_ep.host.scheduling import make_ordinary
from elastic_ep.wire.codec import decode, encode
from elastic_ep.wire.host_messages import Launched, LaunchFailed, ServerReady
from elastic_ep.wire.messages import Member, RankState

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Child:
    member: Member
    pid: int


class ForkServer:
    def __init__(
        self, options: LaunchOptions, control: socket.socket, mutexes: RobustMutexes, files: SharedFiles
    ) -> None:
        self._options = options
        self._control = control
        self._mutexes = mutexes
        self._files = files
        self._children: dict[int, _Child] = {}
        """By pidfd."""
        self._poll = select.poll()

    def serve(self) -> None:
        """Serve until the launcher's end closes."""
        self._poll.register(self._control, select.POLLIN)
        self._send(ServerReady(os.getpid(), len(os.listdir("/proc/self/task"))))
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._children:
                    self._reap(fd)
                elif not self._receive():
                    return

    def clean_up(self) -> None:
        """Kill and reap every rank, remove the directory."""
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._poll.unregister(self._control)
        deadline = time.monotonic() + self._options.timing.reap_ms / 1000
        while self._children and (left := deadline - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left * 1000):
                self._reap(fd)
        remove(Path(self._options.directory))

    def _receive(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # the launcher died with something of ours unread
            return False
        if not data:
            return False
        message: ToServer = decode(data, ToServer)
        if isinstance(message, Resync):
            self._say_again()
            return True
        assert len(fds) == 2, "a rank needs its life line and its configuration"
        life_fd, config_fd = fds
        try:
            self._fork(message, life_fd, config_fd)
        finally:
            os.close(life_fd)
            os.close(config_fd)
        return True

    def _say_again(self) -> None:
        for pidfd, child in self._children.items():
            self._send(Launched(child.member, child.pid), pidfd)
        self._send(Resynced())

    def _fork(self, message: Fork, life_fd: int, config_fd: int) -> None:
        member = message.member
        began = time.perf_counter_ns()
        try:
            pid = os.fork()
        except OSError as error:
            self._send(LaunchFailed(member, f"fork: {error.strerror}"))
            return
        if pid == 0:
            self._become_rank(message, life_fd, config_fd)
        fork_us = (time.perf_counter_ns() - began) // 1000
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._send(LaunchFailed(member, f"pidfd_open: {error.strerror}"))
            return
        self._children[pidfd] = _Child(member, pid)
        self._poll.register(pidfd, select.POLLIN)
        self._send(Launched(member, pid, fork_us), pidfd)

    def _reap(self, pidfd: int) -> None:
        child = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(child.pid, 0)
        self._send(Exited(child.member, status_text(os.waitstatus_to_exitcode(status))))

    def _send(self, message: FromServer, *fds: int) -> None:
        # If the launcher is gone, `serve` is about to see that.
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [encode(message)], fds)

    def _become_rank(self, message: Fork, life_fd: int, config_fd: int) -> NoReturn:
        """In the forked child. Nothing gets past this: it must never go on as a second fork server."""
        status = 1
        try:
            life_line.bind(life_fd)
            self._control.close()
            for pidfd in self._children:
                os.close(pidfd)
            with open(config_fd, encoding="utf-8") as file:
                file.seek(0)  # the launcher has written, and shares the position
                config_json = file.read()
            status = self._run_rank(message, config_json, life_fd)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            log.exception("the rank ends by an exception", rank=str(message.member))
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status & 0xFF)

    def _run_rank(self, message: Fork, config_json: str, life_fd: int) -> int:
        # The terminal's Ctrl-C is for the run process alone. HAZARD: a process group, not a session: Linux schedules
        # each session as one (autogroup), so niceness and short slices would count for nothing among ranks.
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        titles.show_rank(message.member, RankState.LAUNCHING)
        hold_until_death(self._mutexes, message.slot)
        os.nice(self._options.nice)  # of this thread and those that it starts
        module, _, function = self._options.entry.partition(":")
        status: int = getattr(importlib.import_module(module), function)(config_json, self._files, life_fd)
        return status


def preload(modules: tuple[str, ...], directory: Path) -> None:
    """Import `modules`, and have those with a `before_forks` make what all ranks of the run in `directory` need.

    What they made is left out of garbage collection, so that ranks share its pages.
    """
    for module in modules:
        prepare = getattr(importlib.import_module(module), "before_forks", None)
        if prepare is not None:
            prepare(directory)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()
    gc.enable()


def main(control_fd: int, modules: tuple[str, ...]) -> int:
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    make_ordinary()  # whatever the launcher's thread has asked for
    # Nothing is sent to us before we say that this is done.
    life_line.bind(control_fd)
    gc.disable()  # nothing of what imports make is garbage, and to look for it takes a tenth of the time
    for module in modules:
        importlib.import_module(module)
    life_line.release(control_fd)
    with suppress(BrokenPipeError):  # the launcher is gone, which the next line sees
        control.send(encode(Imported()))
    told, files, _, _ = socket.recv_fds(control, PACKET_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
    if not told:
        return 0  # the launcher is gone
    options: LaunchOptions = decode(told, LaunchOptions)
    mutex_fd, *shared = files
    mutexes = RobustMutexes(mutex_fd, options.mutexes)
    os.close(mutex_fd)
    logs.configure(options.log, "fork server")
    titles.show(f"fork server {options.directory}", "eep-fork-server")
    try:
        check_private(Path(options.directory))
    except NotPrivate as error:
        log.error(str(error))
        return 2
    # An import takes seconds, and nothing is sent to us before we say that we are ready.
    life_line.bind(control_fd)
    preload(options.preload, Path(options.directory))
    life_line.release(control_fd)
    server = ForkServer(options, control, mutexes, SharedFiles(*shared))
    try:
        server.serve()
    finally:
        server.clean_up()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), tuple(sys.argv[2:])))
