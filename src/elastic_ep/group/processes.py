"""What the controller needs of the ranks' processes: this host's agent and device guard joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import anyio

from elastic_ep.config import RankConfig
from elastic_ep.group.hosts import Hosts
from elastic_ep.host.device_guard import DeviceGuard
from elastic_ep.host.keeper import Keeper
from elastic_ep.host.starvation import Starvation
from elastic_ep.machines.membership.progress import Starved
from elastic_ep.placement import Placement
from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import PeerWeights


class RankProcesses:
    """The controller's `Processes`. `config` has what all ranks are told; `guard` is for ranks that share a GPU's faults.

    `watched`: deaths are noticed at once. `is_here`: whether a rank is on this host; None: all are.
    """

    def __init__(
        self,
        config: RankConfig,
        host: Keeper | Hosts,
        guard: DeviceGuard | None,
        watched: bool = True,
        is_here: Callable[[Member], bool] | None = None,
    ) -> None:
        self._config = config
        self._host = host
        self._guard = guard
        self._watched = watched
        self._is_here = is_here or (lambda _member: True)
        self._starvation = Starvation()

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

    async def starved(self, pids: Mapping[Member, int]) -> tuple[Starved, ...]:
        """HAZARD: the kernel may keep who reads of a process that is just ending: a thread, then, not the loop."""
        pids = {member: pid for member, pid in pids.items() if self._is_here(member)}
        if not pids:
            return self._starvation.sample(pids)
        return await anyio.to_thread.run_sync(self._starvation.sample, pids, abandon_on_cancel=True)

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
