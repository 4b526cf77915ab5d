"""In continuous integration a test that is skipped for want of a declared dependency fails; others may be skipped."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.kit.bound import run

PLUGIN = Path(__file__).parent / "skip_plugin.py"
LACKING = [
    "Mooncake is not installed: pip install something",
    "could not import 'transformers'",
    "anything else",
]
ELSEWHERE = ["no CUDA device", "the interpreter has no graphs", "no Chromium on this machine"]
WAYS = """
def test_{n}_in_the_test(): pytest.skip({reason!r})
@pytest.fixture
def it_{n}(): pytest.skip({reason!r})
def test_{n}_in_a_fixture(it_{n}): pass
@pytest.mark.skipif(True, reason={reason!r})
def test_{n}_by_a_mark(): pass
def test_{n}_not_imported(): pytest.importorskip('there_is_none', reason={reason!r})
"""


def test_what_is_skipped_for_want_of_something_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(PLUGIN.read_text())
    tests = [WAYS.format(n=n, reason=reason) for n, reason in enumerate([*LACKING, *ELSEWHERE])]
    (tmp_path / "test_skipped.py").write_text("\n".join(["import pytest", *tests]))
    words = ["-q", "-rA", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "--strict-skips", str(tmp_path)]
    done = run([sys.executable, "-m", "pytest", *words], 100, cwd=tmp_path)
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::test_(\d)_(\w+)", done.stdout, re.MULTILINE))
    ways = ("in_the_test", "in_a_fixture", "by_a_mark", "not_imported")
    assert failed == {(str(n), way) for n in range(len(LACKING)) for way in ways}, done.stdout
    assert f"{4 * len(ELSEWHERE)} skipped" in done.stdout
