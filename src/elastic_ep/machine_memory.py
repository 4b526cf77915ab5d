"""How much memory this machine has and still gives, limits of control groups included. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

NO_LIMIT = 2**63


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that the system and all control groups of this process still give. A limit that cannot be read is none."""
    groups = [ceiling - used for ceiling, used in _limits(root)]
    return max(0, min([_system(root, "MemAvailable"), *groups]))


def total_memory(root: Path = Path("/")) -> int:
    """Bytes that the system has, or that a control group of this process may have, if that is less."""
    return min([_system(root, "MemTotal"), *[ceiling for ceiling, _ in _limits(root)]])


def _system(root: Path, name: str) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == name and value.split():
            return int(value.split()[0]) * 1024
    return NO_LIMIT


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit, and what is used of it and cannot be given back, of each control group (version 2) from the inmost on."""
    top = root / "sys/fs/cgroup"
    path = next(
        (line[4:] for line in _read(root / "proc/self/cgroup").splitlines() if line[:4] == "0::/"), ""
    )
    inmost = top / path.strip("/")
    for group in (inmost, *inmost.parents):
        ceiling, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
        if ceiling.isdigit() and used.isdigit():
            yield int(ceiling), max(0, int(used) - _reclaimable(group))
        if group == top:
            return


def _reclaimable(group: Path) -> int:
    """Bytes of files that were read some time ago."""
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
