"""How much of a checkpoint the kernel holds in memory: whether to read it, or to ask peers. Standard library only."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def cached_share(path: Path) -> float:
    """The share, 0 to 1, of the bytes of all safetensors files in the folder `path` that lie in the page cache.

    Raises OSError. HAZARD: Linux says "all" of files that the caller neither owns nor may write.
    """
    counts = [_pages(file) for file in sorted(path.glob("*.safetensors"))]
    total = sum(pages for _, pages in counts)
    return sum(resident for resident, _ in counts) / total if total else 0.0


def _pages(file: Path) -> tuple[int, int]:
    """(resident, all) pages of `file`."""
    size = file.stat().st_size
    if size == 0:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    states = ctypes.create_string_buffer(pages)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    # Copy-on-write, since ctypes tells the address of writable memory only; nothing is touched.
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.addressof(first), size, states)
        del first  # a map that something points into cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(file))
    return sum(byte & 1 for byte in states.raw), pages
