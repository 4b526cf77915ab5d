"""The run process's end of the process that reads large bodies: start it, hand it one body after the other.

The first one is a fork of the run process from before its threads and its event loop (`text_process.fork`): it has all
that it needs at once. Later ones import it, which takes about a second of a processor.

Frames go both ways over a socket pair: eight bytes of length, then a pickle. HAZARD: unpickling trusts its sender;
each end is this program, and nobody else has the socket.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.job import Job, Part, Previous
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.group.port import Busy
from elastic_ep.host import life_line

Found = Job | bytes | Previous
LENGTH = struct.Struct("!Q")
SHORT_BYTES = 8192
MAX_WAITING = 64
"""Longer bodies in line, the one being read included: what they take of memory is so many times the largest body."""
MAX_WAITING_SHORT = 1024
"""Bodies in line of any length: short ones are there for a grammar or a template, and take milliseconds each."""
WAIT_S = 60.0
"""In line; then 429."""
READ_S = 60.0
"""Of one body; then its client hears so, and the process is replaced."""
START_S = 60.0
LET_GO_S = 0.5
"""A body whose client has gone may take so much longer, then its process is ended: to start one costs as much."""
RETRY_AFTER_S = 5
FATAL_S = 60.0
"""A body that two processes died of is not read again for so long: clients ask again by themselves, and others wait."""
_FATAL = 8
_FATAL_BYTES = 1 << 20
"""So many of these bodies are kept, none larger."""
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What the process is told at its start, picklable. `load` makes the same text as the run process has."""

    settings: ApiSettings
    load: Callable[[], ChatTokenizer]


@dataclass(frozen=True, slots=True)
class JobBegin:
    """The answer to a body that is a job; its parts follow, a frame each, so that none takes long to unpickle."""

    job: Job
    """Without its parts."""
    parts: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer to a body that met a defect of ours: the traceback."""

    traceback: str


class TextProcessDied(ConnectionError):
    """It ended before it had answered."""


class Child(Protocol):
    """What is asked of a child process, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Begun:
    """A process that is starting, and this end of its socket. Whoever has it ends it."""

    child: Child
    socket: socket.socket
    life_fd: int

    def end(self) -> None:
        """If nobody has connected to it. Blocks for as long as it takes a process to go."""
        self.socket.close()
        os.close(self.life_fd)
        self.child.kill()
        self.child.wait()


class _Process:
    """One running process and its socket."""

    def __init__(self, begun: Begun) -> None:
        self._begun = begun
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @property
    def pid(self) -> int:
        return self._begun.child.pid

    @property
    def running(self) -> bool:
        return self._begun.child.poll() is None

    async def connect(self) -> None:
        ours = self._begun.socket
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)

    async def send(self, content: Any) -> None:
        data = pickle.dumps(content, 5)
        self._writer.write(LENGTH.pack(len(data)))
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> Any:
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        return pickle.loads(await self._reader.readexactly(size))

    async def exchange(self, task: str, raw: bytes, before: str | None = None) -> Found:
        """Raises `ApiError` and `TextProcessDied`."""
        try:
            await self.send((task, raw, before))
            answer = await self.receive()
            match answer:
                case JobBegin(job, parts):
                    return replace(job, parts=tuple([await self._part() for _ in range(parts)]))
                case ApiError():
                    raise answer
                case Failed(traceback):
                    raise RuntimeError(f"in the text process: {traceback}")
            assert isinstance(answer, (bytes, Previous))
            return answer
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise TextProcessDied("the process that reads large bodies has ended") from error

    async def _part(self) -> Part:
        part: Part = await self.receive()
        await asyncio.sleep(0)
        return part

    async def end(self) -> None:
        """Kill it and wait for it, on a thread: a process with much memory takes its time to go."""
        self._writer.close()
        os.close(self._begun.life_fd)
        self._begun.child.kill()
        await asyncio.to_thread(self._begun.child.wait)


