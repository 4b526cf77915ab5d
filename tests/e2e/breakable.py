"""`python -m tests.e2e.breakable`: the real thing, in which SIGUSR1 and SIGUSR2 break the rank that gets them."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.rank import process as rank
from elastic_ep.rank.forward import ForwardThread
from elastic_ep.run import parse
from elastic_ep.serve import serve

LEAVES = 7


def main(config_json: str, files: SharedFiles, life_fd: int) -> int:
    """SIGUSR1: the forward thread's next step raises. SIGUSR2: the process leaves with a status."""
    signal.signal(signal.SIGUSR1, _break_the_next_step)
    signal.signal(signal.SIGUSR2, lambda *_: os._exit(LEAVES))
    return rank.main(config_json, files, life_fd)


def _break_the_next_step(*_: Any) -> None:
    def broken(self: ForwardThread) -> None:
        raise RuntimeError("broken on purpose")

    ForwardThread._one_step = broken  # type: ignore[method-assign]  # to break it


if __name__ == "__main__":
    sys.exit(serve(parse(), "tests.e2e.breakable:main"))
