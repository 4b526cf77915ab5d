"""Files out of the kernel's memory, for tests and benches."""

from __future__ import annotations

import os
from pathlib import Path


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget the clean pages of the safetensors files in `path`; those mapped somewhere stay."""
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
