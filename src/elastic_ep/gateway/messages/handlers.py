"""The endpoints of `/v1/messages`."""

from __future__ import annotations

import secrets
import time

from aiohttp import web

from elastic_ep.gateway.errors import messages_body
from elastic_ep.gateway.job import Job
from elastic_ep.gateway.message import Message
from elastic_ep.gateway.messages.events import MessageWriter, event
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.request_id import request_id
from elastic_ep.gateway.serving import EVENT_STREAM, Run, Serving, send, usage_of
from elastic_ep.gateway.settings import ApiSettings


class MessagesHandlers:
    def __init__(self, serving: Serving, settings: ApiSettings, reading: Reading) -> None:
        self._serving = serving
        self._settings = settings
        self._reading = reading

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.messages),
            web.post("/v1/messages/count_tokens", self.count_tokens),
        ]

    async def messages(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        job = await self._reading.job("messages", await request.read())
        async with self._serving.runs(job, request.path, started) as (run,):
            writer = MessageWriter(
                f"msg_{request_id(request)}", self._settings.model_name, lambda: secrets.token_hex(12)
            )
            if job.stream:
                return await self._stream(request, job, writer, run)
            message = Message(job.output.form)
            async for deltas in run.deltas(message, whole=True):
                writer.push(deltas)
            self._end(job, writer, run)
            return await send(request, [writer.message()])

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        found = await self._reading.answer("count_tokens", await request.read())
        return web.Response(body=found, content_type="application/json")

    async def _stream(
        self, request: web.Request, job: Job, writer: MessageWriter, run: Run
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        await response.write(b"".join(writer.begin(len(run.part.prompt))))
        message = Message(job.output.form)
        try:
            async for deltas in run.deltas(message):
                await response.write(b"".join(writer.push(deltas)))
            await response.write(b"".join(self._end(job, writer, run)))
        except ConnectionError:
            raise
        except Exception as error:
            failure = self._serving.stream_failed(request, error)
            await response.write(event("error", error=messages_body(failure)["error"]))
        await response.write_eof()
        return response

    def _end(self, job: Job, writer: MessageWriter, run: Run) -> list[bytes]:
        assert run.reader.finish is not None
        return writer.end(run.reader.finish, run.reader.stopped_by, usage_of(job, [run]))
