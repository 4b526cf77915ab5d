"""What tests and benches start ends with them, also when they are killed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.kit.bound import Bound

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 20.0

STARTS_A_SERVER = """
import signal
from pathlib import Path
from tests.kit.served import server

def test_that_never_ends():
    with server(["--ranks", "2"], Path(__file__).parent):
        Path(__file__).with_name("ready").write_text("")
        signal.pause()
"""
STARTS_PROCESSES = """
import multiprocessing, signal, sys, time
from pathlib import Path
from tests.kit.bound import Bound, tied

def test_that_never_ends():
    programs = [Bound([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)]
    here = Path(__file__).parent
    for method in ("fork", "spawn", "forkserver"):
        work = f"import pathlib, time; pathlib.Path({str(here / method)!r}).touch(); time.sleep(1000)"
        process = multiprocessing.get_context(method).Process(target=tied, args=(exec, work))
        process.start()
        programs.append(process)
        while not (here / method).exists():  # before that it is bound to nothing
            time.sleep(0.01)
    Path(__file__).with_name("ready").write_text("")
    signal.pause()
"""


def until(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit, f"not in time: {what}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("program", "at_least"), [(STARTS_A_SERVER, 5), (STARTS_PROCESSES, 6)])
def test_a_killed_test_run_leaves_nothing_behind(tmp_path: Path, program: str, at_least: int) -> None:
    (tmp_path / "test_inner.py").write_text(program)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tmp_path / "test_inner.py"),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    with Bound(command, stdout=subprocess.PIPE, cwd=ROOT, env=env) as run:
        until(lambda: (tmp_path / "ready").exists() or run.poll() is not None, "it has started all")
        assert run.poll() is None, run.communicate()[0]
        everything = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        assert len(everything) >= at_least, everything
        run.send_signal(signal.SIGKILL)
        until(lambda: not any(map(is_alive, everything)), f"all of {everything} are gone")


def starts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that start a program or a process without tying it to this one."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in (
            "subprocess.Popen",
            "subprocess.run",
            "subprocess.check_output",
            "os.fork",
            "os.system",
        ):
            yield node.lineno, called
        elif called.endswith(".Process") and not called.startswith("psutil."):
            targets = [ast.unparse(word.value) for word in node.keywords if word.arg == "target"]
            if targets != ["tied"]:
                yield node.lineno, called


SHORT = {
    (name, "subprocess.run")
    for name in (
        "tests/kit/served.py",
        "tests/kit/network.py",
        "bench/kit/sections.py",
        "bench/kit/sides.py",
        "bench/page.py",
    )
}
"""Programs that ask for a fact, or set one in a namespace, and end by themselves."""
OWN = {
    ("bench/gpu_failover.py", "subprocess.run"),
    ("bench/kit/failover_rank.py", "os.fork"),
    ("tests/kit/text_processes.py", "os.fork"),
}
"""The MPS daemon of a bench, ranks of a fork server that is bound itself and kills them at its end, and processes that
bind themselves to the life line of who asked for them."""


def test_nothing_is_started_that_could_outlive_the_test_or_bench() -> None:
    found = set()
    for folder in ("tests", "bench"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            if name != "tests/kit/bound.py":
                found |= {(name, called) for _, called in starts(ast.parse(file.read_text()))}
    assert found <= SHORT | OWN, "use tests.kit.bound"
