"""Decisions, as pure synchronous state machines: events in, effects out, no IO."""
