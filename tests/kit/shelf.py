"""Shelves for tests: what a page has is a function of its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, shake_128

import numpy as np

from elastic_ep.kv.names import NAME_BYTES, PageName
from elastic_ep.kv.shelf import Bytes, Shelf
from elastic_ep.kv.shelf_file import ShelfLayout


def name_of(number: int) -> PageName:
    return blake2b(str(number).encode(), digest_size=NAME_BYTES).digest()


def content(name: PageName, size: int) -> bytes:
    return shake_128(name).digest(size)


def page(name: PageName, size: int) -> Bytes:
    """[1, size]"""
    return np.frombuffer(content(name, size), np.uint8).reshape(1, size)


@contextmanager
def shelf_file(layout: ShelfLayout) -> Iterator[int]:
    fd = layout.create()
    try:
        yield fd
    finally:
        os.close(fd)


def put(shelf: Shelf, name: PageName) -> bool:
    return shelf.put([name], page(name, shelf.layout.page_bytes)) == 1


def got(shelf: Shelf, name: PageName) -> bool:
    """Whether the page is there. If so, it is the right one."""
    out = np.zeros((1, shelf.layout.page_bytes), np.uint8)
    if not shelf.get([name], out):
        return False
    assert out.tobytes() == content(name, shelf.layout.page_bytes), "another page than it was asked for"
    return True
