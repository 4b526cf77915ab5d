"""What a bench measures beside this tree is another one that is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from bench.kit import command_line
from bench.kit.command_line import source_tree


def make_tree(at: Path, *, built: bool) -> Path:
    fused = at / "src/elastic_ep/fused"
    fused.mkdir(parents=True)
    (at / "setup.py").touch()
    if built:
        (fused / "_v3.so").touch()
    return at


def test_a_tree_that_would_silently_be_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, bare = make_tree(tmp_path / "built", built=True), make_tree(tmp_path / "bare", built=False)
    with pytest.raises(argparse.ArgumentTypeError, match="no source tree"):
        source_tree(str(tmp_path))
    monkeypatch.setattr(command_line, "ROOT", built)
    with pytest.raises(argparse.ArgumentTypeError, match="build_ext"):
        source_tree(str(bare))
    assert source_tree(str(built)) == built
    monkeypatch.setattr(command_line, "ROOT", bare)
    assert source_tree(str(bare)) == bare
