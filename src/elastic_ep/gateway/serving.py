"""From a job to choices on their way: what all generating endpoints share, whatever shape their answers have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from elastic_ep.gateway.errors import ApiError, failed, tell, translate, unexpected
from elastic_ep.gateway.generate import ChoiceReader, Clock, submit
from elastic_ep.gateway.job import Job, Output, Part
from elastic_ep.gateway.message import Message
from elastic_ep.gateway.parsers.base import Delta
from elastic_ep.gateway.shapes import Usage
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.traces import GIVEN_UP, Traces
from elastic_ep.gateway.turns import Turns
from elastic_ep.gateway.unknown import UnknownNames
from elastic_ep.group.metrics import ChoiceLife, Metrics
from elastic_ep.group.port import Backend, Failure, Stream
from elastic_ep.wire.messages import FailureCode

_T = TypeVar("_T")
_AT_ONCE_BYTES = 1 << 18
_GATHERED = 32
"""Tokens of an answer that is sent as a whole for which its task is woken up: read in a fraction of a millisecond."""
EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One choice on its way."""

    index: int
    stream: Stream
    reader: ChoiceReader
    clock: Clock
    part: Part
    output: Output
    traces: Traces | None

    async def texts(self, *, whole: bool = False) -> AsyncIterator[str]:
        """What may be shown, piece by piece, until the end; a piece may be empty. `whole`: nobody waits for a piece."""
        reader = self.reader
        if gathers := whole and reader.may_lag:
            self.stream.gather(_GATHERED, self.clock.batch)
        async for batch in self.stream:
            drawn = len(batch) - reader.given
            if drawn > 0 and not reader.nothing and not gathers:
                self.clock.batch(drawn)
            yield reader.feed(batch)
            if reader.finish is not None:
                return

    async def deltas(self, message: Message, *, whole: bool = False) -> AsyncIterator[list[Delta]]:
        """The same, told apart. Raises `ApiError` if the choice was aborted."""
        async for text in self.texts(whole=whole):
            if deltas := message.push(text):
                yield deltas
        self.finished()
        if deltas := message.finish():
            yield deltas

    def finished(self) -> str:
        """The finish reason of a choice that has ended. Raises `ApiError` if it was aborted."""
        finish = self.reader.finish
        self.stream.cancel()
        life = self._life()
        self.clock.finished(finish or "abort", life)
        if self.traces is not None:
            self.traces.ended(finish or "abort", life)
        if finish is None or finish == "abort":
            raise failed(self.stream.failure or Failure(FailureCode.ABORTED, "the reason is unknown"))
        return finish

    def given_up(self) -> None:
        """Nobody wants it any longer; of no effect on a choice that has ended."""
        if self.traces is not None and not self.clock.over:
            self.traces.ended(GIVEN_UP, self._life())

    def _life(self) -> ChoiceLife:
        lengths = (len(self.part.prompt), self.reader.generated, self.part.limit)
        return self.clock.life(self.stream, *lengths)


class Serving:
    """Submits jobs and follows them."""

    def __init__(
        self, backend: Backend, text: ChatTokenizer, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        self._backend = backend
        self.text = text
        self._unknown = UnknownNames()
        self._traces = traces
        self.metrics = metrics
        self.turns = Turns()
        self.load = 0
        """Requests that are being answered."""

    @asynccontextmanager
    async def runs(
        self, job: Job, path: str, started: float, *, connected: bool = True
    ) -> AsyncIterator[list[Run]]:
        """The choices of `job`. Whatever ends the block, nobody generates for it any longer.

        `connected`: there is a client, whose leaving cancels the block.

        Raises `Busy`, `Refused`, `Unavailable` and `Stopping`.
        """
        self._unknown.note(path, job.unknown)
        streams = await submit(self._backend, job)
        self.load += 1
        runs: list[Run] = []
        try:
            self.metrics.prompt_tokens(sum(len(part.prompt) for part in job.parts))
            for place, one in enumerate(streams):
                runs.append(await self.turns.run(partial(self._run, job, place, one, started)))
            yield runs
        # The cancellation at a client's disconnect included.
        except (ConnectionError, asyncio.CancelledError):
            if connected:
                self.metrics.disconnects.inc()
            raise
        finally:
            self.load -= 1
            for run in runs:
                run.given_up()
            # Those that wait first: else each that runs would make room for one of them.
            for stream in reversed(streams):
                stream.cancel()

    def _run(self, job: Job, index: int, stream: Stream, started: float) -> Run:
        part = job.parts[index // job.n]
        given = len(part.params.given)
        reader = ChoiceReader(self.text, job.output, part.prompt, given, nothing=not part.limit)
        return Run(index, stream, reader, Clock(self.metrics, started), part, job.output, self._traces)

    def stream_failed(self, request: web.Request, error: Exception) -> ApiError:
        """What a client is told within a stream: its status line is long gone."""
        failure = translate(error)
        if failure is None:
            failure = unexpected(request, error)
        else:
            tell(request, failure)
        self.metrics.http_error(failure.status)
        return failure


def usage_of(job: Job, runs: list[Run]) -> Usage:
    """A prompt counts once, however many choices were made for it: of these the first one found what was there before."""
    cached = sum(run.stream.cached_tokens for run in runs[:: job.n])
    prompts = sum(len(part.prompt) for part in job.parts)
    return Usage(prompts, sum(run.reader.generated for run in runs), cached)


async def send(request: web.Request, pieces: list[str]) -> web.StreamResponse:
    """As fast as the client takes it: megabytes in one go would hold up the event loop. `pieces` are ASCII."""
    size = sum(map(len, pieces))
    if size <= _AT_ONCE_BYTES:
        return web.Response(body="".join(pieces).encode("ascii"), content_type="application/json")
    headers = {"Content-Type": "application/json", "Content-Length": str(size)}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    for piece in pieces:
        for start in range(0, len(piece), _AT_ONCE_BYTES):
            await response.write(piece[start : start + _AT_ONCE_BYTES].encode("ascii"))
            await asyncio.sleep(0)  # a client that is quick enough makes nothing wait
    await response.write_eof()
    return response


async def together(parts: list[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of all, run concurrently; when one raises, the others are cancelled and it is raised."""
    if len(parts) == 1:
        return [await parts[0]]
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
