"""Kills ranks under load and shows what clients and survivors saw of it.

64 concurrent streams answer word problems, half greedy, half sampled with a seed, while ranks are killed: single
ones over all ranks, pairs, joiners in each of their states, and SIGSTOP instead of SIGKILL in a quarter of cases.
Every text is compared with the same request's text in a run without kills.

    python -m bench.failover [--kills 40] [--out bench/results/failover.json]
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path

from tests.kit.served import chat, http, server, write_result
from train.problems import held_out

from bench.kit.command_line import command_line
from bench.kit.failover_analysis import analyse
from bench.kit.failover_plot import draw
from bench.kit.kills import JOINER_STATES, STREAMS, Case, compare, disturbed_run, reference_run

PUBLISHED = {
    "mooncake_pg_s": "5.0 (2 s timeout and 3 s window; its rank 0 must not die)",
    "sglang_elastic_ep_s": "6.2-6.8",
    "eep_s": "11",
    "tarragon_s": "0.3-0.4",
}


def plan(kills: int, ranks: int, seed: int) -> list[Case]:
    """Every rank in turn, rank 0 included; a quarter SIGSTOP; every eighth a pair; every fifth kills the joiner."""
    draw_rank = random.Random(seed)
    cases = []
    for number in range(kills):
        rank = number % ranks
        if number % 8 == 7:
            other = draw_rank.choice([r for r in range(ranks) if r != rank])
            cases.append(Case((rank, other)))
        elif number % 4 == 1:
            cases.append(Case((rank,), stop=True))
        elif number % 5 == 4:
            cases.append(Case((rank,), joiner_state=JOINER_STATES[number // 5 % len(JOINER_STATES)]))
        else:
            cases.append(Case((rank,)))
    return cases


async def restart_everything(log_dir: Path, arguments: list[str], question: str) -> dict[str, float]:
    """What a user does today: kill the server, start it again, wait for the first token."""
    with server(arguments, log_dir) as first:
        killed = time.monotonic()
        first.process.kill()
        first.process.wait()
    with server(arguments, log_dir) as second:
        stamps: list[float] = []
        async with http() as session:
            await chat(session, second.url, question, stamps=stamps, temperature=0.0, max_tokens=8)
        return {"ready_s": round(second.ready_s, 3), "first_token_s": round(stamps[0] - killed, 3)}


def main() -> None:
    parser = command_line(__doc__, "failover", ranks=8)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    questions = [problem.question for problem in held_out(options.questions)]
    arguments = ["--ranks", str(options.ranks), "--device", options.device]
    with tempfile.TemporaryDirectory(prefix="failover-") as scratch:
        with server(arguments, Path(scratch)) as target:
            reference = asyncio.run(reference_run(target, questions))
        with server(arguments, Path(scratch)) as target:
            start_s = target.ready_s
            cases = plan(options.kills, options.ranks, options.seed)
            load, struck = asyncio.run(disturbed_run(target, questions, cases))
            time.sleep(0.3)  # the log is flushed at most so often
            figures, curves = analyse(target.events, struck)
        restart = asyncio.run(restart_everything(Path(scratch), arguments, questions[0]))
    result = {
        "ranks": options.ranks,
        "streams": STREAMS,
        "start_s": round(start_s, 2),
        "reference_errors": reference.errors[:5],
        **compare(load, reference),
        **figures,
        "compared_with": {"restart_everything": restart, "published_stall": PUBLISHED},
        "kills": struck,
    }
    write_result(options.out, result)
    draw(curves, load.stamps, struck, options.out.with_suffix(".png"))
    for name in (
        "failed_requests",
        "texts_different",
        "notice_ms",
        "hang_notice_ms",
        "stall_steps",
        "full_strength_s",
        "rejoin_steps",
    ):
        print(f"{name:20} {result[name]}")


if __name__ == "__main__":
    main()
