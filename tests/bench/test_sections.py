"""What a benchmark has measured is in its file, whatever ends it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.kit.sections import Expired, Sections

from tests.kit.bound import run
from tests.kit.served import summary, write_result

PLANNED = [{"batch": 1}, {"batch": 16}, {"batch": 64}]
MEASURED: list[dict[str, Any]] = [{"batch": 1, "tokens_per_s": 8.3}, {"batch": 16, "failed": "no memory"}]
KILLED = f"""
import os, signal, sys
from pathlib import Path
from bench.kit.sections import Sections
sections = Sections(Path(sys.argv[1]), "0")
def section():
    rows = sections.rows("theirs", {PLANNED})
    for row in {MEASURED}:
        rows.add(row)
    os.kill(os.getpid(), signal.SIGKILL)
sections.run("theirs", section, 60)
"""


def test_a_kill_loses_no_row_and_the_file_says_what_was_not_reached(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    root = Path(__file__).parents[2]
    done = run([sys.executable, "-c", KILLED, str(out)], 120, cwd=root)
    assert done.returncode == -signal.SIGKILL
    result = json.loads(out.read_text())
    assert result["theirs_so_far"] == MEASURED
    assert result["theirs_not_reached"] == PLANNED[2:]
    assert "theirs" not in result


@pytest.mark.parametrize("expires", [False, True])
def test_what_was_not_reached_is_named_only_by_a_section_that_fails(tmp_path: Path, expires: bool) -> None:
    sections = Sections(tmp_path / "result.json", "0")

    def section() -> list[dict[str, Any]]:
        rows = sections.rows("theirs", PLANNED[:2])
        rows.add(MEASURED[0])
        if expires:
            raise Expired("too long")
        rows.add(MEASURED[1])
        return rows.measured

    sections.run("theirs", section, 60)
    result = json.loads((tmp_path / "result.json").read_text())
    unfinished = {name: value for name, value in result.items() if name.startswith("theirs_")}
    if expires:
        assert unfinished == {"theirs_so_far": MEASURED[:1], "theirs_not_reached": PLANNED[1:2]}
    else:
        assert result["theirs"] == MEASURED
        assert unfinished == {}


def test_what_nothing_was_seen_of_is_null(tmp_path: Path) -> None:
    """NaN is no JSON: other readers refuse the whole file."""
    out = tmp_path / "result.json"
    write_result(out, {"first_token_ms": summary([]), "cases": [{"ratio": float("nan")}, (1.5,)]})

    def refused(word: str) -> None:
        raise AssertionError(word)

    result = json.loads(out.read_text(), parse_constant=refused)
    assert result["first_token_ms"] == {"count": 0, "p50": None, "p90": None, "p99": None, "max": None}
    assert result["cases"] == [{"ratio": None}, [1.5]]
