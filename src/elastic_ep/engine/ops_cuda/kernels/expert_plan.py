"""How the experts' two products are cut into tiles: a matter of speed alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one product is cut. Speed depends on it, results do not."""

    rows: int
    """Of a tile."""
    few: int
    """Of a slot's last tile if no more are left: the decoder's common case. At most `rows`."""
    columns: int
    """Of the output."""
    depth: int
    """Of one step of the sum."""
    warps: int
    stages: int
    per_processor: int
    """Programs launched for each multiprocessor. More than fit at a time: those that wait then even out the load."""


@dataclass(frozen=True, slots=True)
class Plan:
    gate_up: Tiles
    down: Tiles


_FEW = Plan(
    gate_up=Tiles(rows=64, few=16, columns=64, depth=64, warps=4, stages=4, per_processor=1),
    down=Tiles(rows=64, few=16, columns=128, depth=64, warps=4, stages=4, per_processor=1),
)
"""Where weights are what takes time, one program a multiprocessor is as fast as two, and on a shared GPU it leaves room
for the kernels that other ranks exchange with."""
_MANY = Plan(
    gate_up=Tiles(rows=128, few=64, columns=64, depth=64, warps=4, stages=3, per_processor=2),
    down=Tiles(rows=128, few=64, columns=128, depth=64, warps=8, stages=3, per_processor=2),
)
_FLOAT32 = Plan(
    gate_up=Tiles(rows=32, few=16, columns=32, depth=32, warps=4, stages=2, per_processor=2),
    down=Tiles(rows=32, few=16, columns=64, depth=32, warps=4, stages=2, per_processor=2),
)
_CODED_ROWS = Plan(
    gate_up=Tiles(rows=64, few=16, columns=128, depth=128, warps=8, stages=4, per_processor=1),
    down=Tiles(rows=64, few=16, columns=128, depth=128, warps=4, stages=4, per_processor=1),
)
"""For rows that are codes too."""
_HALF_BYTES_FEW = Plan(
    gate_up=Tiles(rows=16, few=16, columns=64, depth=128, warps=4, stages=4, per_processor=4),
    down=Tiles(rows=16, few=16, columns=64, depth=128, warps=4, stages=4, per_processor=4),
)
_HALF_BYTES_MANY = Plan(
    gate_up=Tiles(rows=64, few=16, columns=64, depth=128, warps=4, stages=4, per_processor=2),
    down=Tiles(rows=64, few=16, columns=64, depth=128, warps=4, stages=4, per_processor=2),
)
"""For codes of four bits."""


def plan_of_codes(expected_rows: int, rows_too: bool) -> Plan:
    if rows_too:
        return _CODED_ROWS
    return _HALF_BYTES_FEW if expected_rows <= 8 else _HALF_BYTES_MANY


def plan_for(expected_rows: int, dtype: torch.dtype) -> Plan:
    """For about `expected_rows` a slot."""
    if dtype == torch.float32:
        return _FLOAT32
    return _FEW if expected_rows <= 64 else _MANY
