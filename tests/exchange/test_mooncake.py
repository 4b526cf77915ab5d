"""What of the exchange over Mooncake can be seen without a GPU."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.file_store import FileStore
from elastic_ep.exchange.mooncake import (
    MooncakeExchange,
    MooncakeUnavailable,
    PeerGone,
    _IncarnationStore,
    load_buffer_class,
)
from elastic_ep.exchange.step_words import NOT_BEGUN, StepWords
from elastic_ep.messages import Member

LONG = timedelta(seconds=30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_refusal_says_so() -> None:
    with pytest.raises(MooncakeUnavailable, match="no CUDA device"):
        load_buffer_class()


def test_a_hidden_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shape = ExchangeShape(2, 4, 100, 2, 2, 2)
    with pytest.raises(ValueError, match="multiple of 128"):
        MooncakeExchange(shape, Member(0, 0), FileStore(tmp_path))


def test_a_wait_ends_when_the_last_key_appears(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.set("a/0/1", b"first")
    late = threading.Thread(target=store.set, args=("a/1/0", b"second"))
    late.start()
    store.wait(["a/0/1", "a/1/0"], LONG)
    late.join()
    assert store.multi_get(["a/0/1", "a/1/0"]) == [b"first", b"second"]
    assert store.delete_key("a/0/1")
    assert not store.delete_key("a/0/1")
    with pytest.raises(TimeoutError, match="a/0/1"):
        store.wait(["a/0/1", "a/1/0"], timedelta(0))


def test_what_an_earlier_incarnation_left_is_never_read(tmp_path: Path) -> None:
    shared = FileStore(tmp_path)
    old, new, peer = (_IncarnationStore(shared) for _ in range(3))
    old.incarnations = {0: 3, 1: 0}
    new.incarnations = {0: 4, 1: 0}
    peer.incarnations = {0: 4, 1: 0}
    old.set("MOONCAKE_EP/0/1", b"stale")
    with pytest.raises(TimeoutError):
        peer.wait(["MOONCAKE_EP/0/1"], timedelta(0))
    new.set("MOONCAKE_EP/0/1", b"fresh")
    assert peer.multi_get(["MOONCAKE_EP/0/1"]) == [b"fresh"]


def test_a_wait_for_a_member_that_is_gone_ends_at_once(tmp_path: Path) -> None:
    wanted = threading.Event()
    store = _IncarnationStore(
        FileStore(tmp_path), lambda member: member != Member(1, 7) or not wanted.is_set()
    )
    store.incarnations = {0: 3, 1: 7}
    gone = threading.Timer(0.01, wanted.set)
    gone.start()
    with pytest.raises(PeerGone):
        store.wait(["MOONCAKE_EP/1/0"], LONG)
    gone.join()


def test_step_words_are_seen_by_all_and_a_new_incarnation_has_begun_nothing(tmp_path: Path) -> None:
    words = [StepWords(tmp_path, 3, rank) for rank in range(3)]
    words[1].say(12)
    assert [words[0].of(rank) for rank in range(3)] == [NOT_BEGUN, 12, NOT_BEGUN]
    StepWords(tmp_path, 3, 1)
    assert words[2].of(1) == NOT_BEGUN
