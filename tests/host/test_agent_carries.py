"""Two agents, as of two hosts whose ranks are on GPUs: what ranks say of their steps goes from one to the other."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.host.agent_messages import Carry
from elastic_ep.wire.host_messages import Links, Reach
from elastic_ep.wire.host_sockets import listen
from tests.kit.harness import DEADLINE_S, running, wait_until

HOSTS = (0, 1)


def test_steps_are_told_where_ranks_are_on_gpus(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            barriers, linked = [], [anyio.Event() for _ in HOSTS]
            ports: list[int] = []
            for own in HOSTS:
                directory = tmp_path / str(own)
                directory.mkdir(mode=0o700)
                run = await stack.enter_async_context(running(directory))
                listener = stack.enter_context(listen("127.0.0.1", 0))

                def links(now: Links, own: int = own) -> None:
                    if now.hosts:
                        linked[own].set()

                run.launcher.carry(Carry(HOSTS, own, 1, b"key", None), listener, links)
                if own:
                    run.launcher.reach(Reach(0, "127.0.0.1", ports[0]))
                ports.append(listener.getsockname()[1])
                barriers.append(StepBarrier(directory, len(HOSTS), own))
            with anyio.fail_after(30):
                for event in linked:
                    await event.wait()
                barriers[1].say(5)
                await asyncio.to_thread(wait_until, lambda: barriers[0].of(1) == 5, DEADLINE_S, "it is told")

    asyncio.run(main())
