"""What is not computed, as somebody has it, is what would have been computed: tokens and logprobs keep their bits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.batch import CacheLayout
from elastic_ep.engine.ops_cpu.pages import CpuPages
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.step_runner import StreamMemory
from elastic_ep.kv.copier import Bytes
from elastic_ep.kv.names import PageName
from elastic_ep.kv.shelf_file import RegionCounts
from elastic_ep.placement import launch_placement
from elastic_ep.wire.messages import Assign, Token
from tests.engine.solo import TINY, SoloExchange, assign, drain, dummy_weights

LIMITS = EngineLimits(max_model_len=200, max_num_seqs=4, max_num_batched_tokens=24, num_pages=40)
PREFIX = [7 * number % 200 + 4 for number in range(70)]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "logprobs": 3, "max_tokens": 40}


class Memory:
    """A shelf of this process."""

    def __init__(self) -> None:
        self.pages: dict[PageName, bytes] = {}
        self._changed = threading.Condition()

    def find(self, names: Sequence[PageName]) -> int:
        return next((place for place, name in enumerate(names) if name not in self.pages), len(names))

    def missing(self, names: Sequence[PageName]) -> list[int]:
        return [place for place, name in enumerate(names) if name not in self.pages]

    def note_dropped(self, pages: int) -> None:
        raise AssertionError("too slow")

    @property
    def counts(self) -> RegionCounts:
        return RegionCounts(pages=len(self.pages))

    def put(self, names: Sequence[PageName], pages: Bytes) -> int:
        with self._changed:
            self.pages.update((name, page.tobytes()) for name, page in zip(names, pages, strict=True))
            self._changed.notify()
            return len(names)

    def wait_for(self, pages: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.pages) >= pages, timeout=60)

    def get(self, names: Sequence[PageName], out: Bytes) -> int:
        found = self.find(names)
        for place, name in enumerate(names[:found]):
            out[place] = np.frombuffer(self.pages[name], np.uint8)
        return found


def runner(memory: StreamMemory, limits: EngineLimits = LIMITS) -> ModelRunner:
    placement = launch_placement(1, TINY.moe_layers, TINY.moe.experts, 0)
    exchange = SoloExchange(TINY.moe.experts)
    return ModelRunner(limits, dummy_weights(TINY, placement), placement, 0, exchange, memory=memory)


def alone(request: Assign) -> list[Token]:
    """Computed by itself, with nothing to go on from."""
    one = runner(StreamMemory(share_prefixes=False))
    assert not one.add(request)
    return drain(one)[request.request_id]


REQUESTS = [
    assign(1, [*PREFIX, 11, 12], seed=5, **SAMPLED),
    assign(2, PREFIX, seed=6, **SAMPLED),
    assign(3, [*PREFIX[:40], 9], max_tokens=40, logprobs=1),
    assign(4, [*PREFIX, 11, 12], seed=5, **SAMPLED),
]


def test_a_prefix_in_common_is_computed_once_and_nobody_can_tell() -> None:
    shared = runner(StreamMemory())
    tokens: dict[int, list[Token]] = {}
    cached: dict[int, int] = {}
    for request in REQUESTS:
        assert not shared.add(request)
        while shared.has_work:
            result = shared.run_step(0, schedule=True)
            cached.update(result.cached)
            for token in result.tokens:
                tokens.setdefault(token.request_id, []).append(token)
    assert tokens == {request.request_id: alone(request) for request in REQUESTS}
    page = LIMITS.page_size
    assert cached == {2: 64, 3: 32, 4: len(REQUESTS[3].prompt) // page * page}


def test_without_prefix_caching_a_request_has_only_what_is_its_own() -> None:
    one = runner(StreamMemory(share_prefixes=False))
    for request in REQUESTS[:2]:
        one.add(request)
        while one.has_work:
            assert not one.run_step(0, schedule=True).cached


@pytest.mark.parametrize("lost_after", [1, 15, 30])
def test_a_lost_rank_costs_its_streams_no_bit_and_at_most_a_page(lost_after: int) -> None:
    shelf = Memory()
    first = runner(StreamMemory(share_prefixes=False, shelf=shelf))
    tokens: dict[int, list[Token]] = {}
    for request in REQUESTS[:3]:
        assert not first.add(request)
    while not all(len(tokens.get(one.request_id, ())) >= lost_after for one in REQUESTS[:3]):
        for token in first.run_step(0, schedule=True).tokens:
            tokens.setdefault(token.request_id, []).append(token)
    first.run_step(0, schedule=False)  # which hands the last pages to the copier
    full = {one.request_id: (len(one.prompt) + len(tokens[one.request_id]) - 1) // 16 for one in REQUESTS[:3]}
    shelf.wait_for(sum(full.values()))
    first.close()
    second = runner(StreamMemory(share_prefixes=False, shelf=shelf))
    for request in REQUESTS[:3]:
        emitted = [token.token for token in tokens[request.request_id]]
        moved = Assign(
            request.request_id, request.prompt, tuple(emitted), request.params, request.seed, request.choice
        )
        assert not second.add(moved)
    for request_id, more in drain(second, max_steps=200_000).items():
        tokens[request_id] += more
    second.close()
    assert tokens == {one.request_id: alone(one) for one in REQUESTS[:3]}
    assert second._scheduler.asked - second._scheduler.hits <= 16 * len(REQUESTS[:3])


def test_pages_move_between_cache_and_memory_unchanged() -> None:
    one = runner(StreamMemory())
    caches = one._ops.caches
    layout = CacheLayout.of(TINY.attention, LIMITS.page_size, LIMITS.cache_pages)
    for cache in caches:
        cache.normal_()
    mover = CpuPages(caches, layout)
    before = [cache.clone() for cache in caches]
    data = mover.read([3, 17]).copy()
    mover.write([17, 3], data)
    assert not any(bool((was == now).all()) for was, now in zip(before, caches, strict=True))
    mover.write([3, 17], data)
    assert all(bool((was == now).all()) for was, now in zip(before, caches, strict=True))
    assert mover.page_bytes == TINY.kv_page_bytes("cpu", LIMITS.page_size)
