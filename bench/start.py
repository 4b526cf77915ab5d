"""From the command to a server that serves, beside an older commit, in turns.

python -m bench.start --old TREE [--rounds 10] [--out bench/results/start.json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.kit.served import write_result

from bench.kit.command_line import command_line
from bench.kit.sections import quartiles
from bench.kit.sides import add_side_options, sides


def main() -> None:
    parser = command_line(__doc__, "start", ranks=8)
    add_side_options(parser)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start-") as scratch:
        compared = sides(options, Path(scratch))
        took: dict[str, list[float]] = {one.name: [] for one in compared}
        for number in range(options.rounds):
            for one in compared if number % 2 else reversed(compared):
                with one.server(Path(scratch) / "runs") as target:
                    took[one.name].append(target.ready_s)
            print({name: round(values[-1], 2) for name, values in took.items()}, flush=True)
    result = {
        one.name: {**one.described(), "start_s": quartiles(took[one.name]), "least_s": min(took[one.name])}
        for one in compared
    }
    write_result(options.out, {"ranks": options.ranks, **result})


if __name__ == "__main__":
    main()
