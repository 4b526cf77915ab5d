"""Time to first token of a request, and of a second one that begins with the same long text.

    python -m bench.prefix [--old TREE] [--pairs 40] [--out bench/results/prefix.json]
    python -m bench.prefix --device cuda --config-only --layers 24 --prefix-tokens 4096 --old TREE

One request at a time, on a server that has nothing else to do. Every pair has a prefix of its own. `--old`: the source
tree of an older commit is measured in the same run, pair by pair in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
from tests.kit.served import http, summary, write_result

from bench.kit.command_line import command_line
from bench.kit.long_prompts import long_prompt
from bench.kit.long_streams import complete
from bench.kit.sections import gpu, quartiles
from bench.kit.sides import Side, add_side_options, context_for, sides

QUESTION_TOKENS = 24
ANSWER_TOKENS = 8


class Pairs:
    """Of one side: what has been seen of its pairs."""

    def __init__(self, one: Side, url: str) -> None:
        self.side = one
        self._url = url
        self.first: list[float] = []
        self.second: list[float] = []
        """Seconds to the first token."""
        self.texts: list[str] = []

    async def ask(self, session: aiohttp.ClientSession, number: int, prefix_tokens: int) -> None:
        """Two questions with one prefix, the second after the first."""
        prefix = long_prompt(number, prefix_tokens)
        for which, seen in enumerate((self.first, self.second)):
            question = long_prompt(1_000_000 + 2 * number + which, QUESTION_TOKENS)
            answer = await complete(
                session, self._url, prefix + question, lambda: None, max_tokens=ANSWER_TOKENS, temperature=0.0
            )
            seen.append(answer.first_s)
            self.texts.append(answer.text)

    def figures(self) -> dict[str, Any]:
        ratios = [second / first for first, second in zip(self.first, self.second, strict=True)]
        return {
            **self.side.described(),
            "first_ms": summary([1000 * one for one in self.first]),
            "second_ms": summary([1000 * one for one in self.second]),
            "second_of_first": quartiles(ratios, 4),
        }


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All servers at once: those that are not asked have nothing to do. One after the other on a GPU: memory."""
    wanted = sides(options, scratch)
    groups = [wanted] if options.device == "cpu" else [[one] for one in wanted]
    done: list[Pairs] = []
    for group in groups:
        with ExitStack() as stack:
            asked = [Pairs(one, stack.enter_context(one.server(scratch / "runs")).url) for one in group]
            asyncio.run(in_turns(asked, options))
            done += asked
    result: dict[str, Any] = {pairs.side.name: pairs.figures() for pairs in done}
    if len(done) == 2:
        result["same_texts"] = done[0].texts == done[1].texts
    return result


async def in_turns(asked: list[Pairs], options: argparse.Namespace) -> None:
    """One pair before those that count."""
    async with http() as session:
        for number in range(options.pairs + 1):
            for pairs in asked if number % 2 else reversed(asked):
                await pairs.ask(session, number, options.prefix_tokens)
    for pairs in asked:
        del pairs.first[0], pairs.second[0]


def main() -> None:
    parser = command_line(__doc__, "prefix", ranks=8)
    add_side_options(parser)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--prefix-tokens", type=int, default=960)
    options = parser.parse_args()
    context_for(options, options.prefix_tokens + QUESTION_TOKENS + ANSWER_TOKENS)
    with tempfile.TemporaryDirectory(prefix="prefix-") as scratch:
        result = measure(options, Path(scratch))
    shown = {"prefix_tokens": options.prefix_tokens, "pairs": options.pairs, "ranks": options.ranks}
    write_result(options.out, {"gpu": gpu() if options.device == "cuda" else "", **shown, **result})
    for name, value in result.items():
        print(f"{name:10} {value}")


if __name__ == "__main__":
    main()
