"""What the run process keeps of the ranks' keys and waits, and that nothing outlives the members it is about."""

from __future__ import annotations

import pytest

from elastic_ep.group.store_table import StoreTable
from elastic_ep.wire.messages import Member, ToRank
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet, StoreValue

A, B, C = Member(0, 1), Member(1, 1), Member(2, 1)
TO_B = "P/0.1/1.1"
SECRET = b"an address"


class Table(StoreTable):
    """With what it has sent and noted."""

    def __init__(self) -> None:
        self.sent: list[tuple[Member, ToRank]] = []
        self.notes: list[tuple[str, dict[str, object]]] = []
        super().__init__(
            lambda member, message: self.sent.append((member, message)),
            lambda kind, /, **facts: self.notes.append((kind, facts)),
        )

    def set(self, member: Member, key: str, value: bytes = SECRET) -> None:
        self.heard(member, StoreSet(key, value))

    def get(self, member: Member, *keys: str) -> None:
        self.heard(member, StoreGet(keys))

    def delete(self, member: Member, key: str) -> None:
        self.heard(member, StoreDelete(key))


@pytest.fixture
def table() -> Table:
    return Table()


def test_a_value_that_is_there_is_told_at_once(table: Table) -> None:
    table.set(A, TO_B)
    assert table.sent == []
    table.get(B, TO_B)
    assert table.sent == [(B, StoreValue(TO_B, SECRET))]
    assert not table.wanted


def test_a_value_that_is_wanted_is_told_when_it_is_set_and_once(table: Table) -> None:
    for _ in range(2):
        table.get(B, TO_B)
    table.get(C, "other", TO_B)
    assert table.sent == []
    table.set(A, TO_B)
    assert table.sent == [(B, StoreValue(TO_B, SECRET)), (C, StoreValue(TO_B, SECRET))]
    table.set(A, TO_B)
    assert len(table.sent) == 2
    assert table.wanted == {"other"}


def test_the_last_value_counts_and_a_deleted_one_is_wanted_again(table: Table) -> None:
    table.set(A, TO_B, b"first")
    table.set(A, TO_B, b"last")
    table.get(B, TO_B)
    assert table.sent == [(B, StoreValue(TO_B, b"last"))]
    table.delete(B, TO_B)
    table.delete(B, TO_B)
    table.get(B, TO_B)
    assert len(table.sent) == 1
    assert table.wanted == {TO_B}


def test_with_a_member_go_its_keys_and_those_that_name_it(table: Table) -> None:
    for member, key in [(A, "of A"), (A, TO_B), (B, "P/1.1/0.1"), (B, "P/1.1/2.1"), (B, "P/1.1/0.2")]:
        table.set(member, key)
    table.gone(A)
    assert table.keys == {"P/1.1/2.1", "P/1.1/0.2"}


def test_with_a_member_go_its_waits_and_those_for_it(table: Table) -> None:
    table.get(A, "P/1.1/0.1", "both")
    table.get(B, TO_B, "both", "P/2.1/1.1")
    table.gone(A)
    assert table.wanted == {"both", "P/2.1/1.1"}
    table.set(C, "both")
    assert table.sent == [(B, StoreValue("both", SECRET))]


def test_news_of_a_member_that_is_gone_leaves_nothing_behind(table: Table) -> None:
    table.gone(Member(0, 3))
    for incarnation in range(1, 4):
        table.set(Member(0, incarnation), "late")
        table.get(Member(0, incarnation), "late too")
    table.set(B, "P/1.1/0.3")
    table.get(B, "P/0.3/1.1")
    assert not table.keys
    assert not table.wanted
    table.set(Member(0, 4), "early")
    assert table.keys == {"early"}


def test_a_thousand_relaunches_leave_nothing_behind(table: Table) -> None:
    for incarnation in range(1, 1001):
        again = Member(0, incarnation)
        for peer in (B, C):
            there = f"P/0.{incarnation}/{peer.rank}.{peer.incarnation}"
            back = f"P/{peer.rank}.{peer.incarnation}/0.{incarnation}"
            table.set(again, there)
            table.set(peer, back)
            table.delete(peer, there)
            table.get(peer, there)
            table.get(again, f"never set for {incarnation}")
        table.gone(again)
    assert not table.keys | table.wanted


def test_a_set_is_noted_without_its_value(table: Table) -> None:
    table.set(A, TO_B)
    table.get(B, TO_B)
    table.delete(B, TO_B)
    facts = {"rank": 0, "incarnation": 1, "key": TO_B, "bytes": len(SECRET)}
    assert table.notes == [("store_set", facts)]
