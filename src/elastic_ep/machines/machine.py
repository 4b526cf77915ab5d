"""What every machine is: `step(event) -> [effect]`.

Events and effects are frozen dataclasses. A machine does no IO, reads no clock, draws no random numbers, logs nothing:
time comes in as a `Tick`, effects go out and a thin shell performs them. The same machine therefore runs in production,
under hypothesis, under exhaustive search and in replay. The form follows dask's worker state machine (events in,
instructions out, exceptions that tell their story) and etcd's raft (time as ticks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any, ClassVar, Generic, TypeVar

from elastic_ep.machines.snapshot import State, capture
from elastic_ep.wire.privacy import without_text

EventT = TypeVar("EventT")
EffectT = TypeVar("EffectT")

REMEMBERED = 16
_WIDTH = 300
"""Characters that an exception tells of an event and of its effects."""


class Machine(ABC, Generic[EventT, EffectT]):
    """Equal are machines of one kind in the same state: they go on in the same way.

    `transient` names the fields that mean nothing between two events.
    """

    transient: ClassVar[frozenset[str]] = frozenset({"_changes", "_effects", "_handlers", "_recent"})
    _recent: deque[tuple[EventT, list[EffectT]]]
    __hash__ = None  # type: ignore[assignment]  # it changes

    def __new__(cls, *_arguments: Any, **_named: Any) -> Any:
        self = super().__new__(cls)
        self._recent = deque(maxlen=REMEMBERED)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a story of its own."""
        return {name: value for name, value in vars(self).items() if name != "_recent"}

    def step(self, event: EventT) -> list[EffectT]:
        """Take one event, change state, say what must be done.

        Raises `UnexpectedEvent` for one that its sender must not send, with nothing changed. Whatever is raised has the
        last events in its notes, without clients' text.
        """
        try:
            effects = self._step(event)
        except Exception as error:
            self._tell_story(error, event)
            raise
        self._recent.append((event, effects))
        return effects

    def check(self) -> None:
        """Raise AssertionError, with the last events in its notes, if an invariant does not hold."""
        try:
            self._check()
        except AssertionError as error:
            self._tell_story(error)
            raise

    def state(self) -> State:
        """All that decides how it goes on, as one frozen value."""
        return capture(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.state() == other.state()

    @abstractmethod
    def _step(self, event: EventT) -> list[EffectT]: ...

    def _check(self) -> None:
        """By default there is nothing to check."""

    def _tell_story(self, error: Exception, *unheard: EventT) -> None:
        name = type(self).__name__
        for event, effects in self._recent:
            error.add_note(f"{name} heard {_short(event)}, said {_short(effects)}")
        for event in unheard:
            error.add_note(f"{name} cannot take {_short(event)}")


def _short(value: Any) -> str:
    text = str(without_text(value))
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]} ..."
