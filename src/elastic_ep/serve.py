"""The run process: composes API, router, controller, the host's agent and event log on one event loop. No torch."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import structlog
from aiohttp import web

from elastic_ep import logs, titles
from elastic_ep.config import PRELOAD, ConfigError, EventLogMode, RankLog, ServeConfig, why
from elastic_ep.event_log.files import RANKS, make_private
from elastic_ep.event_log.log import EventLog
from elastic_ep.exchange.windows import Windows, WindowsError
from elastic_ep.first_host import control_wire, open_hosts
from elastic_ep.gateway import text_process
from elastic_ep.gateway.app import READING, create_app
from elastic_ep.gateway.app import Server as HttpServer
from elastic_ep.gateway.app import serve as serve_http
from elastic_ep.gateway.backend import GroupBackend
from elastic_ep.gateway.cors import Cors
from elastic_ep.gateway.guided import vocabulary
from elastic_ep.gateway.page.films import Films
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.router import Router
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text_worker import Begun
from elastic_ep.gateway.traces import Traces, TracesUnavailable, to_endpoint
from elastic_ep.group.clock import Clock
from elastic_ep.group.controller import Controller
from elastic_ep.group.display import LaunchDisplay
from elastic_ep.group.hosts import Hosts
from elastic_ep.group.hub import Hub
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.processes import RankProcesses
from elastic_ep.group.rebalance import Rebalancer
from elastic_ep.group.repairs import Repairs
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.host.device_guard import DeviceGuard
from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles
from elastic_ep.host.keeper import ForkServerFailed, Keeper
from elastic_ep.host.mps import mps_daemon
from elastic_ep.host.scheduling import make_prompt
from elastic_ep.host.server_process import ServerProcess
from elastic_ep.kv.shelf_file import ShelfError
from elastic_ep.loop_watch import HeldReport, make_loop
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import ProgressMachine
from elastic_ep.machines.registry import arguments
from elastic_ep.machines.requests import events as routing
from elastic_ep.machines.requests.events import RoutingConfig
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.plan import ServePlan, make_plan
from elastic_ep.wire.sockets import ControllerWire

SWITCH_INTERVAL_S = 0.0005
"""A death notice waits at most so long for the interpreter lock."""
GC_THRESHOLD = 20_000
"""Objects made before the collector looks for cycles; every step of the ranks makes some hundreds here."""
EXAMPLE_QUESTION = (
    "Tom has 12 apples. Tom buys 30 more apples. Then 7 of the apples break. "
    "How many apples does Tom have now?"
)
RANK_ENTRY = "elastic_ep.rank.process:main"
_OF_GPUS = ("elastic_ep.engine.ops_cuda.build", "elastic_ep.engine.ops_cuda.preload")
_PRELOAD = {"cpu": PRELOAD, "cuda": PRELOAD + _OF_GPUS}
"""What the fork server imports for the ranks, as `config.PRELOAD`."""
_RANKS_PART = 8
"""Of what the event log may take on the disk all ranks' machines together get one in so many."""
NOTHING_SERVES, START_FAILED = 1, 2
"""Exit statuses; a graceful stop is 0. A run process that is killed ends by that signal."""
FAREWELL_S = 5.0
"""How long the process says that nothing will serve, to clients and to whoever asks `/health`, before it ends."""
log = structlog.get_logger()


def serve(config: ServeConfig, rank_entry: str = RANK_ENTRY, server: ServerProcess | None = None) -> int:
    """Serve until told to stop; the exit status. Raises `ConfigError` before anything is started.

    `rank_entry` is what each rank runs, "module:function"; `server` a fork server's process that was begun already.
    """
    logs.configure(config.log)
    plan = make_plan(config)
    for notice in plan.notices:
        log.warning(notice)
    event_log = open_log(config)
    process = RunProcess(plan, event_log, rank_entry, server)
    titles.show("run", "eep-run")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    make_prompt()
    gc.freeze()  # what is there by now stays: the collector need not look through it again and again
    gc.set_threshold(GC_THRESHOLD)
    process.begin_text()
    loop_factory = partial(make_loop, HeldReport(event_log.note))
    try:
        return anyio.run(process.run, backend_options={"loop_factory": loop_factory})
    finally:
        event_log.close()


