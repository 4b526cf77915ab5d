"""A rank process: its control loop. Never blocks, never touches the device.

The fork server calls `main` in the main thread of a freshly forked process that holds its death mutex.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import structlog

from elastic_ep import logs, titles
from elastic_ep.config import RankConfig
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.exchange.base import Exchange
from elastic_ep.host import lease
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.host.peer_notices import NoticeReader
from elastic_ep.host.scheduling import make_prompt
from elastic_ep.machines.rank import events as ev
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.rank.connector import Connector
from elastic_ep.rank.engine import OpenPlane, build_engine
from elastic_ep.rank.forward import Build, ForwardThread
from elastic_ep.rank.machine_log import MachineLog
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Outbox, Post, Ready
from elastic_ep.rank.slots import SlotWorker
from elastic_ep.rank.store_client import ControlStore
from elastic_ep.weights.transfer import open_plane as open_transfer_plane
from elastic_ep.wire.messages import (
    NO_PAGES,
    Assign,
    Cancel,
    Drain,
    FailureCode,
    Heartbeat,
    Hello,
    Member,
    Numbered,
    Promise,
    RankReport,
    RequestFailed,
    Resume,
    Shutdown,
    Snapshot,
    SnapshotRequest,
    StepReport,
    ToRank,
)
from elastic_ep.wire.slot_messages import CopySlot, SumSlots
from elastic_ep.wire.sockets import RankWire
from elastic_ep.wire.store_messages import StoreValue

SWITCH_INTERVAL_S = 0.0005
"""How long the forward thread may keep the interpreter lock while the control loop wants it."""
EXPELLED_STATUS = 3
ORPHANED_STATUS = 4
log = structlog.get_logger()


def main(config_json: str, files: SharedFiles, life_fd: int) -> int:
    """Run this rank until it is told to stop; the exit status. `life_fd` ends when the run process does."""
    config = RankConfig.from_json(config_json)
    if config.control is not None:  # it is on a host that has joined
        lease.live_by(Path(config.directory), config.timing.host_beat_ms / 1000)
    logs.configure(config.log, f"rank {config.rank}.{config.incarnation}")
    return live(RankProcess(config, files, life_fd))


def live(rank: RankProcess) -> int:
    """To the exit status, in the main thread of a process that does nothing else."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    make_prompt()  # a mask must not wait behind the other ranks' forward threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return anyio.run(rank.run)


