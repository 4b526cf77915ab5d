"""Commands in bench/ share what is in bench/kit alone, and tests use the benches only to test them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path for path in (ROOT / "bench").glob("*.py") if path.name != "__init__.py")


def imported(file: Path) -> set[str]:
    """Absolute names; of `from a import b` also "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_bench(file: Path) -> set[str]:
    return {name for name in imported(file) if name.startswith("bench.")}


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_a_command_runs_by_itself(file: Path) -> None:
    assert 'if __name__ == "__main__":' in file.read_text()
    assert {name for name in of_bench(file) if not name.startswith("bench.kit")} == set()


def test_the_kit_imports_no_command() -> None:
    files = list((ROOT / "bench" / "kit").glob("*.py"))
    assert len(files) > 1
    assert {name for file in files for name in of_bench(file) if not name.startswith("bench.kit")} == set()


def test_tests_import_no_bench_but_to_test_it() -> None:
    files = [file for file in (ROOT / "tests").rglob("*.py") if file.parent.name != "bench"]
    assert len(files) > 100
    assert [file for file in files if of_bench(file)] == []


def test_what_make_runs_exists() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    groups = re.findall(
        r"^BENCHES := (.*)$|for bench in ([a-z][^;]*);|-m bench\.(\w+)", makefile, re.MULTILINE
    )
    words = {word.strip('"') for group in groups for text in group for word in text.split()}
    named = {word for word in words if re.fullmatch(r"\w+", word)}
    assert len(named) > 15
    assert named <= {file.stem for file in COMMANDS}
