"""Moves pages between a KV cache in a processor's memory and other memory, while the forward thread's steps run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.engine.ops_cpu.batch import CacheLayout

STAGING_BYTES = 1 << 20


class CpuPages:
    """`PageMover` for `caches`, one a layer, with rows as `CacheLayout` orders them.

    A page's bytes are [layers, planes, page, D].
    Pages that are read are full, and pages that are written nobody computes with: no step writes to either.
    """

    def __init__(self, caches: Sequence[torch.Tensor], layout: CacheLayout) -> None:
        planes = layout.planes
        self._caches = [
            cache.numpy().view(np.uint8).reshape(planes, layout.total_pages, -1) for cache in caches
        ]
        """[planes, pages, bytes]"""
        width = self._caches[0].shape[2]
        self.page_bytes = len(caches) * planes * width
        self.most = max(1, STAGING_BYTES // self.page_bytes)
        self._staging: npt.NDArray[np.uint8] = np.empty((self.most, self.page_bytes), np.uint8)
        self._parts = self._staging.reshape(self.most, len(caches), planes, width)

    def read(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        for row, page in enumerate(pages):
            for layer, cache in enumerate(self._caches):
                self._parts[row, layer] = cache[:, page]
        return self._staging[: len(pages)]

    def staging(self, n: int) -> npt.NDArray[np.uint8]:
        return self._staging[:n]

    def write(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        parts = data.reshape(len(pages), *self._parts.shape[1:])
        for row, page in enumerate(pages):
            for layer, cache in enumerate(self._caches):
                cache[:, page] = parts[row, layer]
