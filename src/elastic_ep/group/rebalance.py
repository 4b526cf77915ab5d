"""Load-aware rebalancing while serving: plans off the event loop, has the repair machine carry them out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anyio
import anyio.lowlevel
import anyio.to_process
import structlog

from elastic_ep.group.port import Rebalancing
from elastic_ep.group.repairs import Repairs
from elastic_ep.machines.experts.events import PlanEnded
from elastic_ep.machines.experts.planner import PlanInput, plan
from elastic_ep.timing import USUAL, Timing
from elastic_ep.wire.messages import Member

log = structlog.get_logger()


class Rebalancer:
    """`every` steps, or never for 0; `spare` slots of every rank and layer are left empty, for copies to pass through."""

    def __init__(
        self,
        repairs: Repairs,
        members: Callable[[], frozenset[Member]],
        every: int,
        spare: int,
        report: Callable[[Rebalancing], None],
        timing: Timing = USUAL,
    ) -> None:
        self._repairs = repairs
        self._members = members
        self._every = every
        self._spare = spare
        self._report = report
        self._carry_out_s = timing.carry_out_ms / 1000
        self._next_step = every
        self._due = anyio.Event()
        self._one_at_a_time = anyio.Lock()

    def step_seen(self, step: int) -> None:
        if self._every and step >= self._next_step:
            self._next_step = step + self._every
            self._due.set()

    async def run(self) -> None:
        while True:
            await self._due.wait()
            self._due = anyio.Event()
            try:
                await self.rebalance()
            # Killed, perhaps for want of memory: the next one is a new one.
            except anyio.BrokenWorkerProcess as error:
                log.warning("the experts stay where they are: no plan was made", why=str(error))

    async def rebalance(self) -> Rebalancing:
        """Plan for the load of late and carry it out, or as much of it as costs no tolerance."""
        async with self._one_at_a_time:
            members = tuple(sorted(self._members()))
            placement = self._repairs.placement
            if not members:
                return Rebalancing(0, 0, 1.0, 1.0, placement.version)
            loads = []
            for layer in range(len(placement.slots)):
                loads.append(self._repairs.loads.of_layer(layer, placement.num_experts))
                await anyio.lowlevel.checkpoint()
            given = PlanInput(
                placement=placement,
                ranks=tuple(member.rank for member in members),
                loads=tuple(loads),
                spare=self._affordable_spare(len(members)),
                max_moves=len(members) * len(placement.slots),
            )
            found = await anyio.to_process.run_sync(partial(plan, given), cancellable=True)
            outcome = PlanEnded(0, 0)
            if found.moves:
                outcome = await self._repairs.carry_out(members, found, self._carry_out_s)
            version = self._repairs.placement.version
            done = Rebalancing(found.moves, outcome.made, found.imbalance_before, found.imbalance, version)
            self._report(done)
            return done

    def _affordable_spare(self, living: int) -> int:
        """Tolerance comes first: without it no slot is left empty."""
        placement = self._repairs.placement
        room = living * (placement.slots_per_rank - self._spare)
        enough = all(
            room >= self._repairs.machine.floor(layer) * placement.num_experts
            for layer in range(len(placement.slots))
        )
        return self._spare if enough else 0
