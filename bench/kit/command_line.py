"""A bench's command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def command_line(doc: str | None, result: str | None, ranks: int | None = None) -> argparse.ArgumentParser:
    """With `--out`, by default `bench/results/<result>.json`, and `--ranks` if there is a default for it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = None if result is None else Path(f"bench/results/{result}.json")
    parser.add_argument("--out", type=Path, default=out, help="(default: %(default)s)")
    if ranks is not None:
        parser.add_argument("--ranks", type=int, default=ranks, help="(default: %(default)s)")
    return parser
