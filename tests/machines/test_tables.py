"""Tables and the machine that follows them."""

from __future__ import annotations

import copy
import pickle
from enum import StrEnum

import pytest

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.tables import Row, Table, TableMachine


class Light(StrEnum):
    RED = "Red"
    GREEN = "Green"
    BROKEN = "Broken"


class Other(StrEnum):
    BLUE = "Blue"


LIGHT = Table(
    name="light",
    initial=Light.RED,
    rows=(
        Row("go", (Light.RED,), Light.GREEN),
        Row("stop", (Light.GREEN,), Light.RED),
        Row("stop", (Light.RED, Light.BROKEN), None),
        Row("hit", (Light.RED, Light.GREEN), Light.BROKEN),
    ),
    final=frozenset({Light.BROKEN}),
)


def test_every_row_and_nothing_else() -> None:
    rows = {(row.trigger, source): row.dest for row in LIGHT.rows for source in row.source}
    for state in LIGHT.states:
        for trigger in LIGHT.triggers:
            machine = TableMachine(LIGHT, state)
            if (trigger, state) in rows:
                dest = rows[trigger, state]
                assert machine.fire(trigger) is (dest is not None)
                assert machine.state is (dest or state)
            else:
                with pytest.raises(UnexpectedEvent, match=f"light: no {trigger} in {state}"):
                    machine.fire(trigger)
                assert machine.state is state


def test_unknown_trigger() -> None:
    with pytest.raises(UnexpectedEvent, match="no fly"):
        TableMachine(LIGHT).fire("fly")


def test_state_names_are_no_triggers() -> None:
    with pytest.raises(UnexpectedEvent):
        TableMachine(LIGHT).fire("to_GREEN")


def test_machines_of_one_table_are_independent() -> None:
    one, other = TableMachine(LIGHT), TableMachine(LIGHT)
    one.fire("hit")
    assert (one.state, one.final, other.state, other.final) == (Light.BROKEN, True, Light.RED, False)


def test_copies_are_independent() -> None:
    one = TableMachine(LIGHT)
    one.fire("go")
    for twin in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin.fire("stop")
        assert (twin.state, twin.table) == (Light.RED, LIGHT)
    assert one.state is Light.GREEN


@pytest.mark.parametrize(
    "rows",
    [
        (Row("go", (Light.RED,), Light.GREEN), Row("go", (Light.RED,), None)),
        (Row("go", (Other.BLUE,), Light.GREEN),),
        (Row("go", (Light.RED,), Other.BLUE),),
    ],
)
def test_contradictions_are_refused(rows: tuple[Row, ...]) -> None:
    with pytest.raises(ValueError, match="table bad"):
        Table("bad", Light.RED, rows, frozenset())


def test_final_states_are_states() -> None:
    with pytest.raises(ValueError, match="table bad"):
        Table("bad", Light.RED, (), frozenset({Other.BLUE}))