class TextWorker:
    """Reads bodies in the order in which they come, in a process that ends when this one does.

    A body whose process dies is tried once more, in a new one. `begun`: the first of them; it has been told all.
    """

    def __init__(self, setup: WorkerSetup, begun: Begun | None = None) -> None:
        # Keys are nothing that text needs.
        self._setup = replace(setup, settings=replace(setup.settings, api_keys=(), admin_key=None))
        self._begun = begun
        self._process: _Process | None = None
        self._turn = asyncio.Lock()
        self.waiting = 0
        """Bodies in line, the one being read included."""
        self._long = 0
        """Of these, longer ones."""
        self._fatal: deque[tuple[float, tuple[str, bytes, str | None]]] = deque(maxlen=_FATAL)
        """Bodies that processes died of, and until when they are not read."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def warm(self) -> None:
        """Start the process before anybody needs it. A start that fails is tried again with the first body."""
        async with self._turn:
            try:
                await self._started()
            except ApiError:
                await self._end()

    async def close(self) -> None:
        if self._begun is not None:  # nobody has asked for it
            await asyncio.to_thread(self._begun.end)
        await self._end()

    async def read(self, task: str, raw: bytes, before: str | None = None) -> Found:
        """Raises `ApiError`, and `Busy` when too many wait or this one has waited too long."""
        long = len(raw) > SHORT_BYTES
        now = time.monotonic()
        if any(now < until and body == (task, raw, before) for until, body in self._fatal):
            raise _died()
        if self.waiting >= MAX_WAITING_SHORT or (long and self._long >= MAX_WAITING):
            raise Busy(RETRY_AFTER_S)
        self.waiting += 1
        self._long += long
        try:
            try:
                async with asyncio.timeout(WAIT_S):
                    await self._turn.acquire()
            except TimeoutError:
                raise Busy(RETRY_AFTER_S) from None
            try:
                return await self._read(task, raw, before)
            finally:
                self._turn.release()
        finally:
            self.waiting -= 1
            self._long -= long

    async def _read(self, task: str, raw: bytes, before: str | None = None) -> Found:
        work = asyncio.ensure_future(self._twice(task, raw, before))
        try:
            async with asyncio.timeout(READ_S):
                return await asyncio.shield(work)
        except TimeoutError:
            await self._give_up(work, 0)
            raise _too_long() from None
        except asyncio.CancelledError:
            await self._give_up(work, LET_GO_S)
            raise

    async def _give_up(self, work: asyncio.Future[Any], after_s: float) -> None:
        try:
            await asyncio.wait([work], timeout=after_s)
        finally:
            if work.done():
                work.cancelled() or work.exception()  # nobody else looks at it
            else:
                work.cancel()
                await self._end()

    async def _twice(self, task: str, raw: bytes, before: str | None = None) -> Found:
        for _ in range(2):
            process = await self._started()
            try:
                return await process.exchange(task, raw, before)
            except TextProcessDied:
                await self._end()
        if len(raw) <= _FATAL_BYTES:
            self._fatal.append((time.monotonic() + FATAL_S, (task, raw, before)))
        raise _died()

    async def _started(self) -> _Process:
        if self._process is not None and self._process.running:
            return self._process
        await self._end()
        for last in (False, True):
            try:
                async with asyncio.timeout(START_S):
                    await self._start()
                break
            except (TimeoutError, OSError, EOFError) as error:
                await self._end()
                # One that was killed as it started is no reason to refuse. What it has to object it would say.
                if last or not isinstance(error, (EOFError, ConnectionError)):
                    raise _not_started(error) from error
        assert self._process is not None
        return self._process

    async def _start(self) -> None:
        begun, self._begun = self._begun, None
        told = begun is not None
        self._process = process = _Process(begun or await _begin())
        await process.connect()
        if not told:
            await process.send(self._setup)
        if (answer := await process.receive()) != "ready":
            raise OSError(str(answer))

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await asyncio.shield(process.end())


async def _begin() -> Begun:
    """One that has yet to be told what it begins with."""
    ours, theirs = socket.socketpair()
    read_end, life_fd = life_line.create()
    try:
        return Begun(await asyncio.to_thread(_spawn, theirs.fileno(), read_end), ours, life_fd)
    except BaseException:
        ours.close()
        os.close(life_fd)
        raise
    finally:
        theirs.close()
        os.close(read_end)


def _spawn(socket_fd: int, life_fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "elastic_ep.gateway.text_process", str(socket_fd), str(life_fd)]
    paths = os.pathsep.join(sys.path)  # what is pickled here is found there
    return subprocess.Popen(
        command,
        pass_fds=(socket_fd, life_fd),
        stdin=subprocess.DEVNULL,
        process_group=0,  # the terminal's Ctrl-C is for the run process alone
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
    )


def _died() -> ApiError:
    return ApiError(
        "The process that reads large requests died of this one, twice.",
        status=500,
        kind="internal_error",
        code="text_process_died",
    )


def _too_long() -> ApiError:
    return ApiError(
        f"Reading this request's text took more than {READ_S:g} s. Send less text, or a simpler template or "
        "grammar.",
        code="text_too_costly",
    )


def _not_started(error: BaseException) -> ApiError:
    return ApiError(
        f"The process that reads large requests does not start: {error or type(error).__name__}.",
        status=503,
        kind="service_unavailable_error",
        code="text_process_unavailable",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
