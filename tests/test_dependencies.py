"""Who may import whom, and that the run process never imports torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.kit.bound import run

SOURCE = Path(__file__).parent.parent / "src" / "elastic_ep"
RANK_ONLY = {"rank/forward.py", "rank/engine.py", "rank/process.py", "host/fork_server.py"}
SOCKETS = {"socket", "zmq", "anyio", "asyncio", "aiohttp"}
FORBIDDEN = {
    "machines": {*SOCKETS, "torch", "numpy", "structlog", "time", "random", "threading", "logging"},
    "exchange": SOCKETS,
    "model": SOCKETS,
    "state": SOCKETS,
    "control": {"aiohttp"},
    "api": {"torch", "zmq"},
}


def imported(file: Path) -> set[str]:
    """Absolute module names that `file` imports, those for type checking alone left out."""
    found = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files(folder: str) -> list[Path]:
    return sorted((SOURCE / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_packages_keep_their_direction(folder: str) -> None:
    for file in files(folder):
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & FORBIDDEN[folder], file


@pytest.mark.parametrize(
    "name",
    [
        "messages.py", "slot_messages.py", "store_messages.py", "config.py", "placement.py", "codec.py",
        "privacy.py",        "weights/layout.py",
    ],
)  # fmt: skip
def test_the_base_uses_the_standard_library_alone(name: str) -> None:
    for module in imported(SOURCE / name):
        top = module.split(".")[0]
        assert top in sys.stdlib_module_names or module in {
            "elastic_ep.wire.codec",
            "elastic_ep.wire.messages",
            "elastic_ep.wire.slot_messages",
            "elastic_ep.wire.store_messages",
            "elastic_ep.placement",
            "elastic_ep.wire.privacy",
        }, module


def test_machines_import_no_shell_and_transitions_only_in_tables() -> None:
    for file in files("machines"):
        for module in imported(file):
            assert not module.startswith(
                ("elastic_ep.control", "elastic_ep.api", "elastic_ep.exchange", "elastic_ep.model")
            )
            assert module.split(".")[0] != "transitions" or file.name == "tables.py", file


def test_torch_in_the_control_plane_is_the_ranks_alone() -> None:
    for file in files("control"):
        tops = {name.split(".")[0] for name in imported(file)}
        assert "torch" not in tops or str(file.relative_to(SOURCE)) in RANK_ONLY, file


@pytest.mark.parametrize("entries", ["elastic_ep.run, elastic_ep.serve", "elastic_ep.gateway.text_process"])
def test_the_run_process_and_the_text_process_never_import_torch(entries: str) -> None:
    code = f"import sys, {entries}; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], 60).returncode == 0
