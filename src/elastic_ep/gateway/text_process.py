"""The process that reads large bodies: ``python -m elastic_ep.gateway.text_process SOCKET_FD LIFE_FD``. No torch.

It gives way to the ranks and to the run process, and dies with the latter.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import traceback
from dataclasses import replace
from io import BufferedRWPair
from typing import Any

from elastic_ep import titles
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.job import Job
from elastic_ep.gateway.reading import BodyReader
from elastic_ep.gateway.text_worker import LENGTH, Failed, JobBegin, WorkerSetup
from elastic_ep.host import life_line
from elastic_ep.host.scheduling import make_ordinary

NICE = 10


def serve(stream: BufferedRWPair) -> None:
    """Answer until the other end closes."""
    setup: WorkerSetup = _receive(stream)
    try:
        reader = BodyReader(setup.settings, setup.load())
    except Exception as error:
        _send(stream, str(error))
        return
    _send(stream, "ready")
    while (asked := _receive(stream)) is not None:
        for frame in _answer(reader, *asked):
            _send(stream, frame)


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


def main(socket_fd: int, life_fd: int) -> int:
    titles.show("text process", "eep-text")
    make_ordinary()  # whatever the run process has asked for
    life_line.bind(life_fd)
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=socket_fd) as connection, connection.makefile("rwb") as stream:
        serve(stream)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
