"""Streams of long prompts: what a kill costs their clients, what pages kept for it cost, and prompts beside decodes.

    python -m bench.long_context [--old TREE] [--kills 16] [--out bench/results/long_context.json]
    python -m bench.long_context --mode cost [--rounds 5] --out bench/results/long_context_cost.json
    python -m bench.long_context --mode pace [--old TREE] --out bench/results/long_context_pace.json
    python -m bench.long_context --device cuda --config-only --layers 48 --ranks 4 --prompt-tokens 4096 --old TREE

kills: ranks die under load, every one in turn. Each text is compared with that of a run without kills, on a server that
    has computed nothing before. In every other round of the ranks nothing new begins between a kill and each stream's
    next token: there what is computed again is counted.
cost: the same load on servers with and without names and shelf, in turns.
pace: streams that decode, before and while long prompts come in: their gaps, in medians of their own.

Gaps lie between two tokens that are handed to a client.
`--old`: the source tree of an older commit is measured in the same run, without the flags that it does not have.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
from tests.kit.served import Server, http, percentile, summary, write_result

from bench.kit.command_line import command_line
from bench.kit.deliveries import deliveries, gaps_ms, longest_gaps_ms
from bench.kit.gap_plot import draw_gaps
from bench.kit.load import cpu_seconds
from bench.kit.long_prompts import long_prompt
from bench.kit.long_streams import Load, answered, asks, complete, with_kills
from bench.kit.sections import gpu, quartiles
from bench.kit.sides import Side, add_side_options, context_for, server_arguments, side, sides

NOTHING_KEPT = ("--kv-shelf-gib", "0", "--no-enable-prefix-caching")
LOG_FLUSHED_S = 0.3
AGAIN_TOKENS = 16
"""A stream that moves has at most its last page to compute."""
DECODE_PROMPT = 64


# Kills


def kills(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    gaps: dict[str, list[list[float]]] = {}
    for one in sides(options, scratch):
        result[one.name], gaps[one.name] = kills_of(one, options, scratch)
        print(one.name, {name: value for name, value in result[one.name].items() if name != "kills"})
    draw_gaps(gaps, options.out.with_suffix(".png"))
    return result


def kills_of(
    one: Side, options: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Any], list[list[float]]]:
    with one.server(scratch / "runs") as target:
        load, struck = asyncio.run(with_kills(target, options))
        time.sleep(LOG_FLUSHED_S)
        stamps, start_s = deliveries(target.events), target.ready_s
    with one.server(scratch / "runs") as target:
        reference = asyncio.run(answered(target, sorted(load.answers), options))
        time.sleep(LOG_FLUSHED_S)
        calm = [max(gaps) for own in deliveries(target.events) if (gaps := gaps_ms(own))]
    step = median([gap for own in stamps for gap in gaps_ms(own)])
    ends = [*(one["at_ns"] for one in struck), float("inf")]
    by_kill = [longest_gaps_ms(stamps, kill, until) for kill, until in pairwise(ends)]
    for one_kill, of_kill in zip(struck, by_kill, strict=True):
        one_kill["longest_gaps_ms"] = [round(gap, 1) for gap in sorted(of_kill)]
    every = [gap for of_kill in by_kill for gap in of_kill]
    told = {
        **one.described(),
        "start_s": round(start_s, 2),
        **compare(load, reference),
        "median_step_ms": round(step, 3),
        "longest_gap_ms": summary(every),
        "longest_gap_steps": summary([gap / step for gap in every]),
        "longest_gap_ms_nothing_new": summary(_of(by_kill, struck, counted=True)),
        "longest_gap_ms_new_prompts": summary(_of(by_kill, struck, counted=False)),
        "longest_gap_ms_without_kills": summary(calm),
        "full_strength_s": summary([one["full_strength_s"] for one in struck]),
        "computed_again": computed_again(struck),
        "kills": struck,
    }
    return told, by_kill


def _of(by_kill: list[list[float]], struck: list[dict[str, Any]], *, counted: bool) -> list[float]:
    pairs = zip(by_kill, struck, strict=True)
    return [gap for gaps, one in pairs if one["counted"] == counted for gap in gaps]


def compare(load: Load, reference: Load) -> dict[str, Any]:
    different = [
        str(ask)
        for ask, answer in sorted(load.answers.items())
        if ask in reference.answers and answer.text != reference.answers[ask].text
    ]
    return {
        "streams_finished": len(load.answers),
        "failed_streams": len(load.errors),
        "errors": (load.errors + reference.errors)[:20],
        "texts_compared": len(load.answers.keys() & reference.answers.keys()),
        "texts_different": different,
    }


def computed_again(struck: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Tokens, by the counters of pages; None of a commit that counts none: it computes all again."""
    found = [one for one in struck if "computed_again" in one and one["moved"]]
    if not found:
        return None
    moved, tokens = (sum(one[name] for one in found) for name in ("moved", "computed_again"))
    return {
        "kills": len(found),
        "moved_streams": moved,
        "tokens": tokens,
        "tokens_a_stream": round(tokens / moved, 2),
        "most_a_stream_of_one_kill": round(max(one["computed_again"] / one["moved"] for one in found), 2),
        "pages_fetched": sum(one["pages_fetched"] for one in found),
        "aim_a_stream": AGAIN_TOKENS,
    }


