"""The group as the HTTP API sees it: requests in, status out."""

from __future__ import annotations

import asyncio

from elastic_ep.gateway.router import RoutedStream, Router
from elastic_ep.group.controller import Controller
from elastic_ep.group.expert_status import experts_status, layer_status, verify
from elastic_ep.group.history import History
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import (
    Conflict,
    Draining,
    EngineStatus,
    ExpertsStatus,
    FaultToleranceStatus,
    Health,
    Killing,
    KVPages,
    Layer,
    Load,
    OutOfRange,
    Rebalancing,
    Relaunch,
    Scaled,
    Stopping,
    UnknownRank,
    Verification,
)
from elastic_ep.group.rebalance import Rebalancer
from elastic_ep.machines.membership.records import RankRecord
from elastic_ep.machines.rank.lifecycle import SEATED
from elastic_ep.wire.messages import NO_PAGES, Member, PageCounts, RankState, SamplingParams


class GroupBackend:
    """`group.port.Backend`."""

    def __init__(
        self,
        controller: Controller,
        router: Router,
        rebalancer: Rebalancer,
        metrics: Metrics,
    ) -> None:
        self._controller = controller
        self._router = router
        self._rebalancer = rebalancer
        self._metrics = metrics
        for rank, record in controller.machine.records.items():
            metrics.rank_state(rank, record.state)

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        choice: int,
        beginnings: tuple[bytes, ...] = (),
    ) -> RoutedStream:
        return self._router.submit(prompt, params, seed, choice, beginnings)

    def health(self) -> Health:
        outlook = self._controller.outlook()
        state = self._controller.machine.group_state
        return Health(outlook.well, state, self._router.serving_ranks(), outlook.reason)

    def relaunch(self, rank: int | None) -> Relaunch:
        machine = self._controller.machine
        if rank is not None:
            self._record(rank)
        if machine.stopping or machine.verdict:
            raise Stopping
        if rank in machine.retired and rank not in machine.leaving:
            self._controller.take_back([rank])
            return Relaunch((rank,), ())
        asked = sorted(machine.records.keys() - machine.retired) if rank is None else [rank]
        relaunched = self._controller.relaunch(asked)
        return Relaunch(relaunched, tuple(other for other in asked if other not in relaunched))

    def kill(self, rank: int, incarnation: int) -> Killing:
        machine = self._controller.machine
        present = self._record(rank).member.incarnation
        if incarnation > present:
            raise UnknownRank(
                f"There is no incarnation {incarnation} of rank {rank} yet: its present one is {present}."
            )
        if machine.stopping or machine.verdict:
            raise Stopping
        return Killing(self._controller.kill(Member(rank, incarnation)), present)

    def drain(self, rank: int, patience_s: float) -> Draining:
        machine = self._controller.machine
        record = self._record(rank)
        self._can_scale()
        if rank not in machine.retired and machine.wanted <= machine.least:
            raise Conflict(
                f"{machine.wanted} ranks are to take part, and every expert has a slot only with {machine.least} of them."
            )
        self._controller.retire([rank], patience_s)
        return Draining(rank, record.member.incarnation, record.state, machine.wanted)

    async def scale(self, size: int, patience_s: float) -> Scaled:
        machine, timing = self._controller.machine, self._controller.timing
        self._can_scale()
        if not machine.least <= size <= len(machine.records):
            raise OutOfRange(
                "new_data_parallel_size",
                f"'new_data_parallel_size' must be from {machine.least}, so that every expert has a slot, to "
                f"{len(machine.records)}, the ranks that there are places for on the hosts that have joined.",
            )
        self._aim(size, patience_s)
        membership = timing.membership
        deadline_s = patience_s + (membership.spare_copies_ms + membership.init_deadline_ms) / 1000
        try:
            async with asyncio.timeout(deadline_s):
                await self._controller.settled()
        except TimeoutError:
            raise TimeoutError(
                f"{deadline_s:g} s have passed, and the group is still scaling to {size} ranks."
            ) from None
        if machine.wanted != size:
            raise Conflict(
                f"The group has {machine.wanted} ranks instead of {size}: it was asked for another size meanwhile, "
                "or could not do without a rank (see the log)."
            )
        ranks = tuple(seat.rank for seat in machine.view.seats)
        return Scaled(f"Scaled to {size} data parallel engines", size, ranks)

    def _aim(self, size: int, patience_s: float) -> None:
        """Away go first those that do not serve, then those of the highest number; the lowest come back first."""
        machine = self._controller.machine
        there = sorted(
            machine.records.keys() - machine.retired,
            key=lambda rank: (machine.records[rank].state is RankState.SERVING, -rank),
        )
        back = sorted(machine.retired, key=lambda rank: (rank not in machine.leaving, rank))
        self._controller.retire(
            {*there[: max(0, len(there) - size)], *back[max(0, size - len(there)) :]}, patience_s
        )
        self._controller.take_back(back[: max(0, size - len(there))])

    @property
    def scaling(self) -> bool:
        return self._controller.machine.scaling

    def _can_scale(self) -> None:
        machine, timing = self._controller.machine, self._controller.timing
        if machine.stopping or machine.verdict:
            raise Stopping
        if not timing.fault_tolerance:
            raise Conflict("With --disable-fault-tolerance no rank can leave or come back.")
        if not machine.view.epoch:
            raise Conflict("The ranks are starting: ask again when GET /health says that they serve.")

    def _record(self, rank: int) -> RankRecord:
        machine = self._controller.machine
        if rank not in machine.records:
            raise UnknownRank(f"There is no rank {rank}: they are 0 to {max(machine.records)}.")
        return machine.records[rank]

    async def experts(self) -> ExpertsStatus:
        controller = self._controller
        ranks = [seat.rank for seat in controller.machine.view.seats]
        return await experts_status(controller.repairs.placement, ranks, controller.repairs.audit)

    async def verify(self) -> Verification:
        controller = self._controller
        members, deadline_s = controller.machine.view.members, controller.timing.audit_ms / 1000
        return await verify(controller.repairs.placement, members, controller.repairs.audit, deadline_s)

    async def rebalance(self) -> Rebalancing:
        return await self._rebalancer.rebalance()

    @property
    def history(self) -> History:
        return self._controller.history

    def load(self) -> Load:
        return Load(self._router.running, self._router.waiting)

    def placement_version(self) -> int:
        return self._controller.repairs.placement.version

    async def layer(self, layer: int) -> Layer | None:
        ranks = [seat.rank for seat in self._controller.machine.view.seats]
        return await layer_status(self._controller.repairs.placement, layer, ranks)

    def status(self) -> FaultToleranceStatus:
        machine = self._controller.machine
        return FaultToleranceStatus(
            state=machine.public_state,
            epoch=machine.view.epoch,
            step=self._controller.step,
            tolerates=machine.tolerates,
            engines=tuple(self._engine_status(rank) for rank in sorted(machine.records)),
            idle=machine.idle,
            tolerates_hosts=machine.tolerates_hosts,
            data_parallel_size=machine.wanted,
            scaling=machine.scaling,
        )

    def _engine_status(self, rank: int) -> EngineStatus:
        record = self._controller.machine.records[rank]
        facts = self._controller.facts.get(record.member)
        pages = self._pages(record.member)
        dead = record.state in (RankState.FAILED, RankState.STOPPED)
        healthy = record.state in SEATED and not record.fenced
        return EngineStatus(
            id=rank,
            status="dead" if dead else "healthy" if healthy else "unhealthy",
            state=record.state,
            incarnation=record.member.incarnation,
            pid=facts.pid if facts else None,
            running=facts.running if facts else 0,
            waiting=facts.waiting if facts else 0,
            reason="" if healthy else self._controller.reason(rank),
            last_loss=self._controller.ledger.last(rank),
            kv_cache_usage=_usage(pages),
            kv_pages=KVPages(pages.total, pages.held, pages.named, pages.shelf_pages, pages.shelf_bytes),
        )

    def _pages(self, member: Member) -> PageCounts:
        facts = self._controller.facts.get(member)
        return facts.pages if facts else NO_PAGES

    def refresh_metrics(self) -> None:
        controller, metrics = self._controller, self._metrics
        machine = controller.machine
        metrics.requests(self._router.running, self._router.waiting)
        metrics.messages_dropped(controller.dropped)
        metrics.group(
            machine.public_state,
            idle=machine.idle,
            tolerates=machine.tolerates,
            tolerates_hosts=machine.tolerates_hosts,
        )
        pages = {rank: self._pages(record.member) for rank, record in machine.records.items()}
        for rank, record in machine.records.items():
            metrics.pages(record.member, pages[rank])
        usage = {rank: _usage(counts) for rank, counts in pages.items()}
        metrics.kv_cache(usage, members=[seat.rank for seat in machine.view.seats])


def _usage(pages: PageCounts) -> float:
    return pages.held / pages.total if pages.total else 0.0
