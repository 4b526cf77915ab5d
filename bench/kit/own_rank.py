"""The real rank process with an engine, or a forward thread, of a bench's own."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from elastic_ep.rank.process import RankProcess, live


def no_plane() -> str:
    """For `open_plane`."""
    return "no state plane here"


def live_and_end(make: Callable[[], RankProcess]) -> None:
    """In a process of its own, which it ends."""
    status = 1
    try:
        status = live(make())
    except BaseException:
        traceback.print_exc()
    os._exit(status)
