"""A line in the log whenever the group begins or ceases to answer requests."""

from __future__ import annotations

import time

import structlog

from elastic_ep.machines.membership.events import GroupState
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.placement import Placement

_SHOWN_EXPERTS = 4
_ANSWERS = (GroupState.SERVING, GroupState.DEGRADED, GroupState.PAUSED)
log = structlog.get_logger()


class ServingLog:
    def __init__(self, machine: MembershipMachine) -> None:
        self._machine = machine
        self._answers = False
        self._since_s = time.monotonic()

    def moved(self, state: GroupState) -> None:
        """The group came into `state`. Admitting and Stopping say nothing of whether it answers."""
        answers = state in _ANSWERS
        ceased = self._answers and state in (GroupState.HOLDING, GroupState.FORMING)
        if not answers and not ceased:
            return
        view = self._machine.view
        requests = "fail" if self._machine.verdict else "wait"
        if answers and not self._answers:
            facts = {"ranks": len(view.seats), "of": len(self._machine.records)}
            facts["tolerates"] = self._machine.tolerates
            if self._machine.placement.hosts:
                facts["tolerates_hosts"] = self._machine.tolerates_hosts
            log.info("the group serves", **facts, after_s=self._elapsed())
        elif state is GroupState.HOLDING:
            lost = without_copy(self._machine.placement, [seat.rank for seat in view.seats])
            log.warning("the group holds: experts have no copy", experts=lost, requests=requests)
        elif ceased:
            log.warning("the group holds: no rank is left", requests=requests)
        if answers is not self._answers:
            self._answers = answers
            self._since_s = time.monotonic()

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._since_s, 3)


def without_copy(placement: Placement, ranks: list[int]) -> str:
    """Names the experts that none of `ranks` holds, the first few of them."""
    lost = [
        f"layer {layer} expert {expert}"
        for layer in range(len(placement.slots))
        for expert, copies in enumerate(placement.copies(layer, ranks))
        if not copies
    ]
    more = len(lost) - _SHOWN_EXPERTS
    return ", ".join(lost[:_SHOWN_EXPERTS]) + (f" and {more} more" if more > 0 else "")
