"""Films of losses for the page: made of the event log, in a process of their own, one at a time."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path

from elastic_ep.group.port import Loss
from elastic_ep.host import life_line

MAKING_S = 60.0
_KEPT = 8
_AFTER_S = 3.0
"""What came so long after a return belongs to the film; until then it is made anew each time it is asked for."""


class FilmUnavailable(Exception):
    """It could not be made, or not now. The message says why."""


class Films:
    """Of the run whose event log is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._turn = asyncio.Lock()

    async def of(self, loss: Loss) -> bytes:
        """As JSON, see `film/data.py`. Raises `FilmUnavailable`."""
        member = (loss.rank, loss.incarnation)
        try:
            async with asyncio.timeout(MAKING_S):
                async with self._turn:
                    if member not in self._kept:
                        made = await self._make(loss)
                        if not _over(loss):
                            return made
                        self._kept[member] = made
                        while len(self._kept) > _KEPT:
                            self._kept.popitem(last=False)
                    return self._kept[member]
        except TimeoutError:
            raise FilmUnavailable(f"the film was not ready after {MAKING_S:g} s") from None

    async def close(self) -> None:
        """What is being made ends with the request that asked for it."""
        self._kept.clear()

    async def _make(self, loss: Loss) -> bytes:
        read_end, write_end = life_line.create()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "elastic_ep.film", str(self._folder), f"{loss.rank}.{loss.incarnation}",
                "--at-ns", str(loss.at_ns), "--life-line", str(read_end),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                pass_fds=(read_end,),
            )  # fmt: skip
        except OSError as error:
            os.close(write_end)
            raise FilmUnavailable(f"no process for the film: {error.strerror}") from error
        finally:
            os.close(read_end)
        try:
            out, err = await process.communicate()
        finally:
            os.close(write_end)  # who still runs ends by it
            await process.wait()
        if process.returncode:
            said = err.decode(errors="replace").strip().splitlines()
            raise FilmUnavailable(said[-1] if said else f"its process ended with status {process.returncode}")
        return out


def _over(loss: Loss) -> bool:
    back_s = loss.back_after_s
    return back_s is not None and time.monotonic() - loss.at_ns / 1e9 > back_s + _AFTER_S
