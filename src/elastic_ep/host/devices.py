"""Which device the ranks will use, found out without torch: the run process must know before any rank exists."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from elastic_ep.config import ConfigError
from elastic_ep.exchange.mooncake_needs import CPU_WHEEL, CUDA_WHEEL, HIDDEN_MULTIPLE

OLDEST_DRIVER = 580
"""The first with CUDA 13."""

HIDES_ALL = ("", "-1", "NoDevFiles")
"""As the first of CUDA_VISIBLE_DEVICES: CUDA shows those before the first that it does not know."""


def _distribution(name: str) -> str | None:
    """The installed version."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Machine:
    """What is looked at; a test has its own."""

    root: Path = Path("/")
    version_of: Callable[[str], str | None] = _distribution
    loads: Callable[[str], bool] = _loads
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    find_program: Callable[[str], str | None] = shutil.which

    def why_not_cuda(self, all2all_backend: str) -> str | None:
        """One line that says what is missing and what to do, or None."""
        if not any(self.root.glob("dev/nvidia[0-9]*")):
            return "no NVIDIA GPU here (no /dev/nvidia0); use --device cpu"
        shown = self.environment.get("CUDA_VISIBLE_DEVICES")
        if shown is not None and shown.strip().split(",")[0] in HIDES_ALL:
            return f"CUDA_VISIBLE_DEVICES={shown!r} hides every GPU: unset it, or use --device cpu"
        driver = self._driver()
        if driver is not None and driver < OLDEST_DRIVER:
            return f"the NVIDIA driver is {driver}, too old for CUDA 13: install {OLDEST_DRIVER} or newer"
        torch = self.version_of("torch")
        if torch is None or "+cpu" in torch:
            return f"torch {torch or 'is missing; it'} has no CUDA: install a build of torch with CUDA 13"
        return self._why_not_mooncake() if all2all_backend == "mooncake" else None

    def _why_not_mooncake(self) -> str | None:
        if self.version_of(CUDA_WHEEL) is None:
            if self.version_of(CPU_WHEEL) is not None:
                return f"{CPU_WHEEL} is installed, which has no EP: pip uninstall it, then pip install {CUDA_WHEEL}"
            return f"Mooncake is not installed: pip install {CUDA_WHEEL}"
        if not self.loads("libibverbs.so.1"):
            return "the library libibverbs is missing: apt install libibverbs1 ibverbs-providers"
        if not self._has_nvcc():
            return "nvcc is missing, with which Mooncake compiles its kernels: install CUDA 13, set CUDA_HOME or PATH"
        return None

    def _has_nvcc(self) -> bool:
        """Looks where Mooncake 0.3.14 does: it ships no dispatch and no combine, only their sources."""
        said = self.environment.get
        named = said("MOONCAKE_EP_JIT_NVCC") or said("NVCC")
        home = said("CUDA_HOME") or said("CUDA_PATH")
        candidates = [named] if named else [f"{home}/bin/nvcc", "nvcc"] if home else ["nvcc"]
        return any(map(self.find_program, candidates))

    def _driver(self) -> int | None:
        try:
            text = (self.root / "proc/driver/nvidia/version").read_text()
        except OSError:
            return None
        found = re.search(r"\b(\d{3,4})\.\d+(\.\d+)?\b", text)
        return int(found.group(1)) if found else None


def this_machine() -> str:
    """A name of the kernel that runs here, since it was started: the same in all its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def choose_device(asked: str, all2all_backend: str, hidden_size: int, machine: Machine | None = None) -> str:
    """ "cpu" or "cuda" for `--device`; auto takes a GPU only where all that it needs is there. Raises `ConfigError`."""
    machine = machine or Machine()
    if asked == "cpu":
        return "cpu"
    missing = machine.why_not_cuda(all2all_backend)
    if missing is None and all2all_backend == "mooncake" and hidden_size % HIDDEN_MULTIPLE:
        missing = (
            f"the model's hidden size {hidden_size} is no multiple of {HIDDEN_MULTIPLE}, as Mooncake needs; "
            "leave --all2all-backend out"
        )
    if missing is None:
        return "cuda"
    if asked == "cuda":
        raise ConfigError(f"--device cuda: {missing}")
    return "cpu"
