"""The shared memory of the exchange: one file without a name, all ranks' windows in it.

The run process makes it and every rank inherits its descriptor, so nothing is left behind when all of them are
killed. Standard library only: the run process never imports torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.machine_memory import available_memory

LINE = 64
"""Bytes of a cache line. Every rank's words have one to themselves."""

_PAGE = 4096
_FLOAT = 4
_EXPERT = 4
_MASK = 8


class WindowsError(OSError):
    """The shared memory cannot be made. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Byte offsets of the parts of the file, each a C array.

    =========  =======================================  =======  ===========================================
    part       shape                                    type     written by
    =========  =======================================  =======  ===========================================
    `words`    [num_ranks + 1, LINE / 8]                int64    its rank: [0] last operation, [1] tokens sent,
                                                                 [2] incarnation; [3] whether it is of this
                                                                 host, the carrier;
                                                                 the last line's [0] counts alarms, [1] knocks:
                                                                 anybody
    `experts`  [num_ranks, max_tokens, top_k]           int32    its rank; unused rows are -1
    `x`        [x_rows, hidden]                         float32  its rank: rows rank * max_tokens + token
    `boxes`    [x_rows, top_k, hidden]                  float32  the owner of the expert at [token, k]
    =========  =======================================  =======  ===========================================

    Beyond num_ranks * max_tokens rows, `x` has rows that stay zero, and `boxes`, seen as rows of `hidden`, one for
    each rank to throw things into: padding is gathered from the former and scattered to the latter.

    Each host has windows of its own. If there are several hosts, what ranks have masked lies behind them (`carried.py`),
    and the carrier writes what ranks of other hosts would.
    """

    words: int
    experts: int
    x: int
    boxes: int
    x_rows: int
    total: int
    carried_total: int
    """With what is there if there are several hosts."""

    @classmethod
    def layout(cls, shape: ExchangeShape) -> Windows:
        rows = shape.num_ranks * shape.max_tokens
        x_rows = rows + -(-shape.num_ranks // shape.top_k)
        experts = _aligned((shape.num_ranks + 1) * LINE)
        x = _aligned(experts + rows * shape.top_k * _EXPERT)
        boxes = _aligned(x + x_rows * shape.hidden * _FLOAT)
        total = _aligned(boxes + x_rows * shape.top_k * shape.hidden * _FLOAT)
        carried = _aligned(total + shape.num_ranks**2 * _MASK)
        return cls(0, experts=experts, x=x, boxes=boxes, x_rows=x_rows, total=total, carried_total=carried)

    @classmethod
    def create(cls, shape: ExchangeShape, *, available: int | None = None, carried: bool = False) -> int:
        """A file descriptor of new, zeroed windows (not inheritable until the caller says so).

        Pages cost memory only once they are used. `available` is how many bytes may be used at most; None asks
        the system. `carried`: some ranks are on other hosts. Raises `WindowsError`.
        """
        layout = cls.layout(shape)
        total = layout.carried_total if carried else layout.total
        limit = available_memory() if available is None else available
        if total > limit:
            raise _too_little(total, f"{_mib(limit)} are available")
        try:
            fd = os.memfd_create("elastic_ep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise WindowsError(error.errno, f"no shared memory: {error.strerror}") from error
        try:
            os.ftruncate(fd, total)
            # A file that shrinks under a mapping is a SIGBUS in every rank.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            os.close(fd)
            raise _too_little(total, error.strerror or "refused") from error
        return fd


def _too_little(total: int, why: str) -> WindowsError:
    return WindowsError(
        errno.ENOMEM,
        f"the exchange needs {_mib(total)} of shared memory, but {why}: use fewer ranks or a smaller batch",
    )


def _aligned(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
