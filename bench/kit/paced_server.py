"""`python -m elastic_ep.run`, with the ranks of `bench.kit.paced_engine`."""

from __future__ import annotations

import sys

from elastic_ep.run import parse
from elastic_ep.serve import serve

if __name__ == "__main__":
    sys.exit(serve(parse(), "bench.kit.paced_engine:main"))
