"""A machine's whole state as one frozen value: to compare machines, and to go on from the middle of an event log.

`capture` (a machine's `state()`) takes mutable things as they are at one moment. What is frozen anyway (messages, rows
of scalars) is shared, so it costs a few microseconds a live request. `to_plain` makes JSON of it, later and on any
thread, and `restore` puts that into a fresh machine: from there on both machines say the same to the same events.

Two ways to one mutable thing (a request is in the queue and among its rank's) stay two ways to one thing.
"""

from __future__ import annotations

import importlib
import operator
import pkgutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic_ep.machines.tables import Table, TableMachine

if TYPE_CHECKING:
    from elastic_ep.machines.machine import Machine


UNLOGGED = "elastic_ep.machines.hosts"
"""In no event log, so never restored; and its names may be those of others."""


class MalformedState(ValueError):
    """This is no state of such a machine."""


class State(NamedTuple):
    """`fields` are (name, captured value). Two machines with equal states go on in the same way."""

    machine: type
    fields: tuple[tuple[str, Any], ...]


class Held(NamedTuple):
    """A mutable thing at one moment. `kind` is its type, or `Again` where it occurred before."""

    kind: type
    parts: tuple[Any, ...]


class Again:
    """Stands for a mutable thing by its number, counted in the order in which they occur."""


Blanks = Callable[[type], Sequence[Callable[[Any], Any] | None]]
"""For each field of a dataclass or named tuple, what its plain form is to be; None: the usual one."""

_SCALARS: frozenset[type] = frozenset({int, float, str, bool, type(None)})
_frozen_types: set[type] = {*_SCALARS, frozenset}
"""Types whose values never change. Others join when first seen."""


def capture(machine: Machine[Any, Any]) -> State:
    """Raises TypeError for what no machine may hold."""
    memo: dict[int, int] = {}
    kept = [(name, value) for name, value in vars(machine).items() if name not in machine.transient]
    return State(type(machine), tuple([(name, _capture(value, memo)) for name, value in kept]))


def _capture(value: Any, memo: dict[int, int]) -> Any:
    cls = type(value)
    if cls in _frozen_types:
        return value
    if cls is tuple:
        return _row(value, memo)
    if _is_frozen(cls):
        _frozen_types.add(cls)
        return value
    if id(value) in memo:
        return Held(Again, (memo[id(value)],))
    memo[id(value)] = len(memo)
    if cls is list:
        return Held(cls, _row(value, memo))
    if cls is set:
        return Held(cls, (frozenset(value),))
    if cls is dict or cls is OrderedDict:
        return Held(cls, tuple(zip(value, _each(value.values(), memo), strict=True)))
    if cls is TableMachine:
        return Held(cls, (value.table.name, value.state))
    if is_dataclass(cls):
        return Held(cls, _each(_parts(cls)(value), memo))
    raise TypeError(f"a machine holds a {cls.__name__}")


def _row(value: Sequence[Any], memo: dict[int, int]) -> tuple[Any, ...]:
    """A row holds things of one kind, so a request's thousands of tokens are not looked at one by one."""
    if not value or type(value[0]) in _frozen_types:
        return tuple(value)
    return _each(value, memo)


def _each(values: Iterable[Any], memo: dict[int, int]) -> tuple[Any, ...]:
    """HAZARD: the event loop stands still meanwhile, and there is a call for whatever is not frozen."""
    return tuple([value if type(value) in _frozen_types else _capture(value, memo) for value in values])


def _is_frozen(cls: type) -> bool:
    if is_dataclass(cls):
        return bool(vars(cls)["__dataclass_params__"].frozen)
    return issubclass(cls, Enum | tuple)


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls)) if is_dataclass(cls) else tuple(cls._fields)


@cache
def _parts(cls: Any) -> Callable[[Any], Iterable[Any]]:
    names = _names(cls)
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: [getattr(value, name) for name in names]


# To JSON: an array is a tuple; an object has one key, the name of its type


def to_plain(state: State, blanks: Blanks | None = None) -> dict[str, Any]:
    plain = _Plain(blanks)
    return {name: plain.of(value) for name, value in state.fields}


