"""State tables, and the machine that follows one.

A `Table` is plain data: charts are rendered from it and `TableMachine` runs it. There are no callbacks, so a
transition has no side effects; what must be done is decided by the machine that fires the trigger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    moves: dict[tuple[str, Enum], Enum] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Where each (trigger, state) leads to: the rows, one by one."""

    def __post_init__(self) -> None:
        states = set(self.states)
        for row in self.rows:
            for source in row.source:
                if (row.trigger, source) in self.moves:
                    raise ValueError(f"table {self.name}: two rows for {row.trigger} in {source.name}")
                self.moves[row.trigger, source] = row.dest or source
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
    """One thing whose life follows a table. A copy is cheap: exhaustive search makes many."""

    __slots__ = ("_state", "_table")

    def __init__(self, table: Table, state: Enum | None = None) -> None:
        """Begins in `state`, by default the table's initial one."""
        self._table = table
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
        try:
            self._state = self._table.moves[trigger, before]
        except KeyError:
            raise UnexpectedEvent(f"{self._table.name}: no {trigger} in {before.value}") from None
        return self._state is not before

    def __deepcopy__(self, memo: dict[int, Any]) -> TableMachine:
        return TableMachine(self._table, self._state)

    def __reduce__(self) -> tuple[Any, ...]:
        return TableMachine, (self._table, self._state)

    def __repr__(self) -> str:
        return f"<{self._table.name} {self._state.value}>"
