"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from elastic_ep.gateway.errors import unknown_model
from elastic_ep.gateway.job import Job
from elastic_ep.gateway.message import Message
from elastic_ep.gateway.prompt_scores import prompt_logprobs_json, spelled_prompt
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.request_id import request_id
from elastic_ep.gateway.serving import EVENT_STREAM, Run, Serving, send, together, usage_of
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.shapes import (
    Answer,
    ChatShape,
    ChunkWriter,
    CompletionShape,
    Json,
    Shape,
    SpelledToken,
    as_object,
    delta_json,
    ids_json,
    logprobs_json,
    sse,
    usage_chunk,
    whole,
)

Write = Callable[[bytes], Awaitable[None]]


class OpenAiHandlers:
    def __init__(self, serving: Serving, settings: ApiSettings, reading: Reading) -> None:
        self._serving = serving
        self._settings = settings
        self._reading = reading
        self._turns = serving.turns
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
        names = (self._settings.model_name, *self._settings.other_names)
        return web.json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        if not self._settings.knows(name):
            raise unknown_model(name)
        return web.json_response(self._model(name))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        job = await self._reading.job("completion", await request.read())
        return await self._serve(request, job, self._completion, started)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        job = await self._reading.job("chat", await request.read())
        return await self._serve(request, job, self._chat, started)

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "elastic_ep",
            "max_model_len": self._settings.max_model_len,
        }

    async def _serve(
        self, request: web.Request, job: Job, shape: Shape, started: float
    ) -> web.StreamResponse:
        async with self._serving.runs(job, request.path, started) as runs:
            ids = [await self._prompt_ids(job, run) for run in runs[:: job.n]]
            answer = Answer(
                shape.prefix + (job.request_id or request_id(request)),
                int(time.time()),
                self._settings.model_name,
                job.output,
            )
            if job.stream:
                return await self._stream(request, job, shape, answer, runs, ids)
            made = await together([self._whole_choice(shape, run) for run in runs])
            prompts = [await self._of_prompt(run, ids[run.index // job.n]) for run in runs]
            if shape.prompts_of_choices:
                choices, beside = [as_object(one | more) for one, more in zip(made, prompts, strict=True)], {}
            else:
                choices, beside = [as_object(one) for one in made], prompts[0]
            pieces = whole(shape, answer, choices, usage_of(job, runs), beside)
            return await send(request, list(pieces))

    async def _prompt_ids(self, job: Job, run: Run) -> Json | None:
        """If they are to be shown."""
        return (
            await self._turns.run(lambda: ids_json(run.part.prompt)) if job.output.prompt_token_ids else None
        )

    async def _of_prompt(self, run: Run, ids: Json | None) -> dict[str, Json]:
        """Members of a choice, or of the whole answer."""
        told = {} if ids is None else {"prompt_token_ids": ids}
        wanted = run.output.prompt_logprobs
        if wanted is not None:
            told["prompt_logprobs"] = await prompt_logprobs_json(
                self._serving.text, run.part.prompt, run.reader.scores, wanted, self._turns
            )
        return told

    async def _echoed(self, run: Run) -> list[SpelledToken]:
        """The prompt's tokens, if they are shown with their log-probabilities."""
        if not run.output.echo_logprobs:
            return []
        part = run.part
        return await spelled_prompt(self._serving.text, part, run.reader.scores, self._turns)

    async def _whole_choice(self, shape: Shape, run: Run) -> dict[str, Any]:
        reader, echo, output = run.reader, run.part.echo, run.output
        pieces, message = [echo], Message(output.form)
        async for text in run.texts(whole=True):
            if output.form is None:
                pieces.append(text)
            else:
                message.push(text)  # as it comes: of a long answer it would take long at the end
        finish = run.finished()
        logprobs = None
        if output.logprobs is not None:
            tokens = [*await self._echoed(run), *reader.tokens]
            logprobs = await logprobs_json(shape, tokens, len(echo), self._turns)

        def made() -> dict[str, Any]:
            if output.form is None:
                choice = shape.choice(run.index, "".join(pieces), logprobs, finish)
            else:
                message.finish()
                choice = self._chat.message(run.index, message, logprobs, message.reason(finish))
            choice |= _stopped(run)
            if output.token_ids:
                choice["token_ids"] = [one.token.token for one in reader.tokens]
            return choice

        return await self._turns.run(made)

    async def _stream(
        self,
        request: web.Request,
        job: Job,
        shape: Shape,
        answer: Answer,
        runs: list[Run],
        ids: list[Json | None],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        choice = self._stream_choice if job.output.form is None else self._stream_message
        try:
            await together(
                [choice(shape, answer, run, ids[run.index // job.n], response.write) for run in runs]
            )
            if job.output.include_usage:
                await response.write(usage_chunk(shape, answer, usage_of(job, runs)))
        except ConnectionError:
            raise
        except Exception as error:
            # Clients look for an error object among the events.
            await response.write(sse(self._serving.stream_failed(request, error).body()))
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    async def _stream_choice(
        self, shape: Shape, answer: Answer, run: Run, prompt_ids: Json | None, write: Write
    ) -> None:
        reader, output, echo = run.reader, answer.output, run.part.echo

        def begin() -> tuple[ChunkWriter, bytes]:
            chunks = ChunkWriter(shape, answer, run.index, len(run.part.prompt), prompt_ids)
            plain = echo and not output.echo_logprobs
            return chunks, chunks.opening + (chunks.text(echo, 0) if plain else b"")

        chunks, opening = await self._turns.run(begin)

        def full(text: str, finish: str | None) -> bytes:
            logprobs = None if output.logprobs is None else shape.logprobs(reader.tokens, len(echo))
            ids = [one.token.token for one in reader.tokens] if output.token_ids else None
            stopped = None if finish is None else _stopped(run)
            return chunks.full(text, reader.generated, logprobs, finish, ids, stopped)

        text, scored = "", output.echo_logprobs

        async def with_prompt() -> bytes:
            """The echo with its log-probabilities, when they are there; once."""
            nonlocal scored
            scored = reader.given > 0
            if scored:
                return b""
            logprobs = await logprobs_json(shape, await self._echoed(run), len(echo), self._turns)
            return chunks.full(echo, 0, logprobs, None)

        async for text in run.texts():
            if scored:
                opening += await with_prompt()
            if not text or reader.finish is not None:
                continue
            if reader.keep_tokens:
                chunk = full(text, None)
                reader.tokens.clear()
            else:
                chunk = chunks.text(text, reader.generated)
            if opening:
                chunk, opening = opening + chunk, b""
            await write(chunk)
        finish = run.finished()
        if scored:
            opening += await with_prompt()
        await write(opening + full(text, finish))

    async def _stream_message(
        self, shape: Shape, answer: Answer, run: Run, prompt_ids: Json | None, write: Write
    ) -> None:
        reader, output, message = run.reader, answer.output, Message(answer.output.form)
        chunks = ChunkWriter(shape, answer, run.index, len(run.part.prompt), prompt_ids)
        opening = chunks.opening

        def chunk(delta: dict[str, Any], finish: str | None) -> bytes:
            """What there is of tokens goes into the first chunk that there is."""
            logprobs = None if output.logprobs is None else shape.logprobs(reader.tokens, 0)
            ids = [one.token.token for one in reader.tokens] if output.token_ids else None
            reader.tokens.clear()
            stopped = None if finish is None else _stopped(run)
            return chunks.delta(delta, reader.generated, logprobs, finish, ids, stopped)

        async for deltas in run.deltas(message):
            await write(opening + b"".join([chunk(delta_json(delta, message), None) for delta in deltas]))
            opening = b""
        assert reader.finish is not None
        await write(opening + chunk({}, message.reason(reader.finish)))


def _stopped(run: Run) -> dict[str, Any]:
    """By which stop string or token the choice ended: for vLLM one that the client gave, for SGLang any."""
    reader = run.reader
    met = reader.ended_by if reader.stopped_by is None else reader.stopped_by
    given = isinstance(met, str) or met in run.output.stop_token_ids
    return {"stop_reason": met if given else None, "matched_stop": met}
