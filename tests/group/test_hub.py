"""One event at a time, causes before consequences, every machine told of its deadlines, and nobody else's faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from elastic_ep.group.hub import Hub
from elastic_ep.machines.contract import Tick, UnexpectedEvent
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually


@dataclass
class Fake:
    """Every event but a `Tick` is a word; its effect is the rest of the word. "!" is never expected."""

    now_ms: int = 0
    due_ms: int | None = None
    heard: list[Any] = field(default_factory=list)

    def step(self, event: Any) -> list[Any]:
        if isinstance(event, Tick):
            self.now_ms = event.now_ms
            if self.due_ms is not None and self.due_ms <= self.now_ms:
                self.due_ms = None
        elif event.startswith("!"):
            raise UnexpectedEvent(event)
        self.heard.append(event)
        return [] if isinstance(event, Tick) else [rest for rest in event[1:].split(",") if rest]

    def next_deadline_ms(self) -> int | None:
        return self.due_ms


class Rig:
    """Machines a, b and c; an effect is an event for the machine that its first letter names ("!": for c)."""

    def __init__(self, now_ms: Callable[[], int] = lambda: 0) -> None:
        self.hub = Hub(self.record, now_ms)
        self.machines = {name: Fake() for name in "abc"}
        self.lines: list[tuple[str, Any, list[Any], int]] = []
        self.calls: list[tuple[str, Any]] = []
        self.depth = 0
        for name, machine in self.machines.items():
            self.hub.attach(name, machine, self, clocked=name == "b")

    def record(self, machine: str, event: object, effects: Sequence[Any], cause: int = 0) -> None:
        self.lines.append((machine, event, list(effects), cause))
        self.calls.append(("record", event))

    def at_once(self, effects: Sequence[Any]) -> None:
        self.calls.append(("at once", tuple(effects)))

    def perform(self, event: Any, effects: Sequence[Any]) -> None:
        assert self.depth == 0, "a shell is called within another"
        self.depth += 1
        self.calls.append(("perform", event))
        for effect in effects:
            self.hub.post(effect[0] if effect[0] in self.machines else "c", effect)
        self.depth -= 1


def test_what_somebody_waits_for_goes_out_before_the_log_and_the_rest_after_it() -> None:
    rig = Rig()
    rig.hub.post("a", "a")
    assert rig.calls == [("at once", ()), ("record", "a"), ("perform", "a")]


WORDS = st.recursive(
    st.sampled_from(["a", "b", "c"]),
    lambda inner: st.builds(lambda head, *rest: head + ",".join(rest), st.sampled_from("abc"), inner, inner),
    max_leaves=8,
)


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_every_effect_is_an_event_once_with_its_cause(words: list[str]) -> None:
    rig = Rig()
    for word in words:
        rig.hub.post(word[0], word)
    outside = [event for _, event, _, cause in rig.lines if cause == 0]
    assert outside == words
    led_to: list[tuple[int, str]] = []
    for place, (_, event, _, cause) in enumerate(rig.lines):
        if cause:
            assert event in rig.lines[place - cause][2]
            led_to.append((place - cause, event))
    expected = [(place, effect) for place, (_, _, effects, _) in enumerate(rig.lines) for effect in effects]
    assert sorted(led_to) == sorted(expected)
    assert rig.hub._performing == 0


def test_an_event_from_outside_that_is_not_expected_changes_nothing_and_is_its_senders() -> None:
    rig = Rig()
    with pytest.raises(UnexpectedEvent):
        rig.hub.post("a", "!")
    assert rig.lines == []
    rig.hub.post("a", "a")
    assert [event for _, event, _, _ in rig.lines] == ["a"]


def test_a_consequence_that_is_refused_is_told_and_costs_the_others_nothing() -> None:
    rig = Rig()
    with capture_logs() as said:
        rig.hub.post("a", "a!x,b,cab")
    assert [event for _, event, _, _ in rig.lines] == ["a!x,b,cab", "b", "cab", "ab", "b"]
    assert [line["log_level"] for line in said] == ["error"]


@pytest.mark.parametrize("word", ["a*,b", "a*", "ab*,c"])
def test_what_a_shell_cannot_perform_stops_nothing_else(word: str) -> None:
    """ "*": the shell fails at that effect. Those that were posted before it, and all that is posted later, are heard."""

    class Failing(Rig):
        def perform(self, event: Any, effects: Sequence[Any]) -> None:
            super().perform(event, [effect for effect in effects if effect != "*"])
            if "*" in effects:
                raise RuntimeError("a fault of this program")

    rig = Failing()
    with capture_logs() as said, suppress(RuntimeError):
        rig.hub.post(word[0], word)
    heard = [event for _, event, _, _ in rig.lines]
    assert heard[0] == word
    assert len(heard) == 1 + len([part for part in word[1:].split(",") if part != "*"])
    rig.hub.post("b", "b")
    assert rig.lines[-1][1] == "b"
    assert rig.hub._busy is False
    assert len(said) == (word == "ab*,c")


def test_a_clocked_machine_hears_the_time_first() -> None:
    now = [5]
    rig = Rig(lambda: now[0])
    rig.hub.post("b", "b")
    rig.hub.post("a", "a")
    rig.hub.post("b", "b")
    now[0] = 9
    rig.hub.post("b", "b")
    assert rig.machines["b"].heard == [Tick(5), "b", "b", Tick(9), "b"]
    assert rig.machines["a"].heard == ["a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 300)), max_size=6))
def test_no_deadline_is_slept_through(deadlines: list[tuple[str, int]]) -> None:
    """Each machine is woken by a `Tick` at its deadline, whichever was set in whatever order, and never for another's."""

    async def main(loop: VirtualTimeLoop) -> None:
        rig = Rig(lambda: int(loop.time() * 1000))
        slept: list[float | None] = []
        loop.on_sleep(slept.append)
        for name, wait_ms in deadlines:
            machine = rig.machines[name]
            machine.due_ms = int(loop.time() * 1000) + wait_ms
            rig.hub.post(name, name)
        await asyncio.sleep(1.0)
        for name, machine in rig.machines.items():
            assert machine.due_ms is None, name
            if name not in {named for named, _ in deadlines}:
                assert machine.heard == []

    run_virtually(main)


def test_a_machine_has_one_shell() -> None:
    rig = Rig()
    with pytest.raises(ValueError, match="a has a shell"):
        rig.hub.attach("a", Fake(), rig)
