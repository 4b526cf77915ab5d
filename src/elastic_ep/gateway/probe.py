"""`/health_generate`: is a token made now? Asked by all at once, one request of the server's own answers them."""

from __future__ import annotations

import asyncio
import time

from elastic_ep.gateway.errors import translate
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.serving import Serving
from elastic_ep.group.port import Busy

DEADLINE_S = 20.0
_BODY = b'{"prompt": [0], "max_tokens": 1, "temperature": 0}'


class Probe:
    def __init__(self, serving: Serving, reading: Reading) -> None:
        self._serving = serving
        self._reading = reading
        self._running: asyncio.Task[str] | None = None

    async def fault(self) -> str:
        """Why no token is made; empty if one is, whosever it is."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._ask())
        return await asyncio.shield(self._running)

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _ask(self) -> str:
        metrics = self._serving.metrics
        before = metrics.generated
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._generate()
        except TimeoutError:
            return "" if metrics.generated > before else f"no token came within {DEADLINE_S:.0f} s"
        except Busy:  # so there are others' requests, and these are served
            return ""
        except Exception as error:
            answer = translate(error)
            if answer is None:
                raise
            return answer.message
        return ""

    async def _generate(self) -> None:
        job = await self._reading.job("completion", _BODY)
        async with self._serving.runs(job, "/health_generate", time.monotonic(), connected=False) as (run,):
            async for _ in run.texts():
                pass
            run.finished()
