"""What is compared in one run: the server of this source tree, and that of an older one."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit.served import ROOT, Server, of_tree, server, shaped_model
from tests.kit.shapes import layers_30b

from bench.kit.command_line import source_tree
from elastic_ep.run import BUNDLED_MODEL

_FLAG = re.compile(r"--[a-z][a-z0-9-]*")
_ONE_FILE = ("--event-log-max-mb", "0")


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    tree: Path
    arguments: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """Flags that its commit does not have."""

    @contextmanager
    def server(self, scratch: Path) -> Iterator[Server]:
        with server(self.arguments, scratch, tree=self.tree) as target:
            yield target

    def described(self) -> dict[str, Any]:
        words = [Path(word).name if word.startswith("/") else word for word in self.arguments]
        return {"commit": _commit(self.tree), "server": words, "flags_left_out": list(self.left_out)}


def side(name: str, arguments: Sequence[str], tree: Path = ROOT) -> Side:
    """Flags that the tree's command line does not have are left out, with their values."""
    known = _known_flags(tree)
    kept: list[str] = []
    left_out: list[str] = []
    keeps = True
    for word in (*_ONE_FILE, *arguments):
        if word.startswith("--"):
            keeps = word in known
            if not keeps:
                left_out.append(word)
        if keeps:
            kept.append(word)
    return Side(name, tree, tuple(kept), tuple(left_out))


def _known_flags(tree: Path) -> set[str]:
    command = [*of_tree(tree), "-m", "elastic_ep.run", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(_FLAG.findall(said.stdout))


def _commit(tree: Path) -> str:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return ""
    return asked.stdout.strip()


def add_model_options(parser: argparse.ArgumentParser, device: str) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--mps", action="store_true")
    add("--model", type=Path, default=BUNDLED_MODEL)
    add("--load-format", choices=("auto", "dummy"), default="auto")
    add("--config-only", action="store_true", help="Qwen3-30B-A3B's layers, random weights")
    add("--layers", type=int, default=24, help="with --config-only")
    add("--vocabulary", type=int, help="with --config-only; the bundled tokenizer's if not given")
    add(
        "--context",
        type=int,
        help="with --config-only: the model's positions; the bundled one's if not given",
    )


def add_side_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "cpu")
    parser.add_argument(
        "--old", type=source_tree, help="a source tree of an older commit, to be measured beside this one"
    )
    parser.add_argument("--server-flags", default="", help="more of them, for all servers, in one string")


def context_for(options: argparse.Namespace, tokens: int) -> None:
    """Positions for so many tokens, if the model's shape is ours to choose."""
    options.context = options.context or -(-tokens // 1024) * 1024


def server_arguments(options: argparse.Namespace, scratch: Path) -> list[str]:
    """What `options` ask of a server. Makes the model's folder in `scratch` if it is a config alone."""
    model, load_format = options.model, options.load_format
    if options.config_only:
        shape = layers_30b(options.layers)
        if options.vocabulary is not None:
            shape["vocab_size"] = options.vocabulary
        if options.context is not None:
            shape["max_position_embeddings"] = options.context
        model, load_format = shaped_model(scratch / "model", shape), "dummy"
    return [
        *("--ranks", str(options.ranks), "--device", options.device),
        *("--model", str(model), "--load-format", load_format),
        *(["--mps"] if options.mps else []),
    ]


def sides(options: argparse.Namespace, scratch: Path) -> list[Side]:
    """Of `options`: the old one, if there is one, and the new one."""
    arguments = [*server_arguments(options, scratch), *options.server_flags.split()]
    old = [side("old", arguments, options.old)] if options.old else []
    return [*old, side("new", arguments)]
