"""The planner beside DeepSeek's EPLB: balance, experts moved, and copies of the expert with the fewest.

    python -m bench.eplb [--other CHECKOUT] [--out bench/results/eplb.json]

EPLB is written here anew from its published description: the expert with the most load a copy gets the next copy until
all slots are used, then the copies are packed, heaviest first, each onto the least loaded rank with room; it plans from
nothing each time, and does not mind two copies of an expert on a rank. `eplb_tolerant` is the same with as many copies
of every expert at least as our plan keeps: the like-for-like figure where slots allow tolerance. First a plan from the
placement of a launch, then the loads drift, and a second one from what the first left. A move is an expert that comes to
a rank that did not hold it; its bytes are those of an expert of Qwen3-30B-A3B in bf16.

`--other` is the checkout of another commit: its planner makes the same plans in the same run, and the two take turns
where time is measured.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.kit.bound import run
from tests.kit.plain_routing import rank_loads
from tests.kit.served import write_result

from bench.kit.command_line import command_line
from elastic_ep.machines.experts.planner import PlanInput, plan
from elastic_ep.placement import EMPTY, Placement, launch_placement

EXPERT_BYTES = 3 * 2048 * 768 * 2
README_EXAMPLE = (
    (90.0, 132.0, 40.0, 61.0, 104.0, 165.0, 39.0, 4.0, 73.0, 56.0, 183.0, 86.0),
    (20.0, 107.0, 104.0, 64.0, 19.0, 197.0, 187.0, 157.0, 172.0, 86.0, 16.0, 27.0),
)
SIZES = (
    (8, 16, 16), (8, 64, 8), (8, 64, 64), (8, 128, 32), (32, 256, 32), (64, 256, 64), (320, 256, 64), (320, 256, 384),
)  # fmt: skip
"""Ranks, experts, extra copies."""
SKEWS = (1.2, 1.5, 2.0)
DRIFT = 0.2
LAYERS, SEEDS = 4, 3
ROUNDS = 6
PLAN_S = 300.0
"""Of the measurement of time; the shortest counts, as other work on the machine only adds to it."""
Loads = Sequence[float]
Packs = list[list[int]]


def eplb(loads: Loads, slots: int, ranks: int, least: int = 1) -> tuple[Packs, float]:
    """What each rank holds, and max/mean load of a rank. `least` copies of each expert first; 1 is EPLB itself."""
    counts = [least] * len(loads)
    for _ in range(slots - sum(counts)):
        counts[max(range(len(loads)), key=lambda e: loads[e] / counts[e])] += 1
    copies = sorted(
        (expert for expert, count in enumerate(counts) for _ in range(count)),
        key=lambda e: -loads[e] / counts[e],
    )
    packs: Packs = [[] for _ in range(ranks)]
    busy = [0.0] * ranks
    for expert in copies:
        rank = min((r for r in range(ranks) if len(packs[r]) < slots // ranks), key=lambda r: busy[r])
        packs[rank].append(expert)
        busy[rank] += loads[expert] / counts[expert]
    return packs, max(busy) * ranks / sum(busy)


def eplb_hierarchical(loads: Loads, slots: int, groups: int, nodes: int, ranks: int) -> float:
    """Max/mean load of a rank. Whole groups of experts go to nodes first; then the above within each node."""
    size = len(loads) // groups
    by_group = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    homes: Packs = [[] for _ in range(nodes)]
    for group in sorted(range(groups), key=lambda g: -by_group[g]):
        room = [home for home in homes if len(home) < groups // nodes]
        min(room, key=lambda home: sum(by_group[g] for g in home)).append(group)
    peaks = []
    for home in homes:
        inside = [load for group in home for load in loads[group * size : (group + 1) * size]]
        _, imbalance = eplb(inside, slots // nodes, ranks // nodes)
        peaks.append(imbalance * sum(inside) / (ranks // nodes))
    return max(peaks) * ranks / sum(loads)


def moves(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def fewest_copies(packs: Packs, experts: int) -> int:
    held = [set(pack) for pack in packs]
    return min(sum(expert in pack for pack in held) for expert in range(experts))


def held(placement: Placement, layer: int) -> Packs:
    return [
        [expert for expert in placement.on_rank(layer, rank) if expert != EMPTY]
        for rank in range(placement.num_ranks)
    ]


def one_case(ranks: int, experts: int, redundant: int, skew: float, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{ranks} {experts} {redundant} {skew} {seed}")
    slots = experts + redundant
    launched = launch_placement(ranks, LAYERS, experts, redundant)
    first = [[rng.paretovariate(skew) for _ in range(experts)] for _ in range(LAYERS)]
    drifted = [[load * rng.lognormvariate(0, DRIFT) for load in row] for row in first]
    least = min(ranks, slots // experts)
    ours, theirs = launched, [held(launched, layer) for layer in range(LAYERS)]
    result: dict[str, Any] = {"ranks": ranks, "experts": experts, "slots": slots, "skew": skew, "seed": seed}
    for name, loads in (("first", first), ("drifted", drifted)):
        found = plan(PlanInput(ours, tuple(range(ranks)), loads))
        after = Placement(ours.version + 1, ranks, ours.slots_per_rank, experts, found.slots)
        packed = [eplb(row, slots, ranks) for row in loads]
        result[name] = {
            "ours": {
                "imbalance": statistics.mean(
                    max(busy) * ranks / sum(busy)
                    for layer, row in enumerate(loads)
                    for busy in [rank_loads(after, layer, range(ranks), row)]
                ),
                "moves": found.moves,
                "fewest_copies": min(min(after.copies(layer, range(ranks))) for layer in range(LAYERS)),
            },
            "eplb": {
                "imbalance": statistics.mean(imbalance for _, imbalance in packed),
                "moves": sum(moves(old, new) for old, (new, _) in zip(theirs, packed, strict=True)),
                "fewest_copies": min(fewest_copies(packs, experts) for packs, _ in packed),
            },
            "eplb_tolerant": {
                "imbalance": statistics.mean(eplb(row, slots, ranks, least)[1] for row in loads)
            },
        }
        ours, theirs = after, [packs for packs, _ in packed]
    return result


def example() -> dict[str, Any]:
    placement = launch_placement(8, 2, 12, 4)
    found = plan(PlanInput(placement, tuple(range(8)), README_EXAMPLE))
    after = Placement(1, 8, 2, 12, found.slots)
    ours = [rank_loads(after, layer, range(8), row) for layer, row in enumerate(README_EXAMPLE)]
    return {
        "ours": [round(max(busy) * 8 / sum(busy), 4) for busy in ours],
        "eplb_global": [round(eplb(row, 16, 8)[1], 4) for row in README_EXAMPLE],
        "eplb_hierarchical": [round(eplb_hierarchical(row, 16, 4, 2, 8), 4) for row in README_EXAMPLE],
    }


def all_cases() -> Iterator[dict[str, Any]]:
    for ranks, experts, redundant in SIZES:
        for skew in SKEWS:
            for seed in range(SEEDS):
                yield one_case(ranks, experts, redundant, skew, seed)


def planner_seconds() -> dict[str, float]:
    seconds = {}
    for redundant in (64, 384):
        rng = random.Random(redundant)
        placement = launch_placement(320, 61, 256, redundant)
        loads = [[rng.paretovariate(1.5) for _ in range(256)] for _ in range(61)]
        began = time.perf_counter()
        plan(PlanInput(placement, tuple(range(320)), loads))
        seconds[f"{256 + redundant} slots"] = round(time.perf_counter() - began, 2)
    return seconds


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("first", "drifted"):
        both = [case[name] for case in cases]
        found[name] = {
            "balance_to_eplb": _mean(one["ours"]["imbalance"] / one["eplb"]["imbalance"] for one in both),
            "balance_to_eplb_tolerant": _mean(
                one["ours"]["imbalance"] / one["eplb_tolerant"]["imbalance"] for one in both
            ),
            "worst_balance_to_eplb_tolerant": round(
                max(one["ours"]["imbalance"] / one["eplb_tolerant"]["imbalance"] for one in both), 3
            ),
            "moves_to_eplb": _mean(one["ours"]["moves"] / one["eplb"]["moves"] for one in both),
            "worst_moves_to_eplb": round(max(one["ours"]["moves"] / one["eplb"]["moves"] for one in both), 3),
            "gigabytes": [
                round(sum(one[side]["moves"] for one in both) * EXPERT_BYTES / 1e9, 1)
                for side in ("ours", "eplb")
            ],
        }
    return found


def of_other(checkout: Path, call: str) -> Any:
    """What a function here comes to with the planner of another commit."""
    code = (
        f"import sys, json; sys.path[:0] = [{str(checkout / 'src')!r}, {str(Path.cwd())!r}]; import bench.eplb as bench;"
        f"print(json.dumps({call}))"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    done = run([sys.executable, "-c", code], PLAN_S, env=environment)
    done.check_returncode()
    return json.loads(done.stdout)


def shortest(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


def _mean(values: Any) -> float:
    return float(round(statistics.mean(values), 3))


def main() -> None:
    parser = command_line(__doc__, "eplb")
    parser.add_argument("--other", type=Path, metavar="CHECKOUT", help="of another commit, to compare with")
    options = parser.parse_args()
    cases = list(all_cases())
    rounds, others = [], []
    for _ in range(ROUNDS):
        if options.other:
            others.append(of_other(options.other, "bench.planner_seconds()"))
        rounds.append(of_other(Path.cwd(), "bench.planner_seconds()"))
    result = {
        "readme_example": example(),
        "planner_seconds_61_layers_320_ranks": shortest(rounds),
        "summary": summarise(cases),
        "cases": cases,
    }
    if options.other:
        result["other"] = {
            "planner_seconds_61_layers_320_ranks": shortest(others),
            "summary": of_other(options.other, "bench.summarise(list(bench.all_cases()))"),
        }
    print({name: result[name] for name in result if name != "cases"})
    write_result(options.out, result)


if __name__ == "__main__":
    main()