def open_log(config: ServeConfig) -> EventLog:
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    mode, limit = config.event_log_mode, config.event_log_max_mb << 20
    limit -= limit // _RANKS_PART
    for again in ("", *(f"-{number}" for number in range(2, 100))):
        folder = Path(config.log_dir) / f"{run_id}{again}" if mode is not EventLogMode.OFF else None
        try:
            return EventLog(folder, mode, max_bytes=limit)
        except FileExistsError:
            continue  # in a container every run has the same pid
        except OSError as error:
            raise ConfigError(f"--log-dir {config.log_dir}: {error.strerror}") from error
    raise ConfigError(f"--log-dir {config.log_dir}: {run_id} and all that follow exist")


class Parts(NamedTuple):
    """What serves, all on one hub. `machines`: those whose events are logged, by name."""

    controller: Controller
    router: Router
    rebalancer: Rebalancer
    machines: Mapping[str, Any]


class RunProcess:
    """Owns all parts."""

    def __init__(
        self,
        plan: ServePlan,
        event_log: EventLog,
        rank_entry: str = RANK_ENTRY,
        server: ServerProcess | None = None,
    ) -> None:
        self._plan = plan
        self._log = event_log
        self._rank_entry = rank_entry
        self._server = server
        self._config = plan.config
        self._metrics = Metrics()
        self._api_settings = self._make_api_settings()
        self._traces = _traces(self._config, self._plan.name)
        prepare(self._api_settings)
        self._stop_signals = 0
        self._fork_error: str | None = None
        self._text: Begun | None = None

    def begin_text(self) -> None:
        """Fork the process that reads large bodies: before there is a thread, and an event loop."""
        keyless = replace(self._api_settings, api_keys=(), admin_key=None)
        self._text = text_process.fork(keyless, self._plan.text)

    async def run(self) -> int:
        self._stop = anyio.Event()
        self._force = anyio.Event()
        self._text_ready = anyio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        with self._directory() as directory, self._windows() as windows_fd, self._shelf() as shelf_fd:
            return await self._run_group(directory, SharedFiles(windows_fd, shelf_fd))

    async def _run_group(self, directory: Path, files: SharedFiles) -> int:
        async with AsyncExitStack() as stack:
            self._write_vocabulary(directory)
            wire = control_wire(self._config, directory)
            stack.callback(wire.close)
            # Before the keeper, so that it ends after all ranks.
            environment = self._daemon(stack) if self._config.mps else {}
            options = LaunchOptions(
                entry=self._rank_entry,
                preload=_PRELOAD[self._plan.device],
                directory=str(directory),
                timing=self._config.timing,
                log=self._config.log,
            )
            guard = None
            if self._config.mps:
                guard = stack.enter_context(DeviceGuard(self._config.timing.drain_ms / 1000, self._log.note))
            host = await stack.enter_async_context(Keeper(options, files, environment, self._server))
            told = replace(self._plan.rank_config(directory), event_log=self._rank_log())
            hosts = None
            if self._config.capacity_hosts > 1:
                run = "" if self._log.path is None else self._log.path.parent.name
                hosts = open_hosts(stack, self._config, self._plan, host, wire, told, options, run)
            processes = RankProcesses(
                told,
                hosts or host,
                guard,
                watched=self._config.fault_tolerance,
                is_here=hosts.is_here if hosts else None,
            )
            parts = self._parts(wire, processes)
            controller = parts.controller
            stack.callback(controller.ledger.close)
            wire.receive(controller.on_message, controller.on_protocol_error, controller.on_connection_ended)
            later = asyncio.get_running_loop().call_later
            self._log.begin(self._first_line(parts.machines), parts.machines, later)
            if told.event_log is not None:
                make_private(Path(told.event_log.folder))
            app = self._app(parts)
            http = await self._listen(app)
            titles.show(f"run {self._plan.name} at {http.url}", "eep-run")
            stack.push_async_callback(http.close)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(controller.beat)
            if self._config.fault_tolerance:
                tasks.start_soon(controller.watch.run)
            tasks.start_soon(parts.rebalancer.run)
            tasks.start_soon(self._start_ranks, host, hosts, controller)
            tasks.start_soon(self._warm, app[READING])
            status = await self._serve_until_stopped(parts, http.url)
            if hosts is not None:
                hosts.leave()
            tasks.cancel_scope.cancel()
            return status
        raise AssertionError("unreachable")

    def _daemon(self, stack: AsyncExitStack) -> Mapping[str, str]:
        """The daemon takes half a second to end: that is waited for in a thread."""
        daemon = mps_daemon()
        environment = daemon.__enter__()

        async def leave(*error: Any) -> bool | None:
            return await asyncio.to_thread(daemon.__exit__, *error)

        stack.push_async_exit(leave)
        return environment

    async def _serve_until_stopped(self, parts: Parts, url: str) -> int:
        controller = parts.controller
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(LaunchDisplay(controller.machine).show)
            await _first_of(controller.serving, self._stop, controller.over)
            tasks.cancel_scope.cancel()
        if self._fork_error:
            log.error(self._fork_error)
            return START_FAILED
        if controller.serving.is_set():  # said when any request is answered as fast as a later one
            await _first_of(self._text_ready, self._stop, controller.over)
        if self._text_ready.is_set() and controller.serving.is_set() and not self._stop.is_set():
            self._announce(url, controller)
        await _first_of(self._stop, controller.over)
        status = await self._farewell(controller)
        await self._stop_gracefully(parts)
        return status

    async def _farewell(self, controller: Controller) -> int:
        """Say why this run is over; the exit status."""
        match controller.machine.verdict:
            case None:  # it was told to stop
                return 0
            case ev.StartFailed(reason):
                hint = "--log-level debug shows where"
                log.error("every rank failed to start, for the same reason", why=reason, hint=hint)
                return START_FAILED
            case ev.NothingWillServe(reason):
                log.error("nothing can serve any more: this process ends", why=reason)
                with anyio.move_on_after(FAREWELL_S):
                    await self._stop.wait()
                return NOTHING_SERVES if controller.serving.is_set() else START_FAILED

    def _announce(self, url: str, controller: Controller) -> None:
        question = {"role": "user", "content": EXAMPLE_QUESTION}
        body = json.dumps({"model": self._plan.name, "messages": [question]})
        key = "-H 'Authorization: Bearer YOUR_KEY' " if self._config.api_key else ""
        curl = f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d '{body}'"
        where = f" of {self._config.hosts} hosts" if self._config.hosts > 1 else ""
        print(f"serving {self._plan.name} on {self._config.ranks} ranks{where} at {url}   try: {curl}")
        print(f"events: {self._log.path or 'off'}", flush=True)
        members = sorted(controller.machine.view.members)
        pages = [facts.pages.total for member in members if (facts := controller.facts.get(member))]
        size = self._plan.limits.page_size
        tokens = min(pages, default=0) * size
        log.info(
            "KV cache",
            tokens_a_rank=tokens,
            tokens=sum(pages) * size,
            pages=pages,
            flag=self._plan.cache_flag,
        )
        if (shelf := self._plan.shelf) is not None:
            slots = shelf.regions * shelf.slots
            gib = round(slots * shelf.page_bytes / 2**30, 2)
            log.info("shelf of KV cache", tokens=slots * size, gib=gib, flag="--kv-shelf-gib")
        else:
            log.info("no shelf of KV cache: what a lost rank had is computed again", flag="--kv-shelf-gib")

    async def _stop_gracefully(self, parts: Parts) -> None:
        """Drain, then ask, then force; every phase has a deadline."""
        controller, timing = parts.controller, self._config.timing
        log.info("stopping: running requests finish first", deadline_s=timing.stop_deadline_ms / 1000)
        with anyio.move_on_after(timing.stop_deadline_ms / 1000):
            controller.feed(ev.StopRequested())
            parts.router.handle(routing.StopRequested())
            await _first_of(controller.drained, self._force, controller.stopped)
        if not controller.drained.is_set():
            parts.router.handle(routing.DeadlinePassed())
        controller.feed(ev.StopRanks())
        with anyio.move_on_after(timing.leave_ms / 1000):
            await _first_of(controller.stopped, self._force)
        if not controller.stopped.is_set():
            controller.feed(ev.StopForced())
            with anyio.move_on_after(timing.leave_ms / 1000):
                await controller.stopped.wait()
        log.info("stopped", forced=self._force.is_set() or not controller.drained.is_set())

    def _on_signal(self) -> None:
        self._stop_signals += 1
        (self._stop if self._stop_signals == 1 else self._force).set()

    # Parts

    @contextmanager
    def _directory(self) -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(prefix="elastic_ep-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _write_vocabulary(self, directory: Path) -> None:
        """For the ranks, if texts can be guided."""
        found = vocabulary(self._api_settings, self._plan.text)
        if isinstance(found, Vocabulary):
            found.write(directory)
        else:
            log.info("no text can be guided by a grammar", why=found)

    @contextmanager
    def _windows(self) -> Iterator[int]:
        """On a GPU ranks have none; what they inherit is a descriptor all the same."""
        try:
            needed = self._plan.device == "cpu"
            fd = self._create_windows() if needed else os.open(os.devnull, os.O_RDONLY)
        except WindowsError as error:
            raise ConfigError(
                f"{error.strerror}: fewer --ranks or a smaller --max-num-batched-tokens need less"
            ) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _create_windows(self) -> int:
        if self._config.capacity_hosts == 1:
            return Windows.create(self._plan.shape)
        return Windows.create(self._plan.shape, carried=True)

    @contextmanager
    def _shelf(self) -> Iterator[int]:
        """This process owns it, so it outlives all ranks. It is sparse: memory is taken as pages come."""
        layout = self._plan.shelf
        try:
            fd = layout.create() if layout is not None else os.open(os.devnull, os.O_RDONLY)
        except ShelfError as error:
            raise ConfigError(f"the shelf: {error.strerror}: lower --kv-shelf-gib") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _rank_log(self) -> RankLog | None:
        """Two incarnations of each rank have a log at a time."""
        if self._log.path is None:
            return None
        each = (self._config.event_log_max_mb << 20) // _RANKS_PART // (2 * self._config.capacity)
        return RankLog(str(self._log.path.parent.resolve() / RANKS), self._config.event_log_mode, each)

    def _parts(self, wire: ControllerWire, processes: RankProcesses) -> Parts:
        config, plan, metrics, timing = self._config, self._plan, self._metrics, self._config.timing
        clock = Clock()
        hub = Hub(self._log.record, clock.now_ms)
        membership = MembershipMachine(config.ranks, plan.placement, timing.membership)
        progress = ProgressMachine(timing.progress)
        repair = RepairMachine(plan.placement)
        requests = RoutingMachine(
            RoutingConfig(
                max_num_seqs=plan.limits.max_num_seqs,
                max_queued=config.max_queued,
                request_timeout_ms=round(config.request_timeout_s * 1000),
                num_pages=plan.limits.num_pages,
                page_size=plan.limits.page_size,
                max_model_len=plan.limits.max_model_len,
            )
        )
        repairs = Repairs(hub, repair, wire, self._log, metrics)
        rebalancer = Rebalancer(
            repairs,
            members=lambda: membership.view.members,
            every=config.eplb_rebalance_num_iterations if config.enable_eplb else 0,
            spare=int(config.enable_eplb),
            report=metrics.rebalanced,
            timing=timing,
        )
        controller = Controller(
            hub,
            clock,
            membership,
            progress,
            requests,
            repairs,
            processes,
            wire,
            self._log,
            metrics,
            on_step=rebalancer.step_seen,
            timing=timing,
            paced=config.fault_tolerance,
        )
        router = Router(
            hub,
            requests,
            send=wire.send,
            notify=controller.on_notice,
            taken_over=controller.ledger.taken_over,
        )
        machines = {"membership": membership, "progress": progress, "routing": requests, "repair": repair}
        return Parts(controller, router, rebalancer, machines)

    def _first_line(self, machines: Mapping[str, Any]) -> dict[str, object]:
        shown = {
            **asdict(self._config),
            "api_key": len(self._config.api_key),
            "admin_key": None,
            "device": self._plan.device,
        }
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return {"version": version(), "started": started, "config": shown, "machines": arguments(machines)}

    def _make_api_settings(self) -> ApiSettings:
        return ApiSettings(
            model_name=self._plan.name,
            other_names=self._plan.names[1:],
            max_model_len=self._plan.limits.max_model_len,
            vocab_size=self._plan.model.vocab_size,
            version=version(),
            defaults=self._plan.defaults,
            api_keys=self._config.api_key,
            admin_key=_admin_key(self._config),
            cors=Cors(
                self._config.allowed_origins,
                self._config.allowed_methods,
                self._config.allowed_headers,
                self._config.allow_credentials,
            ),
            root_path=(self._config.root_path or "").removesuffix("/"),
            eos_token_ids=self._plan.text_fit.eos_token_ids,
            model_eos_token_ids=self._plan.model.eos_token_ids,
            shared_page_size=self._plan.limits.page_size if self._config.enable_prefix_caching else 0,
            trust_request_chat_template=self._config.trust_request_chat_template,
            tool_call_parser=self._config.tool_call_parser,
            reasoning_parser=self._config.reasoning_parser,
            responses_store_bytes=self._config.responses_store_mib << 20,
        )

    def _app(self, parts: Parts) -> web.Application:
        backend = GroupBackend(parts.controller, parts.router, parts.rebalancer, self._metrics)
        films = None if self._log.path is None else partial(Films, self._log.path.parent.resolve())
        plan = self._plan
        begun, self._text = self._text, None
        return create_app(
            backend, self._api_settings, plan.text, self._metrics, plan.load_text, films, self._traces, begun
        )

    async def _listen(self, app: web.Application) -> HttpServer:
        try:
            return await serve_http(app, self._config.host, self._config.port, tls=self._plan.tls)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self._config.host}:{self._config.port} ({error.strerror}): "
                "choose another with --port, or --port 0 for any free one"
            ) from error

    async def _warm(self, reading: Reading) -> None:
        await reading.worker.warm()
        self._text_ready.set()

    async def _start_ranks(self, host: Keeper, hosts: Hosts | None, controller: Controller) -> None:
        try:
            if hosts is not None:
                hosts.start(controller.on_process)
            await host.start(controller.on_process)
        except ForkServerFailed as error:
            self._fork_error = str(error)
            self._stop.set()
        else:
            controller.feed(ev.Start())


def _admin_key(config: ServeConfig) -> str | None:
    """Raises `ConfigError`."""
    if config.admin_key_file is None:
        return config.admin_key
    try:
        key = Path(config.admin_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--admin-key-file {config.admin_key_file}: {why(error)}") from error
    if not key or not key.isprintable():
        raise ConfigError(f"--admin-key-file {config.admin_key_file} has no key: a line of text is one")
    return key


def _traces(config: ServeConfig, model_name: str) -> Traces | None:
    """Raises `ConfigError`."""
    endpoint = config.otlp_traces_endpoint
    try:
        return None if endpoint is None else to_endpoint(endpoint, model_name, version())
    except TracesUnavailable as error:
        raise ConfigError(f"--otlp-traces-endpoint {endpoint}: {error}") from error


def version() -> str:
    return importlib.metadata.version("elastic-ep")


async def _first_of(*events: anyio.Event) -> None:
    async with anyio.create_task_group() as tasks:

        async def wait(event: anyio.Event) -> None:
            await event.wait()
            tasks.cancel_scope.cancel()

        for event in events:
            tasks.start_soon(wait, event)
