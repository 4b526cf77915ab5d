"""Who may import whom, and that the run process never imports torch. Folders are listed here, or fail."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.kit.bound import run

SOURCE = Path(__file__).parent.parent / "src" / "elastic_ep"

ARROWS: dict[str, set[str]] = {
    "wire": {"placement"},
    "machines": {"wire", "placement", "timing"},
    "event_log": {"machines", "wire", "config"},
    "film": {"event_log", "host", "wire"},
    "fused": set(),
    "exchange": {"fused", "wire", "config", "kernel", "machine_memory"},
    "models": {"exchange", "placement"},
    "weights": {"models", "wire", "placement", "timing"},
    "kv": set(),
    "guided": {"wire"},
    "engine": {
        "exchange", "fused", "guided", "kv", "machines", "models", "weights", "wire", "config", "kernel", "placement",
    },
    "host": {"event_log", "exchange", "machines", "wire", "config", "logs", "timing", "titles"},
    "rank": {
        "engine", "event_log", "exchange", "fused", "guided", "host", "kv", "machines", "models", "weights", "wire",
        "config", "logs", "placement", "timing", "titles",
    },
    "group": {
        "event_log", "exchange", "host", "machines", "weights", "wire", "config", "placement",
        "timing",
    },
    "gateway": {"group", "guided", "host", "machines", "models", "wire", "titles"},
}  # fmt: skip
"""A folder, and what it may import besides itself: folders, and modules of the top level."""
TOP = {
    "agent", "charts", "command_line", "config", "first_host", "foreign_flags", "joined", "kernel", "logs", "loop_watch",
    "machine_memory", "on_ray", "placement", "placement_picture", "plan", "precision", "replay", "run", "serve", "timing",
    "titles",
}  # fmt: skip
"""The commands, what they are made of, and what all may use."""
BASE: dict[str, set[str]] = {
    "config": {"kv", "placement", "timing", "wire"},
    "foreign_flags": {"config"},
    "kernel": set(),
    "logs": {"config"},
    "loop_watch": {"event_log"},
    "machine_memory": set(),
    "placement": set(),
    "timing": set(),
    "titles": {"wire"},
}
"""Of these, what folders use, and what it may import."""

IO = {"socket", "zmq", "anyio", "asyncio", "aiohttp"}
FORBIDDEN = {
    "machines": {*IO, "torch", "numpy", "structlog", "time", "random", "threading", "logging"},
    "models": IO,
    "exchange": IO,
    "engine": IO,
    "weights": IO,
    "kv": {*IO, "torch"},
    "wire": {"torch", "numpy", "aiohttp"},
    "guided": {*IO, "torch"},
    "group": {"torch", "numpy", "aiohttp"},
    "gateway": {"torch", "zmq"},
    "event_log": {"torch", "zmq", "aiohttp"},
    "film": {"torch", "zmq", "aiohttp"},
}
"""Libraries that a folder does without."""
TORCH_IN_HOST = {"fork_server.py"}


def modules(tree: ast.AST) -> set[str]:
    """Absolute names that are imported, those for type checking alone left out; of `from a import b` also "a.b"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported(file: Path) -> set[str]:
    return modules(ast.parse(file.read_text()))


def files(folder: str) -> list[Path]:
    found = sorted((SOURCE / folder).rglob("*.py"))
    assert len(found) > 1, f"{folder}: nothing to look at"
    return found


def parts(names: set[str]) -> set[str]:
    """Folders and top modules of this package among imported names."""
    known = set(ARROWS) | TOP
    return {
        part for name in names if name.startswith("elastic_ep.") and (part := name.split(".")[1]) in known
    }


def test_every_folder_and_every_module_of_the_top_is_listed() -> None:
    folders = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ARROWS)
    assert {path.stem for path in SOURCE.glob("*.py")} == TOP | {"__init__"}


@pytest.mark.parametrize("folder", sorted(ARROWS))
def test_arrows_between_folders(folder: str) -> None:
    used = set()
    for file in files(folder):
        foreign = parts(imported(file)) - {folder}
        assert foreign <= ARROWS[folder], f"{file}: {foreign - ARROWS[folder]}"
        used |= foreign
    assert used == ARROWS[folder], "an arrow that nothing needs any more"


@pytest.mark.parametrize("name", sorted(BASE))
def test_arrows_of_the_base(name: str) -> None:
    assert parts(imported(SOURCE / f"{name}.py")) == BASE[name]


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_libraries_that_a_folder_does_without(folder: str) -> None:
    for file in files(folder):
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & FORBIDDEN[folder], file


def test_transitions_is_imported_by_the_tables_alone() -> None:
    importing = {
        file.name for file in files("machines") if "transitions" in {n.split(".")[0] for n in imported(file)}
    }
    assert importing == {"tables.py"}


def test_torch_in_the_host_is_the_fork_servers_alone() -> None:
    importing = {file.name for file in files("host") if "torch" in {n.split(".")[0] for n in imported(file)}}
    assert importing <= TORCH_IN_HOST


@pytest.mark.parametrize("entries", ["elastic_ep.run, elastic_ep.serve", "elastic_ep.gateway.text_process"])
def test_the_run_process_and_the_text_process_never_import_torch(entries: str) -> None:
    """Nor numpy, as a start waits for imports."""
    code = f"import sys, {entries}; sys.exit(len({{'torch', 'numpy'}} & set(sys.modules)))"
    assert run([sys.executable, "-c", code], 60).returncode == 0
