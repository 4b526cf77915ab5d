"""The group as the HTTP API sees it: requests in, status out."""

from __future__ import annotations

from elastic_ep.api.backend import (
    EngineStatus,
    ExpertsStatus,
    FaultToleranceStatus,
    Rebalancing,
    Verification,
)
from elastic_ep.api.metrics import Metrics
from elastic_ep.control.controller import Controller
from elastic_ep.control.experts import experts_status, verify
from elastic_ep.control.rebalance import Rebalancer
from elastic_ep.control.router import RoutedStream, Router
from elastic_ep.messages import RankState, SamplingParams


class GroupBackend:
    """`api.backend.Backend`."""

    def __init__(
        self, controller: Controller, router: Router, rebalancer: Rebalancer, metrics: Metrics
    ) -> None:
        self._controller = controller
        self._router = router
        self._rebalancer = rebalancer
        self._metrics = metrics

    def submit(self, prompt: tuple[int, ...], params: SamplingParams, seed: int, choice: int) -> RoutedStream:
        return self._router.submit(prompt, params, seed, choice)

    def serving_ranks(self) -> int:
        return self._router.serving_ranks()

    def experts(self) -> ExpertsStatus:
        controller = self._controller
        ranks = [seat.rank for seat in controller.machine.view.seats]
        return experts_status(controller.repair.placement, ranks, controller.repairs.proofs)

    async def verify(self) -> Verification:
        controller = self._controller
        members = controller.machine.view.members
        return await verify(controller.repair.placement, members, controller.repairs.proofs)

    async def rebalance(self) -> Rebalancing:
        return await self._rebalancer.rebalance()

    def status(self) -> FaultToleranceStatus:
        self._metrics.requests(self._router.running, self._router.waiting)
        machine = self._controller.machine
        return FaultToleranceStatus(
            state=machine.state,
            epoch=machine.view.epoch,
            step=self._controller.step,
            tolerates=machine.tolerates,
            engines=tuple(self._engine_status(rank) for rank in sorted(machine.slots)),
        )

    def _engine_status(self, rank: int) -> EngineStatus:
        slot = self._controller.machine.slots[rank]
        facts = self._controller.facts.get(slot.member)
        dead = slot.state in (RankState.FAILED, RankState.STOPPED)
        healthy = slot.state in (RankState.SERVING, RankState.DRAINING) and not slot.fenced
        return EngineStatus(
            id=rank,
            status="dead" if dead else "healthy" if healthy else "unhealthy",
            state=slot.state,
            incarnation=slot.member.incarnation,
            pid=facts.pid if facts else None,
            running=facts.running if facts else 0,
            waiting=facts.waiting if facts else 0,
            reason="" if healthy else slot.reason,
        )
