"""What survivors of a loss wait for on the host: choosing other copies, and knowing whether every expert has one.

Both are done the plain way, by walking through all layers and slots, and the way that the ranks and the controller do it,
on the same placements in the same run.

    python -m bench.loss_work [--out bench/results/loss_work.json]
"""

from __future__ import annotations

from typing import Any

from tests.kit.plain_routing import choose_plainly
from tests.kit.served import median_ms, write_result

from bench.kit.command_line import command_line
from elastic_ep.engine.routing_table import Copies
from elastic_ep.placement import Coverage, Placement, launch_placement

SHAPES = ((8, 4, 16), (4, 24, 128), (8, 48, 128), (16, 61, 256))
"""Ranks, layers, experts; every expert twice."""


def covered_plainly(placement: Placement, ranks: set[int]) -> bool:
    return all(
        {expert for rank in ranks for expert in placement.on_rank(layer, rank)}.issuperset(
            range(placement.num_experts)
        )
        for layer in range(len(placement.slots))
    )


def measure(ranks: int, layers: int, experts: int, repeats: int) -> dict[str, Any]:
    placement = launch_placement(ranks, layers, experts, experts)
    copies, coverage = Copies(placement), Coverage.of(placement)
    living = set(range(1, ranks))
    if copies.choose(living, 1).tolist() != choose_plainly(placement, living, 1):
        raise RuntimeError("the two ways choose other copies")
    if coverage.by(living) != covered_plainly(placement, living):
        raise RuntimeError("the two ways differ in what is covered")
    return {
        "ranks": ranks,
        "layers": layers,
        "experts": experts,
        "choose_plainly_ms": median_ms(lambda: choose_plainly(placement, living, 1), repeats),
        "choose_ms": median_ms(lambda: copies.choose(living, 1), repeats),
        "covered_plainly_ms": median_ms(lambda: covered_plainly(placement, living), repeats),
        "covered_ms": median_ms(lambda: coverage.by(living), repeats),
    }


def main() -> None:
    parser = command_line(__doc__, "loss_work")
    parser.add_argument("--repeats", type=int, default=51)
    options = parser.parse_args()
    rows = [measure(*shape, options.repeats) for shape in SHAPES]
    for row in rows:
        print(row)
    write_result(options.out, {"repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()
