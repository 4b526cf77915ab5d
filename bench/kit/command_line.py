"""A bench's command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.kit.served import ROOT

_ENGINES = "src/elastic_ep/fused/*.so"


def command_line(doc: str | None, result: str | None, ranks: int | None = None) -> argparse.ArgumentParser:
    """With `--out`, by default `bench/results/<result>.json`, and `--ranks` if there is a default for it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = None if result is None else Path(f"bench/results/{result}.json")
    parser.add_argument("--out", type=Path, default=out, help="(default: %(default)s)")
    if ranks is not None:
        parser.add_argument("--ranks", type=int, default=ranks, help="(default: %(default)s)")
    return parser


def source_tree(word: str) -> Path:
    """The type of an option that names a tree of another commit, which can be measured beside this one."""
    tree = Path(word).resolve()
    if not (tree / "src/elastic_ep").is_dir():
        raise argparse.ArgumentTypeError(f"{word} is no source tree of elastic_ep")
    if any(ROOT.glob(_ENGINES)) and (tree / "setup.py").exists() and not any(tree.glob(_ENGINES)):
        raise argparse.ArgumentTypeError(
            f"{word} has no engine in C++, and would compute in plain torch: there run"
            " python setup.py build_ext --inplace"
        )
    return tree
