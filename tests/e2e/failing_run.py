"""`failing_run.py DO FLAGS`: the run process with ranks that fail while they start, each with numbers of its own.

DO is "raise" (an exception in the engine's construction) or "exit" (the process just ends).
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.rank import process as rank_process


def build(*_arguments: object) -> NoReturn:
    raise RuntimeError(f"cannot compile: process {os.getpid()}, at {id(object()):#x}")


def raises(config_json: str, files: SharedFiles, life_fd: int) -> int:
    setattr(rank_process, "build_engine", build)  # noqa: B010  # the type checker knows that it is another
    return rank_process.main(config_json, files, life_fd)


def exits(config_json: str, files: SharedFiles, life_fd: int) -> int:
    return 7


if __name__ == "__main__":
    from elastic_ep import logs
    from elastic_ep.run import parse
    from elastic_ep.serve import serve

    here = os.path.dirname(__file__)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    config = parse(sys.argv[2:])
    logs.configure(config.log)
    sys.exit(serve(config, f"failing_run:{sys.argv[1]}s"))
