"""What `ps` and `top` show of each process: what it is, and of a rank the state that it is in."""

from __future__ import annotations

from setproctitle import setproctitle, setthreadtitle

from elastic_ep.wire.messages import Member, RankState

_NAME_BYTES = 15
"""Linux keeps so much of a thread's name."""


def show(what: str, name: str) -> None:
    """`ps` shows "elastic_ep: `what`", `top` and debuggers show `name`. From the main thread only.

    HAZARD: the first call in a process moves the environment to make room, which no other thread may read meanwhile.
    """
    setproctitle(f"elastic_ep: {what}")
    setthreadtitle(name[:_NAME_BYTES])


def show_rank(member: Member, state: RankState) -> None:
    show(f"rank {member} {state}", f"eep-rank-{member}")
