"""What a terminal shows while ranks come up: one line a rank, its state live. Log lines scroll by above it."""

from __future__ import annotations

import sys
import time

import anyio
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.wire.messages import RankState

_COLOURS = {
    RankState.LAUNCHING: "dim",
    RankState.INIT_CUDA: "yellow",
    RankState.INIT_DIST: "yellow",
    RankState.JOINING: "cyan",
    RankState.SERVING: "green",
    RankState.DRAINING: "magenta",
    RankState.STOPPED: "dim",
    RankState.FAILED: "red",
}


REFRESH_S = 0.1


class LaunchDisplay:
    """A live table on a terminal; elsewhere nothing: the log says who serves."""

    def __init__(self, machine: MembershipMachine) -> None:
        self._machine = machine
        self._console = Console(file=sys.stderr)
        self._started = time.monotonic()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    async def show(self) -> None:
        """Until cancelled."""
        if not self._console.is_terminal:
            return
        with self._live:
            while True:
                self._live.update(self._table(), refresh=True)
                await anyio.sleep(REFRESH_S)

    def _table(self) -> Table:
        table = Table(title=f"group: {self._machine.public_state}   {time.monotonic() - self._started:.1f} s")
        for heading in ("rank", "incarnation", "state", "reason"):
            table.add_column(heading)
        for rank, record in self._machine.records.items():
            colour = _COLOURS[record.state]
            table.add_row(
                str(rank),
                str(record.member.incarnation),
                f"[{colour}]{record.state}[/]",
                escape(record.reason),
            )
        return table
