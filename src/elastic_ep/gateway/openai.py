"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from elastic_ep.gateway.errors import failed, tell, translate, unexpected, unknown_model
from elastic_ep.gateway.generate import ChoiceReader, Clock, submit
from elastic_ep.gateway.jobs import Job, Output, Part, UnknownNames
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.request_id import request_id
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.shapes import (
    Answer,
    ChatShape,
    ChunkWriter,
    CompletionShape,
    Json,
    Shape,
    Usage,
    as_object,
    ids_json,
    logprobs_json,
    sse,
    usage_chunk,
    whole,
)
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.turns import Turns
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import Backend, Failure, Stream
from elastic_ep.wire.messages import FailureCode

_T = TypeVar("_T")
Write = Callable[[bytes], Awaitable[None]]
_AT_ONCE_BYTES = 1 << 18
_EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True, slots=True)
class _Run:
    """One choice on its way."""

    index: int
    stream: Stream
    reader: ChoiceReader
    clock: Clock
    part: Part
    prompt_ids: Json | None
    """If they are to be shown."""


class OpenAiHandlers:
    def __init__(
        self, backend: Backend, settings: ApiSettings, text: ChatTokenizer, metrics: Metrics, reading: Reading
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._text = text
        self._metrics = metrics
        self._reading = reading
        self._turns = Turns()
        self._unknown = UnknownNames()
        self._completion = CompletionShape()
        self._chat = ChatShape()
        self._created = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat_completions),
        ]

    async def models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        if name != self._settings.model_name:
            raise unknown_model(name)
        return web.json_response(self._model())

    async def completions(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        job = await self._reading.job("completion", await request.read())
        return await self._serve(request, job, self._completion, started)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        job = await self._reading.job("chat", await request.read())
        return await self._serve(request, job, self._chat, started)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "elastic_ep",
            "max_model_len": self._settings.max_model_len,
        }

    async def _serve(
        self, request: web.Request, job: Job, shape: Shape, started: float
    ) -> web.StreamResponse:
        self._unknown.note(request.path, job.unknown)
        streams = await submit(self._backend, job)
        # Whatever ends this handler, the cancellation at a client's disconnect included, nobody generates
        # for it any longer.
        try:
            self._metrics.prompt_tokens(sum(len(part.prompt) for part in job.parts))
            ids = [await self._prompt_ids(job, part) for part in job.parts]
            runs = []
            for index, stream in enumerate(streams):
                make = partial(self._run, job, index, stream, started, ids[index // job.n])
                runs.append(await self._turns.run(make))
            answer = Answer(
                shape.prefix + (job.request_id or request_id(request)),
                int(time.time()),
                self._settings.model_name,
                job.output,
            )
            if job.stream:
                return await self._stream(request, job, shape, answer, runs)
            choices = await _together([self._whole_choice(shape, job.output, run) for run in runs])
            beside = None if shape.prompt_ids_of_choice else ids[0]
            pieces = whole(shape, answer, choices, _usage(job, runs), beside)
            return await _send(request, list(pieces))
        except (ConnectionError, asyncio.CancelledError):
            self._metrics.disconnects.inc()
            raise
        finally:
            # Those that wait first: else each that runs would make room for one of them.
            for stream in reversed(streams):
                stream.cancel()

    async def _prompt_ids(self, job: Job, part: Part) -> Json | None:
        return await self._turns.run(lambda: ids_json(part.prompt)) if job.output.prompt_token_ids else None

    def _run(self, job: Job, index: int, stream: Stream, started: float, prompt_ids: Json | None) -> _Run:
        part = job.parts[index // job.n]
        reader = ChoiceReader(self._text, job.output, part.prompt)
        return _Run(index, stream, reader, Clock(self._metrics, started), part, prompt_ids)

    async def _whole_choice(self, shape: Shape, output: Output, run: _Run) -> Json:
        reader, echo = run.reader, run.part.echo
        pieces = [echo]
        async for batch in run.stream:
            run.clock.batch(len(batch))
            pieces.append(reader.feed(batch))
            if reader.finish is not None:
                break
        finish = self._finished(run)
        logprobs = None
        if output.logprobs is not None:
            logprobs = await logprobs_json(shape, reader.tokens, len(echo), self._turns)

        def made() -> Json:
            choice = shape.choice(run.index, "".join(pieces), logprobs, finish)
            if output.token_ids:
                choice["token_ids"] = [one.token.token for one in reader.tokens]
            if shape.prompt_ids_of_choice and run.prompt_ids is not None:
                choice["prompt_token_ids"] = run.prompt_ids
            return as_object(choice)

        return await self._turns.run(made)

    async def _stream(
        self, request: web.Request, job: Job, shape: Shape, answer: Answer, runs: list[_Run]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_EVENT_STREAM)
        await response.prepare(request)
        try:
            await _together([self._stream_choice(shape, answer, run, response.write) for run in runs])
            if job.output.include_usage:
                await response.write(usage_chunk(shape, answer, _usage(job, runs)))
        except ConnectionError:
            raise
        except Exception as error:
            # The status line is long gone; clients look for an error object among the events.
            failure = translate(error)
            if failure is None:
                failure = unexpected(request, error)
            else:
                tell(request, failure)
            self._metrics.http_error(failure.status)
            await response.write(sse(failure.body()))
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    async def _stream_choice(self, shape: Shape, answer: Answer, run: _Run, write: Write) -> None:
        reader, output, echo = run.reader, answer.output, run.part.echo

        def begin() -> tuple[ChunkWriter, bytes]:
            chunks = ChunkWriter(shape, answer, run.index, len(run.part.prompt), run.prompt_ids)
            return chunks, chunks.opening + (chunks.text(echo, 0) if echo else b"")

        chunks, opening = await self._turns.run(begin)
        text = ""

        def full(finish: str | None) -> bytes:
            logprobs = None if output.logprobs is None else shape.logprobs(reader.tokens, len(echo))
            ids = [one.token.token for one in reader.tokens] if output.token_ids else None
            return chunks.full(text, reader.generated, logprobs, finish, ids)

        async for batch in run.stream:
            run.clock.batch(len(batch))
            text = reader.feed(batch)
            if reader.finish is not None:
                break
            if not text:
                continue
            if reader.keep_tokens:
                chunk = full(None)
                reader.tokens.clear()
            else:
                chunk = chunks.text(text, reader.generated)
            if opening:
                chunk, opening = opening + chunk, b""
            await write(chunk)
        finish = self._finished(run)
        await write(opening + full(finish))

    def _finished(self, run: _Run) -> str:
        """The finish reason of a choice that has ended. Raises `ApiError` if it was aborted."""
        finish = run.reader.finish
        run.stream.cancel()
        self._metrics.finished(finish or "abort")
        if finish is None or finish == "abort":
            raise failed(run.stream.failure or Failure(FailureCode.ABORTED, "the reason is unknown"))
        return finish


async def _send(request: web.Request, pieces: list[str]) -> web.StreamResponse:
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


def _usage(job: Job, runs: list[_Run]) -> Usage:
    """A prompt counts once, however many choices were made for it: of these the first one found what was there before."""
    cached = sum(run.stream.cached_tokens for run in runs[:: job.n])
    prompts = sum(len(part.prompt) for part in job.parts)
    return Usage(prompts, sum(run.reader.generated for run in runs), cached)


async def _together(parts: list[Coroutine[Any, Any, _T]]) -> list[_T]:
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