class RankProcess:
    """Feeds the rank's machine with what this process hears, and does what it says.

    Benches put another engine in: `build` makes it, `forward` the thread that runs its steps, and `open_plane` this
    rank's end of the state plane.
    """

    def __init__(
        self,
        config: RankConfig,
        files: SharedFiles,
        life_fd: int,
        *,
        build: Build | None = None,
        forward: Callable[[RankConfig, Mailbox, Post, Build], ForwardThread] = ForwardThread,
        open_plane: OpenPlane | None = None,
    ) -> None:
        self._config = config
        self._life_fd = life_fd
        self._me = Member(config.rank, config.incarnation)
        self._machine = RankMachine(self._me)
        self._log = MachineLog(config, self._machine, lambda s, call: self._loop.call_later(s, call))
        self._mailbox = Mailbox()
        self._outbox = Outbox(self._wake)
        self._engine: Ready | None = None
        open_plane_once = functools.cache(
            open_plane or functools.partial(open_transfer_plane, config.host_address)
        )
        self._slots = SlotWorker(self._outbox.post, open_plane_once, self._config.timing)
        self._store = ControlStore(self._outbox.post, self._config.timing)

        def build_here(told: RankConfig) -> tuple[StepRunner, Exchange]:
            opened = functools.partial(self._outbox.post, ev.DeviceOpened())
            return build_engine(told, files, open_plane_once, self._store, opened)

        self._forward = forward(config, self._mailbox, self._outbox.post, build or build_here)
        self._reported = anyio.Event()
        """Set when a step report has gone out since the last heartbeat was due: it is a sign of life too."""
        self._fell_behind = anyio.Event()
        self._quiet_beats = 0
        """Since something that was published has come."""

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._connector = Connector(self._exchange, self._loop, slow=self._config.device != "cpu")
        self._loop.add_reader(self._life_fd, self._orphaned)
        self._wire = RankWire(
            Path(self._config.directory),
            self._me,
            self._on_published,
            self._on_direct,
            self._refuse,
            self._config.control,
        )
        notices = NoticeReader(
            Path(self._config.directory), self._me, lambda member: self._hear(ev.PeerDied(member))
        )
        self._wire.send(Hello(os.getpid()))
        self._hear(ev.Started())
        self._forward.start()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._synchronise)
            tasks.start_soon(self._doubt_quiet)
            if self._config.timing.heartbeat_ms:
                tasks.start_soon(self._send_heartbeats)
            status = await self._exit
            tasks.cancel_scope.cancel()
        notices.close()
        self._wire.close()
        self._log.close()
        return status

    def _orphaned(self) -> None:
        os._exit(ORPHANED_STATUS)

    def _hear(self, event: ev.Event) -> None:
        before = self._machine.stage
        try:
            effects = self._machine.step(event)
        except Exception as error:  # whose notes tell the last events
            log.error("the rank's machine cannot go on", exc_info=True)
            event = ev.StepsFailed(f"{type(error).__name__}: {error}")
            effects = self._machine.step(event)
        for effect in effects:
            self._perform(effect)
        self._log.heard(event, effects)
        if self._machine.stage is not before:
            titles.show_rank(self._me, self._machine.stage)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.AskSnapshot():
                self._fell_behind.set()
            case ev.Connect(members):
                self._connector.connect(members)
            case ev.MakePromise():
                self._connector.when_connected(functools.partial(self._promise, effect))
            case ev.ReleaseHold():
                self._connector.forget()
                self._mailbox.release()
            case ev.Mask(member):
                self._exchange().mask(member)
                self._mailbox.mask_ns = time.monotonic_ns()
            case ev.RouteAround(member):
                self._mailbox.peer_died(member)
            case ev.Adopt(view):
                self._mailbox.adopt(view)
            case ev.AdoptPlacement(placement):
                self._mailbox.adopt_placement(placement)
            case RankReport():
                self._wire.send(effect)
            case ev.StopSteps():
                self._mailbox.request_stop()
            case ev.Exit(status):
                self._exit.set_result(status)
            case ev.Expelled():
                log.error("expelled from the group")
                os._exit(EXPELLED_STATUS)

    def _promise(self, promise: ev.MakePromise) -> None:
        step = self._mailbox.promise() if promise.seated else 0
        self._wire.send(Promise(promise.attempt, step))

    def _exchange(self) -> Exchange:
        assert self._engine is not None, "asked to take part before this rank was ready"
        return self._engine.exchange

    # Control plane

    async def _synchronise(self) -> None:
        """Ask until a snapshot has come and the subscription is proven: PUB loses what precedes it.

        HAZARD: an answer comes with a beat to all ranks. If every beat made every rank that is behind ask again,
        a few late ranks would keep the controller busy for ever; so each asks at its own pace only.
        """
        while True:
            while not self._machine.synchronised:
                self._wire.send(SnapshotRequest())
                await anyio.sleep(self._config.timing.sync_retry_ms / 1000)
            self._fell_behind = anyio.Event()
            await self._fell_behind.wait()

    async def _doubt_quiet(self) -> None:
        """Beats are published again and again. If none comes, others may hear what this rank does not (a connection to
        another host breaks in silence), and would wait for it: so it asks, which goes another way."""
        timing = self._config.timing
        while True:
            await anyio.sleep(timing.beat_ms / 1000)
            self._quiet_beats += 1
            if self._quiet_beats > timing.calm_factor:
                self._wire.send(SnapshotRequest())

    def _on_published(self, message: Numbered) -> None:
        self._quiet_beats = 0
        self._hear(message)

    def _on_direct(self, message: ToRank) -> None:
        match message:
            case Snapshot() | Drain() | Resume() | Shutdown():
                self._hear(message)
            case Assign() | Cancel():
                self._mailbox.deliver(message)
            case CopySlot() | SumSlots():
                self._slots.order(message)
            case StoreValue():
                self._store.received(message)

    def _refuse(self, request_id: int, reason: str) -> None:
        self._wire.send(RequestFailed(request_id, FailureCode.REFUSED, reason))

    # This rank's threads

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._drain_outbox)

    def _drain_outbox(self) -> None:
        if self._machine.lifecycle.final:
            return  # the slots' thread may still have something to say, but the wire is closed or about to be
        for item in self._outbox.take():
            match item:
                case Ready():
                    self._engine = item
                    self._slots.start(item.runner)
                    self._hear(ev.EngineReady())
                case ev.DeviceOpened() | ev.WarmedUp() | ev.StepsEnded() | ev.StepsFailed():
                    self._hear(item)
                case StepReport():
                    self._wire.send(item)
                    self._reported.set()
                case _:
                    self._wire.send(item)

    async def _send_heartbeats(self) -> None:
        """A parked rank is silent for longer than others may be, so whoever judges it must know that it is parked.

        HAZARD: a step report says nothing of parking, and the newest sign of life counts. One that goes out after the
        heartbeat that said so (the rank was already told to park, or goes on) ends the long pause.
        """
        timing = self._config.timing
        while True:
            parked = self._mailbox.waiting_at is not None
            if parked or not self._reported.is_set():
                self._wire.send(self._heartbeat(parked))
            self._reported = anyio.Event()
            pause_s = (timing.parked_heartbeat_ms if parked else timing.heartbeat_ms) / 1000
            if self._config.device != "cpu" and self._me in self._machine.view.members:
                faulthandler.dump_traceback_later(pause_s + timing.held_up_ms / 1000)
            if parked:
                with anyio.move_on_after(pause_s):
                    await self._reported.wait()
            else:
                await anyio.sleep(pause_s)

    def _heartbeat(self, parked: bool) -> Heartbeat:
        engine = self._engine
        return Heartbeat(
            step=max(0, self._mailbox.begun),
            operations=engine.exchange.operations if engine else 0,
            cpu_ms=self._forward.cpu_ms(),
            waiting_for=engine.exchange.waiting_for if engine else None,
            parked=parked,
            pages=engine.runner.page_counts if engine else NO_PAGES,
        )
