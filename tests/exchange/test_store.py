"""Keys that name incarnations, over a store of files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from elastic_ep.exchange.store import IncarnationStore, PeerGone, members_named
from elastic_ep.wire.messages import Member
from tests.kit.file_store import FileStore

LONG = timedelta(seconds=30)


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
    old, new, peer = (IncarnationStore(shared) for _ in range(3))
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
    store = IncarnationStore(
        FileStore(tmp_path), lambda member: member != Member(1, 7) or not wanted.is_set()
    )
    store.incarnations = {0: 3, 1: 7}
    gone = threading.Timer(0.01, wanted.set)
    gone.start()
    with pytest.raises(PeerGone):
        store.wait(["MOONCAKE_EP/1/0"], LONG)
    gone.join()


def test_a_wait_in_vain_ends_with_its_deadline_however_often_the_store_is_asked(tmp_path: Path) -> None:
    store = IncarnationStore(FileStore(tmp_path))
    store.incarnations = {0: 3, 1: 7}
    with pytest.raises(TimeoutError, match=r"MOONCAKE_EP.1\.7.0\.3"):
        store.wait(["MOONCAKE_EP/1/0"], timedelta(seconds=0.2))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("a/b/0.3/12.7", (Member(0, 3), Member(12, 7))),
        ("0.3/12.7", ()),
        ("a/0/12", ()),
        ("a/0.3/12.7/more", ()),
        ("", ()),
    ],
)
def test_whom_a_key_names(key: str, named: tuple[Member, ...]) -> None:
    assert members_named(key) == named


def test_the_keys_name_whom_they_lead_to() -> None:
    class Keys(FileStore):
        asked: Sequence[str] = ()

        def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
            self.asked = keys

    keys = Keys(Path())
    store = IncarnationStore(keys)
    store.incarnations = {0: 3, 1: 7}
    store.wait(["MOONCAKE_EP/1/0"], LONG)
    assert [members_named(key) for key in keys.asked] == [(Member(1, 7), Member(0, 3))]


def test_a_store_that_fails_is_not_asked_again(tmp_path: Path) -> None:
    """Only time may pass: whatever else a store raises would come again at once, for the whole deadline."""

    class Broken(FileStore):
        asked = 0

        def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
            self.asked += 1
            raise RuntimeError("event loop is closed")

    broken = Broken(tmp_path)
    with pytest.raises(RuntimeError, match="closed"):
        IncarnationStore(broken).wait(["key"], timedelta(seconds=0.05))
    assert broken.asked == 1