class _Plain:
    def __init__(self, blanks: Blanks | None) -> None:
        self._blanks = blanks

    def of(self, value: Any) -> Any:
        cls = type(value)
        if cls in _SCALARS:
            return value
        if cls is tuple:
            return value if _SCALARS.issuperset(map(type, value)) else list(map(self.of, value))
        if cls is Held:
            return {value.kind.__name__: self._parts(value.kind, value.parts)}
        if cls is frozenset:
            return {"frozenset": self._sorted(value)}
        if issubclass(cls, Enum):
            return {cls.__name__: value.value}
        if is_dataclass(cls) or issubclass(cls, tuple):
            return {cls.__name__: self._fields(cls, _parts(cls)(value))}
        raise TypeError(f"not frozen: {cls.__name__}")

    def _parts(self, kind: type, parts: tuple[Any, ...]) -> Any:
        if kind is set:
            return self._sorted(parts[0])
        return self._fields(kind, parts) if is_dataclass(kind) else self.of(parts)

    def _fields(self, cls: type, parts: Iterable[Any]) -> list[Any]:
        if self._blanks is None:
            return [self.of(part) for part in parts]
        return [self._blanked(blank, part) for blank, part in zip(self._blanks(cls), parts, strict=True)]

    def _blanked(self, blank: Callable[[Any], Any] | None, part: Any) -> Any:
        if blank is None:
            return self.of(part)
        return {part.kind.__name__: blank(part.parts)} if type(part) is Held else blank(part)

    def _sorted(self, value: frozenset[Any]) -> list[Any]:
        """Equal sets in the same order."""
        return sorted([self.of(item) for item in value], key=repr)


# And back


def restore(machine: Any, plain: dict[str, Any]) -> None:
    """Put the state into `machine`, which is fresh. Raises `MalformedState`."""
    expected = vars(machine).keys() - machine.transient
    if not isinstance(plain, dict) or plain.keys() != expected:
        raise MalformedState(f"{type(machine).__name__} has {sorted(expected)}, the state {sorted(plain)}")
    builder = _Builder()
    try:
        state = {name: builder.build(value) for name, value in plain.items()}
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise MalformedState(f"{type(machine).__name__}: {error!r}") from error
    vars(machine).update(state)


class _Builder:
    def __init__(self) -> None:
        self._made: list[Any] = []
        """Mutable things, in the order in which they occur."""

    def build(self, plain: Any) -> Any:
        if type(plain) in _SCALARS:
            return plain
        if isinstance(plain, list):
            return tuple([item if type(item) in _SCALARS else self.build(item) for item in plain])
        ((name, parts),) = plain.items()
        if name == "Again":
            (number,) = parts
            return self._made[number]
        if name == "frozenset":
            return frozenset(map(self.build, parts))
        if name in ("list", "set", "dict", "OrderedDict"):
            return self._collection(name, parts)
        if name == "TableMachine":
            return self._keep(_table_machine(*parts))
        return self._record(_classes()[name], parts)

    def _keep(self, made: Any) -> Any:
        self._made.append(made)
        return made

    def _collection(self, name: str, parts: list[Any]) -> Any:
        """Kept before it is filled: what is in it comes after it."""
        made: Any = self._keep({"list": list, "set": set, "dict": dict, "OrderedDict": OrderedDict}[name]())
        if name == "list":
            made.extend(self.build(parts))
        else:
            made.update(map(self.build, parts))
        return made

    def _record(self, cls: Any, parts: Any) -> Any:
        if issubclass(cls, Enum):
            return cls(parts)
        if issubclass(cls, tuple):
            return cls._make(self.build(parts))
        if _is_frozen(cls):
            return cls(*self.build(parts))
        made = self._keep(cls.__new__(cls))
        for name, part in zip(_names(cls), parts, strict=True):
            setattr(made, name, self.build(part))
        return made


def _table_machine(table: str, state: dict[str, Any]) -> TableMachine:
    known = _tables()[table]
    ((_, value),) = state.items()
    return TableMachine(known, type(known.initial)(value))


@cache
def _classes() -> dict[str, type]:
    """What a state may consist of, by name. Raises TypeError if two things have one name."""
    types = {value for value in _public() if isinstance(value, type)}
    found = [cls for cls in types if is_dataclass(cls) or issubclass(cls, Enum | tuple)]
    by_name = {cls.__name__: cls for cls in found}
    if len(by_name) < len(found):
        raise TypeError(f"two types of one name: {sorted(cls.__name__ for cls in found)}")
    return by_name


@cache
def _tables() -> dict[str, Table]:
    return {value.name: value for value in _public() if isinstance(value, Table)}


def _public() -> Iterator[Any]:
    """All that the modules of machines and messages define."""
    package = importlib.import_module("elastic_ep.machines")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "elastic_ep.machines.")]
    logged = [name for name in names if not name.startswith(UNLOGGED)]
    for name in ("elastic_ep.wire.messages", "elastic_ep.placement", *logged):
        yield from vars(importlib.import_module(name)).values()
