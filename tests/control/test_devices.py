"""What --device finds out without torch, and that each thing missing is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ep.config import ConfigError
from elastic_ep.control.devices import CPU_WHEEL, CUDA_WHEEL, Machine, choose_device

HIDDEN = 256
INSTALLED = {"torch": "2.11.0+cu130", CUDA_WHEEL: "0.3.14"}


def machine(
    root: Path,
    *,
    gpu: bool = True,
    driver: str = "580.159.04",
    installed: dict[str, str] = INSTALLED,
    verbs: bool = True,
) -> Machine:
    (root / "dev").mkdir()
    if gpu:
        (root / "dev" / "nvidia0").touch()
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\nGCC version: gcc 12.3.0\n"
    )
    return Machine(root, installed.get, lambda library: verbs)


def test_a_whole_machine_is_taken(tmp_path: Path) -> None:
    whole = machine(tmp_path)
    assert [choose_device(asked, HIDDEN, whole) for asked in ("auto", "cuda", "cpu")] == [
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
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, lacking: dict[str, object], said: str) -> None:
    lacks = machine(tmp_path, **lacking)  # type: ignore[arg-type]  # of several types
    with pytest.raises(ConfigError, match=f"^--device cuda: .*{said}") as refused:
        choose_device("cuda", HIDDEN, lacks)
    assert "\n" not in str(refused.value)
    assert choose_device("auto", HIDDEN, lacks) == "cpu"


def test_a_hidden_size_that_the_exchange_cannot_carry(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hidden size 100.*multiple of 128"):
        choose_device("cuda", 100, machine(tmp_path))
