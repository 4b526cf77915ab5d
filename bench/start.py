"""From the command to a server that serves, and from its first requests to their first tokens, beside an older commit.

python -m bench.start --old TREE [--rounds 10] [--out bench/results/start.json]

Both in turns. So is what is asked first, right after the server has said that it serves: a plain question, or one whose
answer follows a JSON schema. The like of it follows four times; the last of them is what later requests take.
"""

from __future__ import annotations

import asyncio
import compileall
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.kit.served import Stamps, chat, http, write_result

from bench.kit.command_line import command_line
from bench.kit.sections import quartiles
from bench.kit.sides import add_side_options, sides

_SCHEMA = {"type": "object", "properties": {"apples": {"type": "integer"}}, "required": ["apples"]}
_FORM = {"type": "json_schema", "json_schema": {"name": "apples", "schema": _SCHEMA}}
ASKED: Mapping[str, Mapping[str, Any]] = {"plain": {}, "guided": {"response_format": _FORM}}
LATER = 4


def main() -> None:
    parser = command_line(__doc__, "start", ranks=8)
    add_side_options(parser)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start-") as scratch:
        compared = sides(options, Path(scratch))
        for one in compared:  # as an installation is
            compileall.compile_dir(one.tree / "src", quiet=2)
        took: dict[str, dict[str, list[float]]] = {one.name: {} for one in compared}
        for number in range(options.rounds):
            kind = list(ASKED)[number // 2 % len(ASKED)]
            for one in compared if number % 2 else reversed(compared):
                with one.server(Path(scratch) / "runs") as target:
                    waited = asyncio.run(first_tokens(target.url, ASKED[kind]))
                for name, seconds in (
                    ("start_s", target.ready_s),
                    (f"first_{kind}_s", waited[0]),
                    (f"later_{kind}_s", waited[-1]),
                ):
                    took[one.name].setdefault(name, []).append(seconds)
                print(
                    one.name, kind, round(target.ready_s, 2), [round(each, 3) for each in waited], flush=True
                )
    result = {
        one.name: {
            **one.described(),
            **{name: {**quartiles(values), "least": min(values)} for name, values in took[one.name].items()},
        }
        for one in compared
    }
    write_result(options.out, {"ranks": options.ranks, **result})


async def first_tokens(url: str, fields: Mapping[str, Any]) -> list[float]:
    """From each request to its first token, one after the other, seconds."""
    waited = []
    async with http() as session:
        for number in range(1 + LATER):
            stamps = Stamps()
            asked = time.monotonic()
            question = (
                f"Tom has {number + 2} apples. Tom buys 30 more apples. How many apples does Tom have now?"
            )
            await chat(session, url, question, stamps=stamps, max_tokens=16, **fields)
            waited.append(stamps[0] - asked)
    return waited


if __name__ == "__main__":
    main()
