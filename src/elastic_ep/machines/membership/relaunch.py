"""When a rank that died is launched again. Pure: what is known of a death goes in, a pause comes out.

The pause grows with the early deaths in a row and never becomes "never": whatever is wrong may be put right from outside,
and an operator who has done so can have the rank launched at once. Only `--relaunch-limit 0` keeps ranks away.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from elastic_ep.timing import MembershipConfig

RELAUNCH_PATH = "/v1/fault_tolerance/relaunch"

CRASH_SIGNALS = frozenset(
    {
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGSEGV,
        signal.SIGSYS,
    }
)
"""Signals that say that a process went wrong by itself."""


HOST_LOST = "its host is lost"
"""The status of whoever was on a host that was lost: what its process did nobody knows."""


@dataclass(frozen=True, slots=True)
class Death:
    """`status` as the launcher gives it; `served_ms` is how long the rank had its seat, None if it never had one.

    `blameless`: a request is suspected. `fenced`: we killed it.
    """

    status: str
    served_ms: int | None = None
    fenced: bool = False
    blameless: bool = False


def killed_from_outside(status: str) -> bool:
    """Whether a signal ended it that a process does not bring upon itself."""
    kind, _, number = status.partition(" ")
    return kind == "signal" and number.isdecimal() and int(number) not in CRASH_SIGNALS


def early_deaths(before: int, death: Death, config: MembershipConfig) -> int:
    """Early deaths in a row, this one included, when there were `before` ahead of it.

    Whoever has served and was killed from outside is no crash loop, however short it served. One that served long starts
    anew, and a loss that is laid at a request, or with the whole host, neither counts nor excuses those before it.
    """
    if death.blameless or death.status == HOST_LOST:
        return before
    if death.served_ms is None:
        return before + 1
    outside = not death.fenced and killed_from_outside(death.status)
    return 0 if outside or death.served_ms >= config.stable_after_ms else before + 1


def pause_ms(early: int, config: MembershipConfig) -> int | None:
    """How long to wait before the next launch after so many early deaths in a row; None: no launch by itself."""
    if config.relaunch_limit == 0:
        return None
    if early <= 1:
        return 0
    if not long_pauses(early, config):
        return min(config.relaunch_backoff_ms << min(early - 2, 30), config.relaunch_backoff_max_ms)
    beyond = early - config.relaunch_limit - 1
    return min(config.relaunch_long_backoff_ms << min(beyond, 30), config.relaunch_long_backoff_max_ms)


def long_pauses(early: int, config: MembershipConfig) -> bool:
    """Whether a rank with so many early deaths in a row is in a crash loop."""
    return early > max(1, config.relaunch_limit)


def explain(reason: str, early: int, wait_ms: int | None, config: MembershipConfig) -> str:
    """Why a dead rank is away and when it comes back: `wait_ms` from now, None if it does not come back by itself."""
    now = f"POST {RELAUNCH_PATH} to try now"
    if wait_ms is None:
        return f"{reason}; stays away (--relaunch-limit 0); {now}"
    row = f"{reason}; next launch in {-(-wait_ms // 1000)} s (early deaths in a row: {early})"
    return f"{row}; {now}" if long_pauses(early, config) else row
