"""The detector itself: a test whose event loop stands still fails, and says what held it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.kit.bound import run

ROOT = Path(__file__).parent.parent
TESTS = """
import asyncio, json, time
import anyio, pytest

def held():
    time.sleep(0.3)

async def hold():
    await asyncio.sleep(0.15)
    held()
    await asyncio.sleep(0)

def test_asyncio():
    asyncio.run(hold())

def test_anyio():
    anyio.run(hold)

@pytest.mark.anyio
async def test_plugin():
    await hold()

@pytest.mark.e2e
def test_server(tmp_path):
    line = {"note": "loop_held", "ms": 277, "where": "somewhere"}
    (tmp_path / "events.jsonl").write_text(json.dumps(line, separators=(",", ":")) + "\\n")

@pytest.mark.holds_the_loop("on purpose")
def test_on_purpose():
    asyncio.run(hold())

def test_no_loop():
    held()

def test_idle_loop():
    asyncio.run(asyncio.sleep(0.3))
"""


def test_a_test_whose_loop_stands_still_fails(tmp_path: Path) -> None:
    file = tmp_path / "test_them.py"
    file.write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rE",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
    ]
    done = run(
        [*command, "-p", "no:cacheprovider", "-p", "tests.loop_plugin", "-k", "not trio", str(file)],
        60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    found = {line.split("::")[1].split()[0].split("[")[0] for line in errors}
    assert found == {"test_asyncio", "test_anyio", "test_plugin", "test_server"}, done.stdout
    assert "(held)" in done.stdout
    assert "277 ms in the server, somewhere" in done.stdout
