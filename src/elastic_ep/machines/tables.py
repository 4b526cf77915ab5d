"""State tables, and the one place that hands them to the `transitions` library.

A `Table` is plain data: charts are rendered from it and `TableMachine` runs it. There are no callbacks, so a
transition has no side effects; what must be done is decided by the machine that fires the trigger.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from transitions import Machine, MachineError

from elastic_ep.machines.contract import UnexpectedEvent


@dataclass(frozen=True, slots=True)
class Row:
    """In each state of `source`, `trigger` leads to `dest`. None: it stays (a late, harmless event)."""

    trigger: str
    source: tuple[Enum, ...]
    dest: Enum | None


@dataclass(frozen=True, slots=True)
class Table:
    """All states are members of the Enum that `initial` belongs to.

    Raises `ValueError` if it contradicts itself.

    `final` are the states where the life of the thing may end; rows may still lead out of them.
    """

    name: str
    initial: Enum
    rows: tuple[Row, ...]
    final: frozenset[Enum]

    def __post_init__(self) -> None:
        states = set(self.states)
        seen: set[tuple[str, Enum]] = set()
        for row in self.rows:
            for source in row.source:
                if (row.trigger, source) in seen:
                    raise ValueError(f"table {self.name}: two rows for {row.trigger} in {source.name}")
                seen.add((row.trigger, source))
            if not states.issuperset(row.source) or (row.dest is not None and row.dest not in states):
                raise ValueError(f"table {self.name}: {row.trigger} mentions a state of another enum")
        if not states.issuperset(self.final):
            raise ValueError(f"table {self.name}: a final state of another enum")

    @property
    def states(self) -> tuple[Enum, ...]:
        return tuple(type(self.initial))

    @property
    def triggers(self) -> tuple[str, ...]:
        """Every trigger once, in the order of the rows."""
        return tuple(dict.fromkeys(row.trigger for row in self.rows))


class TableMachine:
    """One thing whose life follows a table.

    All machines of a table share one `transitions.Machine`, which is stateless: the state lives here. So one
    costs a few hundred bytes, a copy is cheap (exhaustive search copies many), and firing costs some 10 us:
    right for changes of lifecycle, too slow for every token.
    """

    __slots__ = ("_library", "_state", "_table")

    def __init__(self, table: Table, state: Enum | None = None) -> None:
        """Begins in `state`, by default the table's initial one."""
        self._table = table
        self._library = _library(table)
        self._state = table.initial if state is None else state

    @property
    def table(self) -> Table:
        return self._table

    @property
    def state(self) -> Any:
        """The present state, a member of the table's Enum."""
        return self._state

    @property
    def final(self) -> bool:
        return self._state in self._table.final

    def fire(self, trigger: str) -> bool:
        """Follow the row for `trigger`; whether the state changed. Raises `UnexpectedEvent` without a row."""
        before = self._state
        event = self._library.events.get(trigger)
        if event is None:
            raise UnexpectedEvent(f"{self._table.name}: the table has no {trigger}")
        try:
            event.trigger(self)
        except MachineError as error:
            raise UnexpectedEvent(f"{self._table.name}: no {trigger} in {before.value}") from error
        return self._state is not before

    def __copy__(self) -> TableMachine:
        copy = TableMachine.__new__(TableMachine)
        copy._table, copy._library, copy._state = self._table, self._library, self._state
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> TableMachine:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return TableMachine, (self._table, self._state)

    def __repr__(self) -> str:
        return f"<{self._table.name} {self._state.value}>"


@cache
def _library(table: Table) -> Any:
    """The library's machine for `table`. Its models come with each trigger: the `TableMachine` that fires."""
    machine = Machine(
        model=None,
        states=type(table.initial),
        initial=table.initial,
        auto_transitions=False,
        model_attribute="_state",
    )
    for row in table.rows:
        machine.add_transition(row.trigger, list(row.source), row.dest)
    return machine
