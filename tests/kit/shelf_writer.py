"""A rank that does nothing but put pages on the shelf, until it is killed."""

from __future__ import annotations

import os

import numpy as np

from elastic_ep.kv.shelf import Shelf
from elastic_ep.kv.shelf_file import ShelfLayout
from tests.kit.shelf import content, name_of


def write_for_ever(path: str, layout: ShelfLayout, region: int, names: int, start: int) -> None:
    """Pages of `names` names in turn, from `start` on. `path` is the shelf's file."""
    fd = os.open(path, os.O_RDWR)
    shelf = Shelf(fd, layout, region)
    pages = [np.frombuffer(content(name_of(number), layout.page_bytes), np.uint8) for number in range(names)]
    while True:
        start = (start + 1) % names
        shelf.put([name_of(start)], pages[start][None])
