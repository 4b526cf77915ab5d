"""`python -m elastic_ep.film RUN RANK.INCARNATION`: the film of one loss as JSON on stdout, for the page.

A file to look at is made by `python -m elastic_ep.replay RUN --html FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from elastic_ep.event_log.reader import Differs, Unreadable
from elastic_ep.film.read import film_of
from elastic_ep.host import life_line
from elastic_ep.host.scheduling import make_ordinary

NICE = 5
"""An operator waits, and it takes half a second; more niceness would be many seconds beside busy ranks."""


def _member(text: str) -> tuple[int, int]:
    rank, _, incarnation = text.partition(".")
    return int(rank), int(incarnation)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic_ep.film", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("loss", type=_member)
    parser.add_argument(
        "--at-ns", type=int, help="when it was, CLOCK_MONOTONIC: files of before are not read"
    )
    parser.add_argument(
        "--life-line", type=int, help="a descriptor: this process ends when its other end does"
    )
    options = parser.parse_args(arguments)
    make_ordinary()
    if options.life_line is not None:
        life_line.bind(options.life_line)
    os.nice(NICE)
    try:
        made = film_of(options.run, options.loss, options.at_ns)
    except (Unreadable, Differs) as error:
        print(error, file=sys.stderr)
        return 1
    json.dump(made, sys.stdout, separators=(",", ":"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
