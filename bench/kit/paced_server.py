"""`python -m elastic_ep.run`, with the ranks of paced_engine.py."""

from __future__ import annotations

import sys

from elastic_ep.run import parse
from elastic_ep.serve import serve

if __name__ == "__main__":
    sys.exit(serve(parse(), "bench.kit.paced_engine:main"))
