"""A host that has joined a group: what `python -m elastic_ep.agent` runs.

It is to its ranks what the run process is to those of the first host: it keeps the host's agent and fork server, the
windows and the shelf. It decides nothing, and does what the controller says (`wire/host_messages.py`).

It lives as long as it is answered. When its lease ends, whatever the reason, its ranks end by themselves
(`host/lease.py`), and it joins anew, with nothing left of before.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path

import anyio
import structlog

from elastic_ep.config import PRELOAD, LogConfig, RankConfig
from elastic_ep.event_log.files import RANKS, make_private
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.windows import Windows, WindowsError
from elastic_ep.fused.library import Unavailable, best_build, usable_builds
from elastic_ep.guided.vocabulary import FILE as VOCABULARY
from elastic_ep.host import lease
from elastic_ep.host.agent_messages import Carry, carried_shape
from elastic_ep.host.devices import this_machine
from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles
from elastic_ep.host.keeper import ForkServerFailed, Keeper
from elastic_ep.host.private_directory import remove
from elastic_ep.host.server_process import ServerProcess, begun
from elastic_ep.kv.shelf_file import ShelfError
from elastic_ep.machines.hosts.lease import Lease as OwnLease
from elastic_ep.timing import Timing
from elastic_ep.wire.control_address import ControlAddress
from elastic_ep.wire.group_key import GroupKey
from elastic_ep.wire.host_messages import (
    Died,
    Expelled,
    Fence,
    GetReady,
    GiveUp,
    HostAlive,
    HostEvent,
    HostReady,
    Join,
    Launched,
    LaunchFailed,
    LaunchWith,
    Lease,
    Leave,
    Left,
    Reach,
    Reaped,
    Refuse,
    ToHost,
    Wait,
    Watch,
    Welcome,
)
from elastic_ep.wire.host_sockets import HostWire, listen

UNANSWERED_S = 5.0
"""After so long it is said that nobody answers."""
ENDED, FAILED, USAGE_ERROR = 0, 1, 2
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """`address`: this host's own, that others dial. `group`: where the group's first host has others join."""

    group: tuple[str, int]
    address: str
    key: GroupKey
    release: str
    log_dir: Path
    log: LogConfig


class CannotJoin(RuntimeError):
    """This host cannot be of use to the group as it is. The message says why, in one line."""


class _Then(Enum):
    """What follows a life of the host."""

    JOIN = "it joins anew"
    END = "it is over"


def local_address(group: tuple[str, int]) -> str:
    """This machine's address, as seen from the group. Raises OSError."""
    family = socket.AF_INET6 if ":" in group[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((group[0], group[1] or 9))  # nothing is sent
        return str(probe.getsockname()[0])


async def live(options: JoinOptions, stop: anyio.Event) -> int:
    """Join, again and again, until the group or `stop` says that it is over; the exit status."""
    status = ENDED
    then = _Then.JOIN
    try:
        while then is _Then.JOIN and not stop.is_set():
            with begun(PRELOAD) as server:
                then = await _Life(options, stop).run(server)
    except* CannotJoin as errors:  # in groups, as it went through groups of tasks
        status = USAGE_ERROR
        log.error(_words(errors))
    except* ForkServerFailed as errors:
        status = FAILED
        log.error(_words(errors))
    return status


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


class _Life:
    """From joining to the end of the lease."""

    def __init__(self, options: JoinOptions, stop: anyio.Event) -> None:
        self._options = options
        self._stop = stop
        self._over = anyio.Event()
        self._answered = anyio.Event()
        self._needs: GetReady | None = None
        self._welcomed = anyio.Event()
        self._welcome: Welcome | None = None
        self._welcomed_ns = 0
        self._then = _Then.JOIN
        self._error: str | None = None
        self._ranks: _Ranks | None = None
        self._lease = OwnLease(0, 0)
        """CLOCK_BOOTTIME nanoseconds."""
        self._page: lease.LeasePage | None = None
        """Where ranks read until when it is."""
        self._orders: list[ToHost] = []
        """That came while the keeper was not there yet."""
        group, port = options.group
        token = secrets.token_hex(8).encode()
        self._wire = HostWire(group, port, options.key, token, self._hear, self._misunderstand)

    async def run(self, server: ServerProcess | None) -> _Then:
        """Raises `CannotJoin`, `ForkServerFailed`."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._until_stopped)
                tasks.start_soon(self._ask)
                await self._answered.wait()
                if self._needs is not None and not self._over.is_set():
                    await self._get_ready(self._needs, server)
                tasks.cancel_scope.cancel()
        finally:
            self._wire.close()
        if self._error is not None:
            raise CannotJoin(self._error)
        return self._then

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        self._end(_Then.END)

    def _end(self, then: _Then) -> None:
        if not self._over.is_set():
            self._then = then
            self._over.set()
            self._answered.set()
            self._welcomed.set()

    async def _ask(self) -> None:
        while not self._welcomed.is_set():
            # Again and again: a connection that broke took the question with it.
            self._wire.send(Join(self._options.address, self._options.release, _builds(), this_machine()))
            with anyio.move_on_after(UNANSWERED_S):
                await self._welcomed.wait()
                return
            if not self._answered.is_set():
                log.warning(
                    "nobody answers: is the group there, and does it have the same key?",
                    join=f"{self._options.group[0]}:{self._options.group[1]}",
                )

    # The group

    def _hear(self, message: ToHost) -> None:
        match message:
            case Wait(why):
                log.info("this host waits for a place", why=why)
            case Refuse(why):
                self._error = f"the group refuses this host: {why}"
                self._end(_Then.END)
            case GetReady() if self._needs is None:
                self._needs = message
                self._answered.set()
            case GetReady() if message != self._needs:
                log.info("the group has started anew")
                self._end(_Then.JOIN)
            case GetReady():
                pass  # it has asked again
            case Welcome():
                self._welcome, self._welcomed_ns = message, _now_ns()
                self._welcomed.set()
            case Lease(number):
                self._renewed(number)
            case Expelled() if self._over.is_set():
                pass  # the answer to what it said meanwhile
            case Expelled():
                log.warning("the group has taken this host for dead: its ranks end, and it joins anew")
                self._end(_Then.JOIN)
            case Leave():
                log.info("the group stops")
                self._end(_Then.END)
            case _ if self._ranks is None:
                self._orders.append(message)
            case _:
                self._ranks.carry_out(message)

    def _misunderstand(self, why: str) -> None:
        self._error = f"the group is not understood: {why}"
        self._end(_Then.END)

    # The lease

    async def _stay_alive(self, timing: Timing) -> None:
        """From the welcome on."""
        await self._welcomed.wait()
        self._lease = OwnLease.begun(timing.lease_ms * 1_000_000, self._welcomed_ns)
        self._show_lease()
        while not self._lease.ended(_now_ns()):
            self._wire.send(HostAlive(self._lease.speak(_now_ns())))
            await anyio.sleep(timing.host_beat_ms / 1000)
        log.warning(
            "the group was not heard of for too long: this host's ranks end", for_s=timing.lease_ms / 1000
        )
        self._end(_Then.JOIN)

    def _renewed(self, number: int) -> None:
        if self._lease.answered(number):
            self._show_lease()

    def _show_lease(self) -> None:
        if self._page is not None:
            self._page.renew(self._lease.until)

    # The ranks

    async def _get_ready(self, needs: GetReady, server: ServerProcess | None) -> None:
        """Start what ranks need, and serve when there is a place: all but the ranks themselves is there by then."""
        config = RankConfig.from_json(needs.config)
        self._check(config)
        with _directory() as directory, self._files(needs, config) as files:
            if needs.vocabulary:
                (directory / VOCABULARY).write_bytes(needs.vocabulary)
            self._page = lease.LeasePage(directory / lease.FILE, create=True)
            here = self._as_here(needs, config, directory)
            options = LaunchOptions(
                entry=needs.entry,
                preload=needs.preload,
                directory=str(directory),
                timing=config.timing,
                log=self._options.log,
            )
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stay_alive, config.timing)
                async with Keeper(options, files, begun=server, carries=True) as keeper:
                    await self._unless_over(partial(keeper.start, self._on_event))
                    if not self._welcomed.is_set():
                        log.info("this host is ready for a place")
                        await self._welcomed.wait()
                    if self._welcome is not None and not self._over.is_set():
                        await self._serve(needs, self._welcome, keeper, here)
                tasks.cancel_scope.cancel()
            self._wire.send(Left())

    async def _serve(self, needs: GetReady, welcome: Welcome, keeper: Keeper, here: RankConfig) -> None:
        with self._listener(needs.carrier_port) as carrier:
            key, shape = self._options.key.carriers, carried_shape(here.device, ExchangeShape(*needs.shape))
            told = Carry(needs.hosts, welcome.host, welcome.incarnation, key, shape)
            keeper.carry(told, carrier, self._wire.send)
            self._ranks = _Ranks(keeper, here)
            for order in self._orders:
                self._ranks.carry_out(order)
            self._wire.send(HostReady(carrier.getsockname()[1]))
            log.info("this host is in the group", host=welcome.host, address=self._options.address)
            await self._over.wait()
            self._ranks = None

    async def _unless_over(self, work: Callable[[], Awaitable[None]]) -> None:
        async with anyio.create_task_group() as tasks:

            async def leave() -> None:
                await self._over.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(leave)
            await work()
            tasks.cancel_scope.cancel()

    def _on_event(self, event: HostEvent) -> None:
        if isinstance(event, Launched | LaunchFailed | Died | Reaped):
            self._wire.send(event)

    def _check(self, config: RankConfig) -> None:
        """Raises `CannotJoin`."""
        if not (Path(config.model) / "config.json").is_file():
            raise CannotJoin(
                f"the group's model is in {config.model}, and this host has none there: put a copy in that place"
            )
        if config.fused:
            try:
                best_build()
            except Unavailable as error:
                raise CannotJoin(str(error)) from error

    def _as_here(self, needs: GetReady, config: RankConfig, directory: Path) -> RankConfig:
        """What is this host's own in the configuration of its ranks."""
        event_log = config.event_log
        if event_log is not None:
            folder = self._options.log_dir.resolve() / needs.run / RANKS
            with suppress(FileExistsError):  # the first host's, on the same disk, or of a life before
                make_private(folder)
            event_log = replace(event_log, folder=str(folder))
        return replace(
            config,
            directory=str(directory),
            host_address=self._options.address,
            event_log=event_log,
            control=ControlAddress(
                self._options.group[0],
                needs.pub_port,
                needs.rank_port,
                self._options.key.secret.hex(),
            ),
        )

    @contextmanager
    def _files(self, needs: GetReady, config: RankConfig) -> Iterator[SharedFiles]:
        """Raises `CannotJoin`."""
        fds: list[int] = []
        try:
            shape = carried_shape(config.device, ExchangeShape(*needs.shape))
            fds.append(Windows.create(shape, carried=True) if shape else os.open(os.devnull, os.O_RDONLY))
            fds.append(config.shelf.create() if config.shelf else os.open(os.devnull, os.O_RDONLY))
            yield SharedFiles(*fds)
        except (WindowsError, ShelfError) as error:
            raise CannotJoin(f"too little memory for this group's ranks: {error.strerror}") from error
        finally:
            for fd in fds:
                os.close(fd)

    @contextmanager
    def _listener(self, port: int) -> Iterator[socket.socket]:
        """Raises `CannotJoin`."""
        address = self._options.address
        try:
            listener = listen(address, port)
        except OSError as error:
            raise CannotJoin(
                f"cannot listen at {address}:{port} ({error.strerror}): give --address, one of this machine's"
            ) from error
        with listener:
            yield listener


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Those of this host. `here` has what is the host's own in their configuration."""

    keeper: Keeper
    here: RankConfig

    def carry_out(self, order: ToHost) -> None:
        match order:
            case LaunchWith(member, config):
                self.keeper.launch(member, self._own(config))
            case Watch(member):
                self.keeper.watch(member)
            case Fence(member):
                self.keeper.kill(member)
            case Reach():
                self.keeper.reach(order)
            case GiveUp():
                self.keeper.give_up(order)

    def _own(self, config_json: str) -> str:
        return replace(
            RankConfig.from_json(config_json),
            directory=self.here.directory,
            host_address=self.here.host_address,
            event_log=self.here.event_log,
            control=self.here.control,
        ).to_json()


@contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="elastic_ep-"))
    try:
        yield directory
    finally:
        remove(directory)


def _builds() -> tuple[str, ...]:
    return tuple(usable_builds())


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
