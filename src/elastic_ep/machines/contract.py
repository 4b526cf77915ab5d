"""What goes in and out of every machine (`machine.py`) beside its own events and effects."""

from __future__ import annotations

from dataclasses import dataclass


class UnexpectedEvent(Exception):
    """The machine takes no such event in its present state."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: `now_ms` is the shell's monotonic clock, milliseconds."""

    now_ms: int
