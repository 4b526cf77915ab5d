"""Moves pages between the KV cache on a GPU and pinned host memory, while the forward thread's steps run.

Why this needs no order with the forward thread's stream. A page that is read was committed: the host has waited for the
step that wrote it, so what runs on any stream afterwards sees it, and a committed page is never written again while
somebody holds it. A page that is written was free when it was taken: whoever had it gave it back after a step that the
host has waited for, and nobody computes with it before `write` has returned, which is after its bytes are there. What
steps do with pages that they do not hold (padding) touches the null page alone.

HAZARD: the thread that calls has device 0 as its current one, and what `torch.cuda.stream` puts back at its end is that
device's stream, which makes a context there, on another rank's GPU: so the device is entered first.

HAZARD: the first launch of a kernel may wait for all that runs on the device, and in a step that may be kernels which
wait for a peer. So all kernels of this are loaded once at the start, when nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.kv.page_table import NULL_PAGE

STAGING_BYTES = 32 << 20
"""Of pinned memory. A batch of so many bytes takes most of a millisecond over PCIe, some twenty times what it costs to
begin and to end one; to pin it takes milliseconds, and a dead rank's is given back as fast as if there were none."""
_WORD = torch.int64
"""What is copied, whatever the cache holds."""


class CudaPages:
    """`PageMover` for `cache` [layers, 2, pages, Hk, page, D]: a page's bytes are [layers, 2, Hk, page, D].

    Made on the forward thread, between two steps; then one thread at a time. Works on a processor as well. `read` and
    `write` wait for the device without the interpreter lock, and raise ValueError for pages that are not there.
    """

    def __init__(self, cache: torch.Tensor, staging_bytes: int = STAGING_BYTES) -> None:
        layers, sides, pages = cache.shape[:3]
        planes = layers * sides
        self._pages = pages
        self._planes: npt.NDArray[np.int64] = np.arange(planes, dtype=np.int64) * pages
        self._cache = cache.view(planes * pages, -1).view(_WORD)
        """A row is what a page has in one plane: the keys or the values of one layer."""
        words = self._cache.shape[1]
        self.page_bytes = planes * words * _WORD.itemsize
        self.most = max(1, staging_bytes // self.page_bytes)
        on_device = cache.is_cuda
        rows = self.most * planes
        self._staged = torch.empty(rows, words, dtype=_WORD, device=cache.device)
        self._host = torch.empty(rows, words, dtype=_WORD, pin_memory=on_device)
        self._bytes = self._host.numpy().view(np.uint8).reshape(self.most, self.page_bytes)
        self._numbers = torch.empty(rows, dtype=torch.int64, device=cache.device)
        self._host_numbers = torch.empty(rows, dtype=torch.int64, pin_memory=on_device)
        self._stream = torch.cuda.Stream(cache.device) if on_device else None
        self._ended = torch.cuda.Event(blocking=True) if on_device else None
        if self._stream is not None:  # the cache may just have been made
            self._stream.wait_stream(torch.cuda.current_stream(cache.device))
        self.write([NULL_PAGE], self.read([NULL_PAGE]))

    def read(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """[n, page_bytes] of at most `most` pages, valid until the next call."""
        numbers = self._host_rows(pages)
        with self._aside():
            rows = self._device_rows(numbers)
            staged = self._staged[: len(rows)]
            torch.index_select(self._cache, 0, rows, out=staged)
            self._host[: len(rows)].copy_(staged, non_blocking=True)
        return self._bytes[: len(pages)]

    def staging(self, n: int) -> npt.NDArray[np.uint8]:
        """[n, page_bytes] where data for `write` is best put: from there it is not copied once more."""
        if not 0 <= n <= self.most:
            raise ValueError(f"{n} pages at once, but there is room for {self.most}")
        return self._bytes[:n]

    def write(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """`data` [n, page_bytes] goes to `pages`, each named once. Returns when it is there."""
        numbers = self._host_rows(pages)
        place = self.staging(len(pages))
        if data.shape != place.shape:
            raise ValueError(f"{data.shape} bytes for {len(pages)} pages of {self.page_bytes}")
        if data.ctypes.data != place.ctypes.data:
            np.copyto(place, data)
        with self._aside():
            rows = self._device_rows(numbers)
            staged = self._staged[: len(rows)]
            staged.copy_(self._host[: len(rows)], non_blocking=True)
            self._cache.index_copy_(0, rows, staged)

    def _host_rows(self, pages: Sequence[int]) -> torch.Tensor:
        """The rows of all pages, one page after the other.

        HAZARD: a row that is not there would be an error of the device, which no process survives.
        """
        named = np.asarray(pages, dtype=np.int64)
        if len(named) > self.most:
            raise ValueError(f"{len(named)} pages at once, but there is room for {self.most}")
        if len(named) and not 0 <= named.min() <= named.max() < self._pages:
            raise ValueError(f"pages {named.min()} to {named.max()} of a cache of {self._pages}")
        rows = self._host_numbers[: named.size * self._planes.size]
        np.add(named[:, None], self._planes, out=rows.numpy().reshape(named.size, self._planes.size))
        return rows

    def _device_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        rows = self._numbers[: len(numbers)]
        rows.copy_(numbers, non_blocking=True)
        return rows

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On this object's stream, until all of it is done, whatever it raises: the memory in between is used again.

        The cache may have been made in inference mode, and is written in no other.
        """
        with torch.inference_mode():
            if self._stream is None or self._ended is None:
                yield
                return
            with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._ended.record()
                    self._ended.synchronize()
