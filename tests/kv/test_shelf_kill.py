"""A rank is killed wherever it is while it puts pages on the shelf, and others read."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

import numpy as np

from elastic_ep.kv.shelf import Shelf
from elastic_ep.kv.shelf_file import ShelfLayout
from tests.kit.bound import tied
from tests.kit.shelf import content, name_of, shelf_file
from tests.kit.shelf_writer import write_for_ever

LAYOUT = ShelfLayout(regions=2, slots=6, page_bytes=1 << 18)
NAMES = 20
KILLS = 12
DEADLINE_S = 60.0


def test_a_writer_that_is_killed_leaves_whole_pages_or_none() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kit.shelf_writer"])
    random_ = random.Random(1)
    expected = [content(name_of(number), LAYOUT.page_bytes) for number in range(NAMES)]
    out = np.zeros((1, LAYOUT.page_bytes), np.uint8)
    got = 0

    def read_all(shelf: Shelf) -> int:
        whole = 0
        for number in range(NAMES):
            if shelf.get([name_of(number)], out):
                assert out.tobytes() == expected[number]
                whole += 1
        return whole

    with shelf_file(LAYOUT) as fd:
        reader = Shelf(fd, LAYOUT, 1)
        path = f"/proc/{os.getpid()}/fd/{fd}"
        for kill in range(KILLS):
            stored = LAYOUT.counts(fd)[0].stored + random_.randrange(1, 12)
            process = context.Process(
                target=tied, args=(write_for_ever, path, LAYOUT, 0, NAMES, random_.randrange(NAMES))
            )
            process.start()
            deadline = time.monotonic() + DEADLINE_S
            while LAYOUT.counts(fd)[0].stored < stored:
                assert time.monotonic() < deadline, "the writer does not come on"
                got += read_all(reader)
            process.kill()
            process.join(DEADLINE_S)
            heir = Shelf(fd, LAYOUT, 0)
            whole = read_all(reader)
            assert read_all(heir) == whole == heir.counts.pages, f"after kill {kill}"
            assert whole >= min(kill, LAYOUT.slots) - 1, "a kill costs one page at most"
        assert reader.counts.bad == 0
    assert got
