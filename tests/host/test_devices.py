"""What --device finds out without torch, and that each thing missing is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ep.config import ALL2ALL_BACKENDS, ConfigError
from elastic_ep.exchange.mooncake_needs import CPU_WHEEL, CUDA_WHEEL
from elastic_ep.host.devices import Machine, choose_device

HIDDEN = 256
INSTALLED = {"torch": "2.11.0+cu130", CUDA_WHEEL: "0.3.14"}


def machine(
    root: Path,
    *,
    gpu: bool = True,
    driver: str = "580.159.04",
    installed: dict[str, str] = INSTALLED,
    verbs: bool = True,
    nvcc: str = "nvcc",
    environment: dict[str, str] | None = None,
) -> Machine:
    """`nvcc` is the name by which a program is found."""
    (root / "dev").mkdir()
    if gpu:
        (root / "dev" / "nvidia0").touch()
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\nGCC version: gcc 12.3.0\n"
    )
    return Machine(root, installed.get, lambda library: verbs, environment or {}, {nvcc: "/found"}.get)


@pytest.mark.parametrize("backend", ALL2ALL_BACKENDS)
def test_a_whole_machine_is_taken(tmp_path: Path, backend: str) -> None:
    whole = machine(tmp_path, environment={"CUDA_VISIBLE_DEVICES": "0,-1"})
    assert [choose_device(asked, backend, HIDDEN, whole) for asked in ("auto", "cuda", "cpu")] == [
        "cuda",
        "cuda",
        "cpu",
    ]


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ({"gpu": False}, "no NVIDIA GPU.*--device cpu"),
        ({"driver": "535.54.03"}, "535, too old.*580"),
        ({"installed": {**INSTALLED, "torch": "2.13.0+cpu"}}, r"2\.13\.0\+cpu has no CUDA"),
        ({"installed": {"torch": "2.11.0"}}, f"not installed: pip install {CUDA_WHEEL}"),
        ({"installed": {"torch": "2.11.0", CPU_WHEEL: "0.3.13"}}, f"{CPU_WHEEL}.*uninstall.*{CUDA_WHEEL}"),
        ({"verbs": False}, "libibverbs1"),
        ({"nvcc": ""}, "nvcc is missing.*CUDA_HOME or PATH"),
        ({"environment": {"NVCC": "/gone/nvcc", "CUDA_HOME": "/cuda"}}, "nvcc is missing"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides every GPU: unset it, or use --device cpu"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "-1,0"}}, "hides every GPU"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, lacking: dict[str, object], said: str) -> None:
    lacks = machine(tmp_path, **lacking)  # type: ignore[arg-type]  # of several types
    with pytest.raises(ConfigError, match=f"^--device cuda: .*{said}") as refused:
        choose_device("cuda", "mooncake", HIDDEN, lacks)
    assert "\n" not in str(refused.value)
    assert choose_device("auto", "mooncake", HIDDEN, lacks) == "cpu"


@pytest.mark.parametrize(
    ("environment", "nvcc"),
    [
        ({}, "nvcc"),
        ({"CUDA_HOME": "/cuda"}, "nvcc"),
        ({"CUDA_HOME": "/cuda", "CUDA_PATH": "/gone"}, "/cuda/bin/nvcc"),
        ({"CUDA_PATH": "/cuda"}, "/cuda/bin/nvcc"),
        ({"NVCC": "/my/nvcc"}, "/my/nvcc"),
        ({"MOONCAKE_EP_JIT_NVCC": "my-nvcc", "NVCC": "/gone", "CUDA_HOME": "/gone"}, "my-nvcc"),
    ],
)
def test_nvcc_is_looked_for_where_mooncake_does(
    tmp_path: Path, environment: dict[str, str], nvcc: str
) -> None:
    assert (
        choose_device("cuda", "mooncake", HIDDEN, machine(tmp_path, environment=environment, nvcc=nvcc))
        == "cuda"
    )


def test_peers_memory_needs_nothing_of_mooncake(tmp_path: Path) -> None:
    bare = machine(tmp_path, installed={"torch": "2.11.0"}, verbs=False, nvcc="")
    assert choose_device("cuda", "peer-memory", 100, bare) == "cuda"


def test_a_hidden_size_that_the_exchange_cannot_carry(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hidden size 100.*multiple of 128"):
        choose_device("cuda", "mooncake", 100, machine(tmp_path))
