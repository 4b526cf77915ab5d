"""The process that reads large bodies: a fork of the run process, or, when that has threads already,
``python -m elastic_ep.gateway.text_process SOCKET_FD LIFE_FD``. No torch.

It gives way to the ranks and to the run process, and dies with the latter.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import BufferedRWPair
from typing import Any, NoReturn

from elastic_ep import titles
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.job import Job
from elastic_ep.gateway.reading import BodyReader
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.text_worker import LENGTH, ONE_THREAD, Begun, Failed, JobBegin, WorkerSetup
from elastic_ep.host import life_line
from elastic_ep.host.scheduling import make_ordinary

NICE = 10


def fork(settings: ApiSettings, text: ChatTokenizer) -> Begun | None:
    """One that has all of this process's modules, and `text`. None if it cannot be: what threads hold at a fork stays
    held in the child."""
    if len(os.listdir("/proc/self/task")) > 1:
        return None
    ours, theirs = socket.socketpair()
    read_end, life_fd = life_line.create()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        os.close(life_fd)
        return None
    if pid == 0:
        _become(theirs.fileno(), read_end, partial(BodyReader, settings, text))
    theirs.close()
    os.close(read_end)
    return Begun(Forked(pid), ours, life_fd)


def _become(socket_fd: int, life_fd: int, make: Callable[[], BodyReader]) -> NoReturn:
    """In the forked child, with nothing open but what is its own."""
    status = 1
    try:
        for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, socket_fd, life_fd}:
            with suppress(OSError):  # the one that listed them
                os.close(fd)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.setpgid(0, 0)  # the terminal's Ctrl-C is for the run process alone
        os.environ |= ONE_THREAD
        status = main(socket_fd, life_fd, make)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Forked:
    """A child of this process, as `Child`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> None:
        self._wait(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, how: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, how)
            self._status = status if pid else None
        return self._status


def serve(stream: BufferedRWPair, make: Callable[[], BodyReader] | None = None) -> None:
    """Answer until the other end closes. `make`: how to come by a reader; None: that is the first to be heard."""
    try:
        reader = _told(stream) if make is None else make()
        reader.warm_up()
    except Exception as error:
        _send(stream, str(error))
        return
    _send(stream, "ready")
    while (asked := _receive(stream)) is not None:
        for frame in _answer(reader, *asked):
            _send(stream, frame)


def _told(stream: BufferedRWPair) -> BodyReader:
    setup: WorkerSetup = _receive(stream)
    return BodyReader(setup.settings, setup.load())


def _answer(reader: BodyReader, task: str, raw: bytes, before: str | None) -> list[Any]:
    try:
        found = reader.read(task, raw, before)
    except ApiError as error:
        # What it was raised in the course of is not for the other end.
        error.__cause__ = error.__context__ = None
        return [error]
    except Exception:
        return [Failed(traceback.format_exc())]
    if isinstance(found, Job):
        return [JobBegin(replace(found, parts=()), len(found.parts)), *found.parts]
    return [found]


def _send(stream: BufferedRWPair, content: Any) -> None:
    data = pickle.dumps(content, 5)
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BufferedRWPair) -> Any:
    """None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return pickle.loads(stream.read(LENGTH.unpack(head)[0]))


def main(socket_fd: int, life_fd: int, make: Callable[[], BodyReader] | None = None) -> int:
    titles.show("text process", "eep-text")
    make_ordinary()  # whatever the run process has asked for
    life_line.bind(life_fd)
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=socket_fd) as connection, connection.makefile("rwb") as stream:
        serve(stream, make)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
