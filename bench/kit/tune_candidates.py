"""What tune_kernels.py tries: the choices that fit a Hopper multiprocessor without spilling, most promising first.

Which those are was read off compiled kernels; the reasons to expect something of each stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from elastic_ep.engine.ops_cuda.kernels.decode_attention import DecodePlan
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, Tiles, plan_for
from elastic_ep.engine.ops_cuda.kernels.paged_attention import CUT, Cut

DECODE_WIDTH = 4096
"""Tokens that every block table has room for, whatever the context: one compilation then serves all cases."""


@dataclass(frozen=True, slots=True)
class Decode:
    cut: Cut
    plan: DecodePlan

    def __str__(self) -> str:
        p = self.plan
        return f"split={self.cut.split} block={self.cut.block} warps={p.warps} stages={p.stages}"


Config = Decode | Plan


def describe(config: Config) -> str:
    if isinstance(config, Decode):
        return str(config)
    return " | ".join(f"{name} {_short(getattr(config, name))}" for name in ("gate_up", "down"))


def _short(tiles: Tiles) -> str:
    t = tiles
    return f"{t.rows}/{t.few}x{t.columns}x{t.depth} w{t.warps} s{t.stages} p{t.per_processor}"


def decode() -> list[Decode]:
    """Small splits: more and shorter programs, whose last wave costs less. 64 keys of 128 are 32 KiB with their values,
    so three programs of two buffers or two of three fit. 128 keys: half the waits a key, but fewer programs.
    """
    found = [Decode(CUT[torch.bfloat16], DecodePlan())]
    for stages in (3, 2, 4):
        found += [Decode(Cut(split, 64), DecodePlan(stages=stages)) for split in (256, 512, 1024, 128)]
    for split in (256, 512):
        found += [Decode(Cut(split, 128), DecodePlan(warps, stages)) for warps in (4, 8) for stages in (2, 3)]
    return list(dict.fromkeys(found))


_FEW = [  # rows, few, columns (of gate_up; down has twice as many), depth, warps, stages, per_processor
    (64, 16, 64, 64, 4, 4, 2),
    (64, 16, 64, 64, 4, 4, 1),
    (32, 16, 64, 64, 4, 4, 2),
    (32, 16, 64, 64, 4, 4, 1),
    (32, 16, 64, 64, 4, 3, 3),
    (16, 16, 64, 64, 4, 4, 3),  # without room for 64 rows more of the weights are in flight
    (16, 16, 64, 64, 4, 6, 2),
    (64, 16, 64, 64, 4, 3, 3),
    (32, 16, 64, 64, 4, 5, 2),
    (64, 16, 64, 64, 4, 4, 8),  # more programs than fit
    (16, 16, 64, 128, 4, 3, 2),
    (16, 16, 32, 64, 4, 6, 3),  # down alone: gate_up's grain is 64
    (64, 16, 32, 64, 4, 5, 3),
    (64, 16, 64, 64, 4, 6, 1),
]
_MANY = [
    (128, 64, 64, 64, 4, 3, 2),
    (128, 64, 128, 64, 8, 4, 1),  # a third less traffic out of the L2 cache than 128 x 64
    (256, 64, 64, 64, 8, 4, 1),
    (128, 64, 64, 64, 8, 3, 2),
    (128, 64, 128, 64, 8, 3, 1),
    (256, 64, 64, 64, 8, 3, 1),
    (128, 64, 128, 64, 8, 4, 4),
    (256, 64, 64, 64, 8, 4, 4),
    (128, 32, 128, 64, 8, 4, 4),
    (256, 32, 64, 64, 8, 4, 4),
    (128, 64, 64, 64, 4, 3, 8),
    (128, 64, 64, 64, 8, 3, 8),
    (128, 32, 64, 64, 4, 3, 8),
]


def experts(expected_rows: int) -> list[Plan]:
    """Each product's tiles in turn, the other's as they are now."""
    base = plan_for(expected_rows, torch.bfloat16)
    found = [base]
    for rows, few, columns, depth, warps, stages, programs in _FEW if expected_rows <= 64 else _MANY:
        tiles = Tiles(rows, few, columns, depth, warps, stages, programs)
        if columns >= 64:
            found.append(replace(base, gate_up=tiles))
        found.append(replace(base, down=replace(tiles, columns=2 * columns)))
    return list(dict.fromkeys(found))


def combined(ranked: list[Plan], base: Plan) -> list[Plan]:
    """The two best of each product with each other."""
    gate_ups = list(dict.fromkeys(plan.gate_up for plan in ranked if plan.down == base.down))[:2]
    downs = list(dict.fromkeys(plan.down for plan in ranked if plan.gate_up == base.gate_up))[:2]
    return [Plan(gate_up, down) for gate_up in gate_ups for down in downs]
