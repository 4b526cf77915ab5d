"""What the controller needs of the ranks' processes: this host's agent and device guard joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from elastic_ep.config import RankConfig
from elastic_ep.host.device_guard import DeviceGuard
from elastic_ep.host.keeper import Keeper
from elastic_ep.placement import Placement
from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import PeerWeights


class RankProcesses:
    """The controller's `Processes`. `config` has what all ranks are told; `guard` is for ranks that share a GPU's faults.

    `watched`: deaths are noticed at once.
    """

    def __init__(
        self, config: RankConfig, host: Keeper, guard: DeviceGuard | None, watched: bool = True
    ) -> None:
        self._config = config
        self._host = host
        self._guard = guard
        self._watched = watched

    def launch(self, member: Member, placement: Placement, peers: PeerWeights | None) -> None:
        rank, incarnation = member
        config = replace(self._config, rank=rank, incarnation=incarnation, placement=placement, peers=peers)
        self._host.launch(member, config.to_json())

    def fence(self, member: Member) -> None:
        self._host.kill(member)

    def watch(self, member: Member) -> None:
        if self._watched:
            self._host.watch(member)

    def hear(self) -> None:
        self._host.hear()

    def keep_device(self, member: Member, pid: int) -> None:
        if self._guard is not None:
            self._guard.keep(member, pid)

    def gone(self, member: Member) -> None:
        if self._guard is not None:
            self._guard.gone(member)

    def when_free(self, rank: int, then: Callable[[], None]) -> None:
        if self._guard is None:
            then()
        else:
            self._guard.when_free(rank, then)
