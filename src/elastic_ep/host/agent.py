"""The host's agent: what starts, watches and fences its ranks. ``python -m elastic_ep.host.agent CONTROL_FD LIFE_FD``.

It decides nothing: `Launcher` does what its keeper tells it to (see keeper.py), and says what it sees. It may be killed
at any moment, and the next one goes on. No torch.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_ep import titles
from elastic_ep.host import life_line
from elastic_ep.host.agent_messages import (
    Adopt,
    AgentStarted,
    Alive,
    AllAdopted,
    Asked,
    Begin,
    Carry,
    Close,
    Ping,
    ServerBegun,
    ServerExited,
    ServerFailed,
    ServerWanted,
    ToAgent,
)
from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles
from elastic_ep.host.launcher import Launcher
from elastic_ep.host.packets import PacketSocket
from elastic_ep.host.scheduling import make_prompt
from elastic_ep.wire.host_messages import (
    AgentReady,
    Died,
    Fence,
    GiveUp,
    Launch,
    Links,
    RankEvent,
    Reach,
    Reaped,
    ServerReady,
    Watch,
)
from elastic_ep.wire.messages import Member

if TYPE_CHECKING:
    from elastic_ep.host.carrier import Carrier

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that waits for a death, and has it, waits for the interpreter lock."""


class Agent:
    """Hears its keeper on the running event loop."""

    def __init__(self, control: socket.socket) -> None:
        self._told_at_once: set[Member] = set()
        self._launcher: Launcher | None = None
        self._closing: asyncio.Task[None] | None = None
        self._options: LaunchOptions | None = None
        self._files: SharedFiles | None = None
        self._carrier: Carrier | None = None
        self._links: Links | None = None
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[int] = self._loop.create_future()
        self._link = PacketSocket(control, ToAgent, self._hear, self._refuse, self._end)
        self._link.send(AgentStarted(os.getpid()))

    async def run(self) -> int:
        """Until it is told to close, or the keeper is gone; the exit status."""
        return await self._over

    def _hear(self, message: ToAgent, fds: list[int]) -> None:
        if isinstance(message, Begin):
            self._begin(message, fds)
            return
        launcher = self._launcher
        assert launcher is not None, "the keeper begins with it"
        match message:
            case ServerBegun(pid, ready):
                control, pidfd = fds
                launcher.server_begun(pid, socket.socket(fileno=control), pidfd, ready)
            case ServerFailed(reason):
                launcher.server_failed(reason)
            case ServerExited(pid, status):
                launcher.server_exited(pid, status)
            case Adopt():
                rest = iter(fds)
                life_fd, pidfd = (next(rest) if comes else -1 for comes in message.fds)
                launcher.adopt(message, life_fd, pidfd)
            case AllAdopted():
                self._link.send(AgentReady(os.getpid(), launcher.all_adopted()))
            case Launch(member):
                launcher.launch(member, fds[0])
            case Watch(member):
                launcher.watch(member)
            case Fence(member):
                launcher.kill(member)
            case Carry():
                self._carry(message, fds[0])
            case Reach(host, address, port):
                if self._carrier is not None:
                    self._carrier.reach(host, (address, port))
            case GiveUp(host, incarnation):
                if self._carrier is not None:
                    self._carrier.fence(host, incarnation)
            case Ping():
                self._link.send(Alive())
            case Close():
                self._closing = self._loop.create_task(self._close(launcher))

    def _begin(self, message: Begin, fds: list[int]) -> None:
        mutex_fd, *files = fds
        self._files = SharedFiles(*files)
        self._options = message.options
        titles.show(f"host agent {message.options.directory}", "eep-agent")
        self._launcher = Launcher(message.options, self._files, mutex_fd, self._tell, self._tell_at_once)
        if message.carries:
            importlib.import_module("elastic_ep.host.carrier")
            importlib.import_module("elastic_ep.exchange.mirror")
            importlib.import_module("elastic_ep.exchange.step_barrier")

    def _carry(self, told: Carry, listener_fd: int) -> None:
        # Not at the top: a host that is alone in its group needs none of it.
        from elastic_ep.exchange.mirror import Mirror
        from elastic_ep.exchange.step_barrier import StepLines
        from elastic_ep.host.carrier import Carrier, CarrierConfig

        assert self._files is not None, "the keeper begins with them"
        assert self._options is not None, "and with these"
        config = CarrierConfig(told.hosts, told.own, told.incarnation, told.key)
        windows = steps = None
        if told.shape is not None:
            windows = Mirror(self._files.windows, told.shape, told.hosts, told.own)
        else:
            steps = StepLines(Path(self._options.directory), len(told.hosts))
        self._carrier = Carrier(
            config,
            windows,
            steps,
            listener=socket.socket(fileno=listener_fd),
            on_links=self._links_changed,
        )
        self._tell_links()

    def _links_changed(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: it is over
            self._loop.call_soon_threadsafe(self._tell_links)

    def _tell_links(self) -> None:
        assert self._carrier is not None, "it calls this"
        links = Links(self._carrier.links)
        if links != self._links:
            self._links = links
            self._link.send(links)

    async def _close(self, launcher: Launcher) -> None:
        await launcher.close()
        self._end()

    def _tell(self, message: Asked | ServerWanted | ServerReady | RankEvent, *fds: int) -> None:
        if isinstance(message, Died) and message.member in self._told_at_once:
            return
        if isinstance(message, Reaped):
            self._told_at_once.discard(message.member)
        self._link.send(message, *fds)

    def _tell_at_once(self, message: Died) -> None:
        if self._link.send_at_once(message):
            self._told_at_once.add(message.member)

    def _refuse(self, why: str) -> None:
        # Late: it takes a third of the agent's start, and there is seldom anything to say.
        import structlog

        from elastic_ep import logs
        from elastic_ep.config import LogConfig

        logs.configure(self._options.log if self._options else LogConfig(), "host agent")
        structlog.get_logger().error("the host's agent does not understand its keeper, and ends", why=why)
        self._end(1)

    def _end(self, status: int = 0) -> None:
        if not self._over.done():
            self._over.set_result(status)


async def _live(control: socket.socket) -> int:
    return await Agent(control).run()


def main(control_fd: int, life_fd: int) -> int:
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    life_line.bind(life_fd)
    os.set_inheritable(life_fd, False)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the keeper
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    make_prompt()
    with suppress(BrokenPipeError):
        return asyncio.run(_live(control))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
