"""Whether the group can serve, and if not, whether it will by itself: what `/health` and queued requests go by.

An expert is never lost for good while there are slots: repair loads it from the checkpoint into those of the living.
So what decides is how many ranks are there or will be, and whether their slots have room for one copy of every expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic_ep.machines.membership.records import RankRecord

if TYPE_CHECKING:
    from elastic_ep.machines.membership.machine import MembershipMachine


@dataclass(frozen=True, slots=True)
class Outlook:
    """`well`: a request is served now, or within the pause that a loss normally makes.

    `hopeless`: and nothing but an operator will change that it is not. `reason` says why the group does not serve; empty
    if it does.
    """

    well: bool
    hopeless: bool
    reason: str


def outlook(machine: MembershipMachine, now_ms: int) -> Outlook:
    if machine.stopping:
        return Outlook(False, True, "the server is shutting down")
    if machine.verdict:
        return Outlook(False, True, machine.verdict.reason)
    if machine.can_serve:
        return Outlook(True, False, "")
    if not machine.view.epoch:
        return Outlook(False, False, "the ranks are starting")
    silent_ms = now_ms - (machine.unwell_since_ms or 0)
    what = "experts without a copy are being reloaded" if machine.view.seats else "no rank serves"
    reason = f"{what}; ranks on their way or to be launched: {_returning(machine)}"
    if silent_ms < machine.config.unwell_after_ms:
        return Outlook(True, False, reason)
    return Outlook(False, False, f"{reason}; for {silent_ms // 1000} s by now")


def enough_slots(machine: MembershipMachine) -> bool:
    """Whether the ranks that are there, or come by themselves, have slots for every expert."""
    ranks = sum(_counts(machine, record) for record in machine.records.values())
    return ranks * machine.placement.slots_per_rank >= machine.placement.num_experts


def why_never(machine: MembershipMachine) -> str:
    """In words for an operator, when `enough_slots` says no."""
    left = sum(_counts(machine, record) for record in machine.records.values())
    placement = machine.placement
    if left == 0:
        return "no rank is left, and none is launched again (--relaunch-limit 0)"
    return (
        f"{left} of {len(machine.records)} ranks are left, with slots for {left * placement.slots_per_rank} of "
        f"{placement.num_experts} experts, and none is launched again (--relaunch-limit 0); "
        "more --ep-num-redundant-experts let fewer ranks go on"
    )


def _counts(machine: MembershipMachine, record: RankRecord) -> bool:
    rank = record.member.rank
    if rank in machine.retired and rank not in machine.leaving:
        return False
    if record.relaunch_at_ms is not None or record.wanted_back:
        return True
    if record.fenced or record.gone or record.over:
        return machine.config.relaunch_limit > 0
    return True


def _returning(machine: MembershipMachine) -> int:
    seated = {seat.rank for seat in machine.view.seats}
    return sum(rank not in seated and _counts(machine, record) for rank, record in machine.records.items())