# What it costs when nothing fails


def cost(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    arguments = [*server_arguments(options, scratch), *options.server_flags.split()]
    kept = [side("on", arguments), side("off", [*arguments, *NOTHING_KEPT])]
    if options.old:
        kept.append(side("old", arguments, options.old))
    rates: dict[str, list[float]] = {one.name: [] for one in kept}
    busy: dict[str, list[float]] = {one.name: [] for one in kept}
    for number in range(options.rounds):
        for one in kept if number % 2 else reversed(kept):
            with one.server(scratch / "runs") as target:
                rate, cpu = asyncio.run(tokens_a_second(target, options, number))
                rates[one.name].append(rate)
                busy[one.name].append(cpu)
        print({name: (round(rates[name][-1], 1), round(busy[name][-1], 3)) for name in rates}, flush=True)
    return {
        **{
            one.name: {**one.described(), "tokens_per_s": [round(x, 1) for x in rates[one.name]]}
            for one in kept
        },
        "on_of_off": quartiles([on / off for on, off in zip(rates["on"], rates["off"], strict=True)], 4),
        "cpu_ms_a_token": {name: quartiles(values, 4) for name, values in busy.items()},
        "cpu_on_of_off": quartiles([on / off for on, off in zip(busy["on"], busy["off"], strict=True)], 4),
    }


async def tokens_a_second(target: Server, options: argparse.Namespace, number: int) -> tuple[float, float]:
    """Of streams that begin together, each with a prompt that is new; prompts' tokens count as well. And milliseconds of
    processor time a token, of all processes: other work on the machine disturbs that less.
    """
    root = psutil.Process(target.process.pid)
    first = (number + 1) * 1_000_000
    async with http() as session:
        warm = Load(target, iter(list(asks_of(first, options.streams))), DECODE_PROMPT, 16, options.streams)
        await warm.run(session)
        began, used = time.monotonic(), cpu_seconds(root)[0]
        wanted = asks_of(first + options.streams, options.streams * options.turns)
        load = Load(target, iter(wanted), options.prompt_tokens, options.max_tokens, options.streams)
        await load.run(session)
        took, used = time.monotonic() - began, cpu_seconds(root)[0] - used
    if load.errors or warm.errors:
        raise RuntimeError(f"requests failed: {(load.errors + warm.errors)[:3]}")
    tokens = sum(one.prompt_tokens + one.generated for one in load.answers.values())
    return tokens / took, 1000 * used / tokens


def asks_of(first: int, count: int) -> list[Any]:
    return [ask for ask, _ in zip(asks(first), range(count), strict=False)]


# Prompts beside decodes


def pace(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    result = {}
    for one in sides(options, scratch):
        with one.server(scratch / "runs") as target:
            fed = asyncio.run(decodes_beside_prompts(target, options))
            time.sleep(LOG_FLUSHED_S)
            result[one.name] = {**one.described(), **pace_of(deliveries(target.events), **fed)}
        print(one.name, result[one.name])
    return result


async def decodes_beside_prompts(target: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The times of the calm and of the fed phase, ns, and what became of the prompts."""
    decoding = Load(target, asks(), DECODE_PROMPT, options.max_tokens, options.streams)
    waited: list[float] = []
    numbers = iter(range(1_000_000, 1_000_000 + options.prompts))

    async def feed(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            prompt = long_prompt(number, options.prompt_tokens)
            answer = await complete(session, target.url, prompt, lambda: None, max_tokens=2, temperature=0.0)
            waited.append(answer.first_s)

    async with http() as session:
        running = asyncio.create_task(decoding.run(session))
        while len(decoding.under_way) < decoding.at_once:
            await asyncio.sleep(0.01)
        await decoding.until_all_heard(0.0)
        calm_ns = time.monotonic_ns()
        await asyncio.sleep(options.calm)
        fed_ns = time.monotonic_ns()
        await asyncio.gather(*(feed(session) for _ in range(options.feeders)))
        end_ns = time.monotonic_ns()
        decoding.stop()
        await running
    if decoding.errors:
        raise RuntimeError(f"requests failed: {decoding.errors[:3]}")
    return {"calm_ns": calm_ns, "fed_ns": fed_ns, "end_ns": end_ns, "waited_s": waited, "options": options}


def pace_of(
    streams: list[list[int]],
    calm_ns: int,
    fed_ns: int,
    end_ns: int,
    waited_s: list[float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Of streams with some gaps in both phases. `ratio`: each gap to the median of its stream while prompts come in."""
    calm_gaps, fed_gaps, ratios, calm_ratios = [], [], [], []
    for stamps in streams:
        calm, fed = gaps_ms(stamps, calm_ns, fed_ns), gaps_ms(stamps, fed_ns, end_ns)
        if len(fed) < 10 or stamps[-1] < fed_ns:
            continue
        calm_gaps += calm
        fed_gaps += fed
        ratios += [gap / median(fed) for gap in fed]
        calm_ratios += [gap / median(calm) for gap in fed] if len(calm) >= 10 else []
    seconds = (end_ns - fed_ns) / 1e9
    return {
        "gap_ms_calm": summary(calm_gaps),
        "gap_ms_fed": summary(fed_gaps),
        "gap_to_own_median": summary(ratios),
        "gap_to_own_calm_median": summary(calm_ratios),
        "share_within_twice_own_median": round(sum(one <= 2 for one in ratios) / max(1, len(ratios)), 5),
        "prompt_tokens_per_s": round(len(waited_s) * options.prompt_tokens / seconds, 1),
        "first_token_s": {"p50": round(percentile(waited_s, 0.5), 3), "max": round(max(waited_s), 3)},
    }


MODES = {"kills": kills, "cost": cost, "pace": pace}


def main() -> None:
    parser = command_line(__doc__, "long_context", ranks=8)
    add_side_options(parser)
    add = parser.add_argument
    add("--mode", choices=tuple(MODES), default="kills")
    add("--streams", type=int, default=32)
    add("--prompt-tokens", type=int, default=400)
    add("--max-tokens", type=int, default=400)
    add("--kills", type=int, default=16)
    add("--settle", type=float, default=1.0, help="seconds before a kill")
    add("--rounds", type=int, default=5, help="with --mode cost")
    add("--turns", type=int, default=1, help="requests of each stream and round, with --mode cost")
    add("--prompts", type=int, default=48, help="that come in, with --mode pace")
    add("--feeders", type=int, default=4, help="at once")
    add("--calm", type=float, default=4.0, help="seconds before they come")
    options = parser.parse_args()
    context_for(options, options.prompt_tokens + options.max_tokens)
    with tempfile.TemporaryDirectory(prefix="long_context-") as scratch:
        result = MODES[options.mode](options, Path(scratch))
    asked = {
        name: getattr(options, name) for name in ("mode", "streams", "prompt_tokens", "max_tokens", "ranks")
    }
    write_result(options.out, {"gpu": gpu() if options.device == "cuda" else "", **asked, **result})


if __name__ == "__main__":
    main()
