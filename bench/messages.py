"""What it takes to pack and to unpack a message between processes, beside the same in JSON (as configurations travel).

    python -m bench.messages [--tokens 4096] [--repeats 9] [--out bench/results/messages.json]

Processor time of this thread, the best of the repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.kit.served import write_result

from bench.kit.command_line import command_line
from elastic_ep.wire.codec import decode, encode, pack, unpack
from elastic_ep.wire.messages import (
    Assign,
    FromRank,
    Heartbeat,
    Numbered,
    PageCounts,
    SamplingParams,
    Seat,
    StepReport,
    Token,
    ToRank,
    View,
)

CALLS = 200


def main() -> None:
    parser = command_line(__doc__, "messages")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    prompt = tuple(range(100, 100 + options.tokens))
    tokens = tuple(Token(request, 5, 1234 + request) for request in range(16))
    messages: dict[str, tuple[Any, Any]] = {
        "step report of 16": (
            StepReport(7, 3, 1, 2, tokens, 16, 0, 999, 55, pages=PageCounts(held=40)),
            FromRank,
        ),
        "assignment": (Assign(1, prompt, (), SamplingParams(100), 77, 0), ToRank),
        "heartbeat": (Heartbeat(5, 6, 7, None, parked=False, pages=PageCounts(held=3)), FromRank),
        "view of 8": (Numbered(4, View(5, tuple(Seat(rank, 1, 0) for rank in range(8)))), Numbered),
    }
    rows = []
    for name, (message, kind) in messages.items():
        row: dict[str, Any] = {"message": name}
        for form, write, read in (("messagepack", pack, unpack), ("json", encode, decode)):
            data = write(message)
            row[f"{form}_bytes"] = len(data)
            row[f"{form}_write_us"] = _best_us(partial(write, message), options.repeats)
            row[f"{form}_read_us"] = _best_us(partial(read, data, kind), options.repeats)
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    write_result(options.out, {"tokens": options.tokens, "rows": rows})


def _best_us(call: Callable[[], object], repeats: int) -> float:
    best_s = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        for _ in range(CALLS):
            call()
        best_s = min(best_s, (time.thread_time() - began) / CALLS)
    return round(best_s * 1e6, 2)


if __name__ == "__main__":
    main()
