"""What `make mutants` reads names modules and tests that exist: what no pattern fits would never be changed, silently."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "elastic_ep"
TABLE: dict[str, Any] = tomllib.loads((ROOT / "scripts" / "mutants.toml").read_text())
PATTERNS = list(TABLE["tests"])
MODULES = [str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")]
PLAIN = {"machines/contract.py"}
"""Of the machines, what decides nothing."""


def first(module: str) -> str | None:
    return next((pattern for pattern in PATTERNS if fnmatch.fnmatch(module, pattern)), None)


def test_every_pattern_is_the_first_to_fit_some_module() -> None:
    assert set(PATTERNS) - {first(module) for module in MODULES} == set()


def test_every_machine_is_in_the_sample() -> None:
    machines = {m for m in MODULES if m.startswith("machines/") and not m.endswith("__init__.py")}
    assert len(machines) > 15
    assert {module for module in machines if first(module) is None} <= PLAIN


def test_the_tests_exist() -> None:
    named = {test for tests in TABLE["tests"].values() for test in tests}
    assert {test for test in named if not (ROOT / test).exists()} == set()


def test_what_is_said_to_change_nothing_is_still_there() -> None:
    for one in TABLE["equivalent"]:
        lines = {line.strip() for line in (SOURCE / one["module"]).read_text().splitlines()}
        assert set(one["was"]) <= lines, one["module"]
