"""What the controller needs of the ranks' processes, and what it hears of them: launcher and device guard joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from elastic_ep.config import RankConfig
from elastic_ep.event_log.log import Note
from elastic_ep.group.controller import Controller
from elastic_ep.host.device_guard import DeviceGuard
from elastic_ep.host.launcher import Launcher
from elastic_ep.host.launcher_events import (
    DeathNoticed,
    Launched,
    LauncherEvent,
    LaunchFailed,
    ProcessGone,
    ServerLost,
    ServerReady,
)
from elastic_ep.wire.messages import Member

log = structlog.get_logger()


class RankProcesses:
    """The controller's `Processes`; `on_event` is the launcher's.

    `config` is of some rank's first launch. `launcher` and `controller` are to be set before anything is started.
    `guard` is for ranks that share a GPU's faults.
    """

    launcher: Launcher
    controller: Controller

    def __init__(self, config: RankConfig, guard: DeviceGuard | None, note: Note) -> None:
        self._config = config
        self._guard = guard
        self._note = note

    def launch(self, member: Member) -> None:
        repairs = self.controller.repairs
        config = replace(
            self._config,
            rank=member.rank,
            incarnation=member.incarnation,
            placement=repairs.placement,
            peers=repairs.peer_weights(),
        )
        self.launcher.launch(member, config.to_json())

    def fence(self, member: Member) -> None:
        self.launcher.kill(member)

    def watch(self, member: Member) -> None:
        if self._config.timing.fault_tolerance:
            self.launcher.watch(member)

    def hold(self, member: Member) -> None:
        facts = self.controller.facts.get(member)
        if self._guard is not None and facts is not None and facts.pid is not None:
            self._guard.hold(member, facts.pid)

    def when_free(self, rank: int, then: Callable[[], None]) -> None:
        if self._guard is None:
            then()
        else:
            self._guard.when_free(rank, then)

    def on_event(self, event: LauncherEvent) -> None:
        match event:
            case Launched(member, pid):
                self.controller.on_launched(member, pid)
            case DeathNoticed(member, cause, at_ns):
                self.controller.on_death(member, cause, at_ns)
            case ProcessGone(member, status, _):
                if self._guard is not None:
                    self._guard.gone(member)
                self.controller.on_gone(member, status)
            case LaunchFailed(member, reason):
                self.controller.on_gone(member, f"launch failed: {reason}")
            case ServerReady(pid, threads):
                self._note("fork_server_ready", pid=pid, threads=threads)
            case ServerLost(pid, status):
                self._note("fork_server_lost", pid=pid, status=status)
                if not self.controller.machine.stopping:
                    log.warning(
                        "the fork server has died; ranks live on, another one is started", status=status
                    )
