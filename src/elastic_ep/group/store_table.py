"""The run process' half of the ranks' store: which keys there are, and who waits for one that is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from elastic_ep.event_log.log import Note
from elastic_ep.exchange.store import members_named
from elastic_ep.wire.messages import Member, ToRank
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet, StoreValue

FromStore = StoreSet | StoreGet | StoreDelete
_NEVER = -1


class _Entry(NamedTuple):
    owner: Member
    value: bytes


class StoreTable:
    """Answers through `send`; each set is noted without its value. No IO of its own, event loop only.

    Nothing outlives the members that it is about: with a member go the keys that it set, the keys that name it
    (nobody reads them any more, or sets them) and what it waited for. News of it that comes later is ignored.
    """

    def __init__(self, send: Callable[[Member, ToRank], None], note: Note) -> None:
        self._send = send
        self._note = note
        self._entries: dict[str, _Entry] = {}
        self._wants: dict[str, set[Member]] = {}
        """By key that is not there, who is to be told of it."""
        self._gone: dict[int, int] = {}
        """By rank, the last incarnation that is gone."""

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._entries)

    @property
    def wanted(self) -> frozenset[str]:
        """Keys that somebody waits for."""
        return frozenset(self._wants)

    def heard(self, member: Member, message: FromStore) -> None:
        if self._is_gone(member):
            return
        match message:
            case StoreSet(key=key, value=value):
                self._set(member, key, value)
            case StoreGet(keys=keys):
                for key in keys:
                    self._get(member, key)
            case StoreDelete(key=key):
                self._entries.pop(key, None)

    def gone(self, member: Member) -> None:
        """`member` and its earlier incarnations will neither set nor read anything any more."""
        self._gone[member.rank] = max(member.incarnation, self._gone.get(member.rank, _NEVER))
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if not self._is_gone(entry.owner) and not self._is_dead(key)
        }
        left = {
            key: {waiter for waiter in waiters if not self._is_gone(waiter)}
            for key, waiters in self._wants.items()
            if not self._is_dead(key)
        }
        self._wants = {key: waiters for key, waiters in left.items() if waiters}

    def _set(self, member: Member, key: str, value: bytes) -> None:
        self._note("store_set", rank=member.rank, incarnation=member.incarnation, key=key, bytes=len(value))
        if self._is_dead(key):
            return
        self._entries[key] = _Entry(member, value)
        for waiter in sorted(self._wants.pop(key, ())):
            self._send(waiter, StoreValue(key, value))

    def _get(self, member: Member, key: str) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            self._send(member, StoreValue(key, entry.value))
        elif not self._is_dead(key):
            self._wants.setdefault(key, set()).add(member)

    def _is_gone(self, member: Member) -> bool:
        return member.incarnation <= self._gone.get(member.rank, _NEVER)

    def _is_dead(self, key: str) -> bool:
        """Whether the key leads from or to a member that is gone."""
        return any(map(self._is_gone, members_named(key)))
