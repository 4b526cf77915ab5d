"""Pages out of the KV cache and back into it: the bytes, and nothing but the pages that were named."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_ep.engine.ops_cuda.pages import CudaPages

LAYERS, PAGES, HEADS, PAGE, DIM = 3, 11, 2, 4, 8


def cache_on(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Every element tells its place."""
    shape = (LAYERS, 2, PAGES, HEADS, PAGE, DIM)
    numbers = torch.randperm(LAYERS * 2 * PAGES * HEADS * PAGE * DIM).view(shape)
    return numbers.to(torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype).to(device)


def bytes_of(cache: torch.Tensor, page: int) -> np.ndarray:
    return cache[:, :, page].cpu().contiguous().view(torch.uint8).numpy().reshape(-1)


some_pages = st.lists(st.integers(0, PAGES - 1), max_size=5, unique=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(
    read=some_pages, moves=st.lists(st.tuples(st.permutations(range(PAGES)), st.integers(0, 5)), max_size=3)
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_move_whole_and_no_other_changes(
    device: torch.device, dtype: torch.dtype, read: list[int], moves: list[tuple[list[int], int]]
) -> None:
    cache = cache_on(device, dtype)
    mover = CudaPages(cache, staging_bytes=5 * LAYERS * 2 * HEADS * PAGE * DIM * dtype.itemsize)
    assert mover.most == 5
    expected = [bytes_of(cache, page) for page in range(PAGES)]
    for order, count in [(read, len(read)), *moves]:
        sources, targets = order[:count], order[len(order) - count :]
        if count > len(order) // 2:
            targets = sources
        data = mover.read(sources)
        assert data.shape == (count, mover.page_bytes)
        for row, page in zip(data, sources, strict=True):
            assert (row == expected[page]).all()
        mover.write(targets, data if count % 2 else data.copy())
        for target, before in zip(targets, [expected[page] for page in sources], strict=True):
            expected[target] = before
    assert all((bytes_of(cache, page) == expected[page]).all() for page in range(PAGES))


def test_a_page_larger_than_the_staging_memory_moves_alone(device: torch.device) -> None:
    cache = cache_on(device)
    mover = CudaPages(cache, staging_bytes=1)
    assert mover.most == 1
    place = mover.staging(1)
    place[:] = 7
    mover.write([3], place)
    assert (bytes_of(cache, 3) == 7).all()
    assert (mover.read([3]) == 7).all()


def test_what_is_not_there_is_refused_before_the_device_hears_of_it(device: torch.device) -> None:
    cache = cache_on(device)
    before = cache.clone()
    mover = CudaPages(cache, staging_bytes=2 * LAYERS * 2 * HEADS * PAGE * DIM * 2)
    for pages in ([PAGES], [-1], [1, PAGES + 5], [1, 2, 3]):
        data = np.zeros((len(pages), mover.page_bytes), np.uint8)
        with pytest.raises(ValueError, match="pages"):
            mover.read(pages)
        with pytest.raises(ValueError, match="pages"):
            mover.write(pages, data)
    for wrong in (np.zeros((1, mover.page_bytes - 1), np.uint8), np.zeros((2, mover.page_bytes), np.uint8)):
        with pytest.raises(ValueError, match="bytes for"):
            mover.write([1], wrong)
    with pytest.raises(ValueError, match="room for 2"):
        mover.staging(3)
    assert torch.equal(cache.view(torch.int16), before.view(torch.int16))


def test_a_cache_made_in_inference_mode_is_written_from_another_thread(device: torch.device) -> None:
    """As in a rank: the forward thread makes the cache and the mover, the copier's thread uses it."""
    with torch.inference_mode():
        cache = torch.zeros(LAYERS, 2, PAGES, HEADS, PAGE, DIM, dtype=torch.bfloat16, device=device)
        mover = CudaPages(cache)
    failed: list[BaseException] = []

    def move() -> None:
        try:
            mover.write([2], np.full((1, mover.page_bytes), 9, np.uint8))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    thread.join(60)
    assert not failed
    assert (bytes_of(cache, 2) == 9).all()
