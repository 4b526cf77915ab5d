"""An agent that hears of no death by a pidfd."""

from __future__ import annotations

import sys

from elastic_ep.host import agent
from elastic_ep.host.launcher import Launcher


def _deaf(self: Launcher, process: object) -> None:
    self._loop.remove_reader(process.pidfd)  # type: ignore[attr-defined]


Launcher._on_pidfd = _deaf  # type: ignore[method-assign]
sys.exit(agent.main(int(sys.argv[1]), int(sys.argv[2])))
