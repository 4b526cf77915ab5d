"""The endpoints of `/v1/responses`."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from aiohttp import web

from elastic_ep.gateway.errors import ApiError, translate
from elastic_ep.gateway.fields import bad_value
from elastic_ep.gateway.job import Job
from elastic_ep.gateway.message import Message
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.responses.body import About, Named
from elastic_ep.gateway.responses.events import ResponseWriter
from elastic_ep.gateway.responses.store import MOST_LISTED, ResponseStore, Stored
from elastic_ep.gateway.serving import EVENT_STREAM, Run, Serving, send, usage_of
from elastic_ep.gateway.settings import ApiSettings

_LISTED = 20
"""Items of a request at once, unless another limit is asked for."""


class ResponsesHandlers:
    def __init__(self, serving: Serving, settings: ApiSettings, reading: Reading) -> None:
        self._serving = serving
        self._settings = settings
        self._reading = reading
        self._store = ResponseStore(settings.responses_store_bytes)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/responses", self.create),
            web.get("/v1/responses/{id}", self.retrieve),
            web.delete("/v1/responses/{id}", self.delete),
            web.post("/v1/responses/{id}/cancel", self.cancel),
            web.get("/v1/responses/{id}/input_items", self.input_items),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        job = await self._reading.job("responses", await request.read(), self._conversation)
        about = job.about
        assert isinstance(about, About)
        name = f"resp_{secrets.token_hex(24)}"
        writer = ResponseWriter(
            name, int(time.time()), self._settings.model_name, about, lambda: secrets.token_hex(12)
        )
        if about.background:
            return await self._begin_background(request, job, about, writer, started)
        async with self._serving.runs(job, request.path, started) as (run,):
            if job.stream:
                return await self._stream(request, job, about, writer, run)
            async for _ in self._events(job, writer, run):
                pass
            self._keep(about, writer)
            return await send(request, [writer.response()])

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        stored = self._store.get(request.match_info["id"])
        if request.query.get("stream", "false").lower() not in ("1", "true"):
            return web.Response(body=stored.response.encode("ascii"), content_type="application/json")
        if not stored.events:
            raise bad_value("stream", "is for responses that were made in the background.")
        after = request.query.get("starting_after", "-1")
        if not after.removeprefix("-").isdecimal() or len(after) > 18:
            raise bad_value("starting_after", "must be an integer.")
        return await self._follow(request, stored, max(0, int(after) + 1))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        stored = self._store.get(name)
        await _stop(stored)
        self._store.remove(name)
        return web.json_response({"id": name, "object": "response", "deleted": True})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        stored = self._store.get(request.match_info["id"])
        if stored.task is None:
            raise ApiError(
                "Only a response that was made in the background can be cancelled.", code="not_background"
            )
        await _stop(stored)
        return web.Response(body=stored.response.encode("ascii"), content_type="application/json")

    async def input_items(self, request: web.Request) -> web.StreamResponse:
        stored = self._store.get(request.match_info["id"])
        query = {name: value for name, value in request.query.items() if value}
        limit = query.get("limit", str(_LISTED))
        if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST_LISTED:
            raise bad_value("limit", f"must be an integer from 1 to {MOST_LISTED}.")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_value("order", 'must be "asc" or "desc".')
        return await send(request, listed(stored.asked, int(limit[:9]), order, query.get("after")))

    async def close(self) -> None:
        """End what runs in the background."""
        tasks = self._store.tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _conversation(self, name: str) -> str:
        """Of the response that a request goes on with. Raises `ApiError`."""
        stored = self._store.get(name, "previous_response_id")
        if not stored.items:
            raise bad_value("previous_response_id", f"names {name[:80]}, which has no end to go on from.")
        return stored.items

    async def _events(self, job: Job, writer: ResponseWriter, run: Run) -> AsyncGenerator[list[bytes], None]:
        """All that come after the first ones. Raises `ApiError` where the answer is aborted."""
        message = Message(job.output.form)
        async for deltas in run.deltas(message):
            tokens = [one for one in run.reader.tokens if one.token.token != run.reader.ended_by]
            run.reader.tokens.clear()
            yield writer.push(deltas, run.reader.generated, tokens)
        assert run.reader.finish is not None
        yield writer.end(run.reader.finish, usage_of(job, [run]))

    async def _stream(
        self, request: web.Request, job: Job, about: About, writer: ResponseWriter, run: Run
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        await response.write(b"".join(writer.begin()))
        try:
            async for events in self._events(job, writer, run):
                if writer.status != "in_progress":
                    self._keep(about, writer)  # before its client may ask for it
                await response.write(b"".join(events))
        except ConnectionError:
            raise
        except Exception as error:
            await response.write(b"".join(writer.fail(self._serving.stream_failed(request, error))))
        await response.write_eof()
        return response

    def _keep(self, about: About, writer: ResponseWriter) -> None:
        if about.store:
            self._store.put(
                writer.id, Stored(about.asked, writer.response(), _joined(about.items, writer.output))
            )

    # In the background

    async def _begin_background(
        self, request: web.Request, job: Job, about: About, writer: ResponseWriter, started: float
    ) -> web.StreamResponse:
        if not about.store or not self._settings.responses_store_bytes:
            raise bad_value("background", "needs 'store': nobody could ask for the response.")
        stored = Stored(about.asked, over=False)
        stored.tell(writer.queue())
        stored.response = writer.response()
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stored.task = asyncio.create_task(self._run_background(job, about, writer, stored, started, admitted))
        try:
            await admitted  # a server that has no room for it says so
        except asyncio.CancelledError:
            stored.task.cancel()  # its client has gone, and nobody knows its id
            raise
        self._store.put(writer.id, stored)
        if job.stream:
            return await self._follow(request, stored, 0)
        return web.Response(body=stored.response.encode("ascii"), content_type="application/json")

    async def _run_background(
        self,
        job: Job,
        about: About,
        writer: ResponseWriter,
        stored: Stored,
        started: float,
        admitted: asyncio.Future[None],
    ) -> None:
        try:
            async with self._serving.runs(job, "/v1/responses", started, connected=False) as (run,):
                admitted.set_result(None)
                stored.tell(writer.start())
                stored.response = writer.response()
                async with aclosing(self._events(job, writer, run)) as told:
                    async for events in told:
                        stored.tell(events)
            stored.items = _joined(about.items, writer.output)
        except asyncio.CancelledError:
            stored.tell(writer.cancel())
        except Exception as error:
            if not admitted.done():
                admitted.set_exception(error)
                return
            failure = translate(error) or ApiError("Internal server error.", status=500)
            self._serving.metrics.http_error(failure.status)
            stored.tell(writer.fail(failure))
        finally:
            stored.response = writer.response()
            stored.end()
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                self._store.put(writer.id, stored)

    async def _follow(self, request: web.Request, stored: Stored, first: int) -> web.StreamResponse:
        response = web.StreamResponse(headers=EVENT_STREAM)
        await response.prepare(request)
        async for event in stored.follow(first):
            await response.write(event)
        await response.write_eof()
        return response


def listed(asked: Sequence[Named], limit: int, order: str, after: str | None) -> list[str]:
    """In pieces, at most `limit` of the items, those behind the one named `after`. Raises `ApiError`."""
    items = asked if order == "asc" else asked[::-1]
    if after is not None:
        names = [item.id for item in items]
        if after not in names:
            raise bad_value("after", "names none of the items.")
        items = items[names.index(after) + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {"first_id": None, "last_id": None}
    rest = json.dumps({**ends, "has_more": len(items) > limit})
    data = [piece for item in page for piece in (",", item.json)][1:]
    return ['{"object":"list","data":[', *data, f"],{rest[1:]}"]


async def _stop(stored: Stored) -> None:
    if stored.task is not None and not stored.task.done():
        stored.task.cancel()
        await asyncio.wait([stored.task])


def _joined(array: str, other: str) -> str:
    """Two JSON arrays as one."""
    inner = ",".join(filter(None, (array.strip()[1:-1], other.strip()[1:-1])))
    return f"[{inner}]"
