"""`python -m elastic_ep.run`, with the ranks of paced_engine.py."""

from __future__ import annotations

import sys

from elastic_ep import run, serve

if __name__ == "__main__":
    serve.RANK_ENTRY = "bench.paced_engine:main"
    serve._PRELOAD["cpu"] = ("torch", "elastic_ep.control.rank", "bench.paced_engine")
    sys.exit(run.main())
