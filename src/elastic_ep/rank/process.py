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
from collections.abc import Sequence
from pathlib import Path

import anyio
import structlog

from elastic_ep import logs, titles
from elastic_ep.config import RankConfig
from elastic_ep.exchange.base import Exchange
from elastic_ep.host.peer_notices import NoticeReader
from elastic_ep.host.scheduling import make_prompt
from elastic_ep.machines.rank.member import (
    Adopt,
    AdoptPlacement,
    AskSnapshot,
    Connect,
    Effect,
    Expelled,
    MakePromise,
    Mask,
    MemberMachine,
    ReleaseHold,
)
from elastic_ep.rank.connector import Connector
from elastic_ep.rank.engine import build_engine
from elastic_ep.rank.forward import ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.slots import SlotWorker
from elastic_ep.rank.store_client import ControlStore
from elastic_ep.weights.transfer import open_plane
from elastic_ep.wire.messages import (
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
    RankState,
    RequestFailed,
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


def main(config_json: str, windows_fd: int, life_fd: int) -> int:
    """Run this rank until it is told to stop; the exit status. `life_fd` ends when the run process does."""
    config = RankConfig.from_json(config_json)
    logs.configure(config.log, f"rank {config.rank}.{config.incarnation}")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    make_prompt()  # a mask must not wait behind the other ranks' forward threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return anyio.run(RankProcess(config, windows_fd, life_fd).run)


class RankProcess:
    def __init__(self, config: RankConfig, windows_fd: int, life_fd: int) -> None:
        self._config = config
        self._life_fd = life_fd
        self._me = Member(config.rank, config.incarnation)
        self._machine = MemberMachine(self._me)
        self._mailbox = Mailbox(self._notify)
        open_plane_once = functools.cache(open_plane)
        self._slots = SlotWorker(self._mailbox, open_plane_once, self._config.timing)
        self._store = ControlStore(self._mailbox.post, self._config.timing)
        self._forward = ForwardThread(
            config,
            self._mailbox,
            lambda c: build_engine(c, windows_fd, open_plane_once, self._store, self._device_opened),
        )
        self._heard_pub = False
        self._reported = anyio.Event()
        """Set when a step report has gone out since the last heartbeat was due: it is a sign of life too."""
        self._behind = False
        self._fell_behind = anyio.Event()
        self._masked: set[Member] = set()
        self._ready_to_join = False
        self._status: int | None = None
        self._finished = anyio.Event()
        self._shown = RankState.LAUNCHING

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._connector = Connector(self._exchange, self._loop, slow=self._config.device != "cpu")
        self._loop.add_reader(self._life_fd, self._orphaned)
        self._wire = RankWire(
            Path(self._config.directory), self._me, self._on_numbered, self._on_direct, self._refuse
        )
        notices = NoticeReader(Path(self._config.directory), self._me, self._on_peer_death)
        self._wire.send(Hello(os.getpid()))
        self._report(RankState.INIT_CUDA)
        self._forward.start()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._synchronise)
            if self._config.timing.heartbeat_ms:
                tasks.start_soon(self._send_heartbeats)
            await self._finished.wait()
            tasks.cancel_scope.cancel()
        notices.close()
        self._wire.close()
        assert self._status is not None
        return self._status

    def _finish(self, status: int) -> None:
        if self._status is None:
            self._status = status
            self._finished.set()

    def _orphaned(self) -> None:
        os._exit(ORPHANED_STATUS)

    # Control plane

    async def _synchronise(self) -> None:
        """Ask until a snapshot has come and the subscription is proven: PUB loses what precedes it.

        HAZARD: an answer comes with a beat to all ranks. If every beat made every rank that is behind ask again,
        a few late ranks would keep the controller busy for ever; so each asks at its own pace only.
        """
        while True:
            while self._behind or not self._synchronised():
                self._wire.send(SnapshotRequest())
                await anyio.sleep(self._config.timing.sync_retry_ms / 1000)
            self._fell_behind = anyio.Event()
            await self._fell_behind.wait()

    def _synchronised(self) -> bool:
        return self._heard_pub and self._machine.number is not None

    def _on_numbered(self, message: Numbered) -> None:
        self._heard_pub = True
        self._perform(self._machine.step(message))

    def _on_direct(self, message: ToRank) -> None:
        match message:
            case Snapshot():
                self._behind = False
                self._perform(self._machine.step(message))
            case Assign() | Cancel():
                self._mailbox.deliver(message)
            case CopySlot() | SumSlots():
                self._slots.order(message)
            case StoreValue():
                self._store.received(message)
            case Drain():
                self._show(RankState.DRAINING)  # the router gives nothing new; what runs, runs on
            case Shutdown():
                self._shut_down()

    def _refuse(self, request_id: int, reason: str) -> None:
        self._wire.send(RequestFailed(request_id, FailureCode.REFUSED, reason))

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case AskSnapshot():
                    self._behind = True
                    self._fell_behind.set()
                case Connect(members):
                    self._connector.connect(members)
                case MakePromise():
                    self._connector.when_connected(functools.partial(self._promise, effect))
                case ReleaseHold():
                    self._connector.forget()
                    self._mailbox.release()
                case Mask(member):
                    self._mask(member)
                case Adopt(view):
                    self._mailbox.adopt(view)
                    if self._me in view.members and self._shown is not RankState.DRAINING:
                        self._show(RankState.SERVING)
                case AdoptPlacement(placement):
                    self._mailbox.adopt_placement(placement)
                case Expelled():
                    log.error("expelled from the group")
                    os._exit(EXPELLED_STATUS)
        self._say_ready()

    def _promise(self, promise: MakePromise) -> None:
        step = self._mailbox.promise() if promise.seated else 0
        self._wire.send(Promise(promise.attempt, step))

    def _exchange(self) -> Exchange:
        exchange = self._forward.exchange
        assert exchange is not None, "asked to take part before this rank was ready"
        return exchange

    def _on_peer_death(self, member: Member) -> None:
        """Before the view that lacks it, most of the time."""
        if member != self._me:
            self._mask(member)
            self._mailbox.peer_died(member)

    def _mask(self, member: Member) -> None:
        """Once. Masks that come before the exchange exists are kept for it."""
        if member in self._masked:
            return
        self._masked.add(member)
        if self._forward.exchange is not None:
            self._issue_mask(self._forward.exchange, member)

    def _issue_mask(self, exchange: Exchange, member: Member) -> None:
        exchange.mask(member)
        self._mailbox.mask_ns = time.monotonic_ns()

    def _shut_down(self) -> None:
        """Stop at the next boundary. Peers stop too, each at its own boundary: wait for none of them."""
        self._mailbox.request_stop()
        if self._forward.exchange is None:
            self._finish(0)
            return
        for member in self._machine.view.members - {self._me}:
            self._forward.exchange.mask(member)

    # Forward thread

    def _notify(self) -> None:
        self._loop.call_soon_threadsafe(self._drain_outbox)

    def _device_opened(self) -> None:
        """The forward thread's: said again, so that the run process holds what is open before kernels run."""
        self._mailbox.post((RankState.INIT_CUDA, "", ()))

    def _drain_outbox(self) -> None:
        if self._finished.is_set():
            return  # the slots' thread may still have something to say, but the wire is closed or about to be
        outbox = self._mailbox.outbox
        while outbox:
            item = outbox.popleft()
            if isinstance(item, StepReport):
                self._wire.send(item)
                self._reported.set()
            elif isinstance(item, tuple):
                self._on_forward_state(*item)
            else:
                self._wire.send(item)

    def _on_forward_state(self, state: RankState, reason: str, suspects: tuple[int, ...]) -> None:
        match state:
            case RankState.INIT_CUDA:
                self._report(state)
            case RankState.JOINING:
                self._ready_to_join = True
                self._say_ready()
            case RankState.STOPPED:
                self._report(state)
                self._finish(0)
            case RankState.FAILED:
                self._report(state, reason, suspects)
                self._finish(1)
            case _:
                self._slots.start(self._forward.runner)
                for member in self._masked:
                    self._issue_mask(self._exchange(), member)
                self._report(state)

    def _say_ready(self) -> None:
        if self._ready_to_join and self._synchronised():
            self._ready_to_join = False
            self._report(RankState.JOINING)

    def _show(self, state: RankState) -> None:
        """In the process's title."""
        if state is not self._shown:
            self._shown = state
            titles.show_rank(self._me, state)

    def _report(self, state: RankState, reason: str = "", suspects: tuple[int, ...] = ()) -> None:
        self._show(state)
        self._wire.send(RankReport(state, reason, suspects))

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
        exchange = self._forward.exchange
        return Heartbeat(
            step=self._forward.step,
            operations=exchange.operations if exchange else 0,
            cpu_ms=self._forward.cpu_ms(),
            waiting_for=exchange.waiting_for if exchange else None,
            parked=parked,
            kv_pages=self._forward.runner.kv_pages if exchange else 0,
        )
