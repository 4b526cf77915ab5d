"""The shelf's file: where in it everything is, and how much memory it may take. Standard library only: the run process
makes it, and every rank inherits its descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

LINE = 64
"""Bytes of a cache line."""
HEADER_BYTES = LINE
BUCKET_ENTRIES = 8
"""That a bucket of the index has for each region."""

_PAGE = 4096
_MOST_SLOTS = 1 << 30
_BUCKET_BYTES = BUCKET_ENTRIES * 4
_PAGES_A_BUCKET = 4
"""At most, if they were spread evenly: half of a bucket. A page may be in either of two."""
_INDEX_BYTES = 2 * 2 * _BUCKET_BYTES // _PAGES_A_BUCKET
"""Of a page, at most: there are a power of two of buckets."""
_ALIGNMENTS = 5
"""Pages of the machine's memory, beside one a region, that are lost to alignment at most."""


class RegionCounts(NamedTuple):
    """Of one rank's region: what is there, and what the rank's present incarnation has done. In the file's order."""

    slots: int = 0
    """That have been used."""
    pages: int = 0
    """That are there."""
    stored: int = 0
    evicted: int = 0
    fetched: int = 0
    """Pages that the rank had from any region."""
    bad: int = 0
    """Pages of any region that the rank found to be other than their checksum says."""
    dropped: int = 0
    """Pages that the rank wanted to store, but could not keep up with."""


_COUNTS = struct.Struct(f"={len(RegionCounts._fields)}q")


class ShelfError(OSError):
    """The shelf cannot be made. The message says why."""


@dataclass(frozen=True, slots=True)
class ShelfLayout:
    """Byte offsets of the parts of the file, for `regions` of `slots` pages each.

    =========  =====================================  ===========================================
    part       shape                                  type
    =========  =====================================  ===========================================
    `counts`   [regions, LINE]                        `RegionCounts`, int64
    `tags`     [buckets, regions, BUCKET_ENTRIES]     uint32: of the index, bits of a page's name
    `places`   [buckets, regions, BUCKET_ENTRIES]     uint32: its slot, counted from 1; 0: none
    `headers`  [regions, slots], each region aligned  HEADER_BYTES
    `data`     [regions, slots, page_bytes]           a page's bytes
    =========  =====================================  ===========================================

    A region is written by its rank alone, of which only one incarnation lives. See kv/shelf.py.
    """

    regions: int
    slots: int
    page_bytes: int

    @classmethod
    def fit(cls, regions: int, page_bytes: int, total_bytes: int) -> ShelfLayout | None:
        """As many slots as there is room for; None if there is none for a page of each region."""
        left = total_bytes - (regions + _ALIGNMENTS) * _PAGE
        slots = min(left // regions // (page_bytes + HEADER_BYTES + _INDEX_BYTES), _MOST_SLOTS)
        return cls(regions, slots, page_bytes) if slots > 0 else None

    @property
    def buckets(self) -> int:
        """A power of two."""
        return 1 << (-(-self.slots // _PAGES_A_BUCKET) - 1).bit_length()

    @property
    def tags(self) -> int:
        return _aligned(self.regions * LINE)

    @property
    def places(self) -> int:
        return self.tags + _aligned(self.buckets * self.regions * _BUCKET_BYTES)

    @property
    def headers(self) -> int:
        return self.places + _aligned(self.buckets * self.regions * _BUCKET_BYTES)

    @property
    def region_headers(self) -> int:
        """Bytes from one region's headers to the next one's."""
        return _aligned(self.slots * HEADER_BYTES)

    @property
    def data(self) -> int:
        return self.headers + self.regions * self.region_headers

    @property
    def total(self) -> int:
        return self.data + self.regions * self.slots * self.page_bytes

    def header_at(self, region: int, slot: int) -> int:
        return self.headers + region * self.region_headers + slot * HEADER_BYTES

    def page_at(self, region: int, slot: int) -> int:
        return self.data + (region * self.slots + slot) * self.page_bytes

    def create(self) -> int:
        """A file descriptor of a new, empty shelf (not inheritable until the caller says so).

        Pages take memory only when they are written; what is looked up in is there from the start, so that no look is
        one for memory. Raises `ShelfError`.
        """
        try:
            fd = os.memfd_create("elastic_ep shelf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ShelfError(error.errno, f"no shared memory: {error.strerror}") from error
        try:
            os.ftruncate(fd, self.total)
            os.posix_fallocate(fd, 0, self.headers)
            # A file that shrinks under a mapping is a SIGBUS in every rank.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            os.close(fd)
            raise ShelfError(error.errno or errno.ENOMEM, error.strerror or "refused") from error
        return fd

    def counts(self, fd: int) -> list[RegionCounts]:
        """Of all regions, without a lock: each number is right, but they may be of different moments."""
        data = os.pread(fd, self.regions * LINE, 0)
        return [RegionCounts(*_COUNTS.unpack_from(data, region * LINE)) for region in range(self.regions)]


def _aligned(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE
