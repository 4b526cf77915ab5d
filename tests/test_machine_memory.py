"""How much memory there is, on machines and in control groups of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ep.machine_memory import NO_LIMIT, available_memory, total_memory

GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {40 << 20} kB\n"}
GROUP = {
    "proc/self/cgroup": "0::/a.slice/b.service\n",
    "sys/fs/cgroup/a.slice/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/a.slice/memory.current": f"{5 * GIB}\n",
    "sys/fs/cgroup/a.slice/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 9\n",
    "sys/fs/cgroup/a.slice/b.service/memory.max": "max\n",
    "sys/fs/cgroup/a.slice/b.service/memory.current": f"{GIB}\n",
}
CONTAINER = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
    "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "available", "total"),
    [
        ({}, NO_LIMIT, NO_LIMIT),
        (MEMINFO, 40 * GIB, 64 * GIB),
        (MEMINFO | GROUP, 4 * GIB, 8 * GIB),
        (MEMINFO | CONTAINER, 0, 2 * GIB),
        (MEMINFO | CONTAINER | {"sys/fs/cgroup/memory.max": "max\n"}, 40 * GIB, 64 * GIB),
        (MEMINFO | {"proc/self/cgroup": "7:memory:/x\n1:name=systemd:/\n"}, 40 * GIB, 64 * GIB),
    ],
    ids=(
        "nothing to read",
        "no group",
        "in a group with a limit further out",
        "full",
        "no limit",
        "version 1",
    ),
)
def test_the_narrowest_limit_counts(
    tmp_path: Path, files: dict[str, str], available: int, total: int
) -> None:
    root = machine(tmp_path, files)
    assert (available_memory(root), total_memory(root)) == (available, total)


def test_this_machine_has_some() -> None:
    assert 0 < available_memory() <= total_memory() < NO_LIMIT
