"""Deadlines that depend on others: their usual values, and that none outlasts what it must not at any setting."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_ep.config import ServeConfig
from elastic_ep.timing import USUAL, MembershipConfig, ProgressConfig, RepairConfig, Timing

GOLDEN = {
    "hang_deadline_ms": 1_000, "stop_deadline_ms": 30_000, "ranks": 8, "fault_tolerance": True, "mps": False,
    "relaunch_limit": 10,
    "heartbeat_ms": 200, "parked_heartbeat_ms": 800, "pulse_ms": 100, "calm_factor": 3, "held_up_ms": 300,
    "quiet_ms": 2_000, "beat_ms": 250, "sync_retry_ms": 20, "kernel_wait_ms": 500, "drain_ms": 0,
    "slot_pull_ms": 3_000, "expert_pull_ms": 5_000, "dense_pull_ms": 30_000, "store_get_ms": 10_000,
    "host_beat_ms": 100, "silent_beats": 5, "preparing_beats": 20, "closed_beats": 2, "host_silent_ms": 700,
    "apart_beats": 8, "agentless_beats": 50,
    "lease_ms": 1_400, "lease_margin_ms": 200,
    "audit_ms": 30_000, "carry_out_ms": 60_000,
    "server_ready_ms": 120_000, "server_reply_ms": 10_000, "status_ms": 1_000, "leave_ms": 3_000, "close_ms": 5_000,
    "reap_ms": 2_000,
    "progress": ProgressConfig(deadline_ms=1_000, busy_factor=30, idle_factor=5),
    "membership": MembershipConfig(
        attempt_deadline_ms=1_000, missed_attempts_limit=3, park_after_ms=300, stable_after_ms=5_000,
        relaunch_limit=10, relaunch_backoff_ms=100, relaunch_backoff_max_ms=10_000, relaunch_long_backoff_ms=10_000,
        relaunch_long_backoff_max_ms=300_000, unwell_after_ms=10_000, forming_grace_ms=15_000, init_deadline_ms=120_000,
    ),
}  # fmt: skip
TIMINGS = st.builds(
    Timing,
    hang_deadline_ms=st.integers(200, 3_600_000),
    stop_deadline_ms=st.integers(0, 3_600_000),
    ranks=st.integers(1, 64),
    fault_tolerance=st.booleans(),
    mps=st.booleans(),
    relaunch_limit=st.integers(0, 1_000_000),
)
"""What the command line lets through."""


def shown(timing: Timing) -> dict[str, Any]:
    return {name: getattr(timing, name) for name in dir(Timing) if not name.startswith("_")}


def test_the_usual_values() -> None:
    assert shown(USUAL) == GOLDEN
    progress = USUAL.progress
    assert (progress.limit_ms, progress.common_pause_ms) == (750, 250)
    assert RepairConfig() == RepairConfig(4, 8, copy_deadline_ms=10_000, retry_ms=1_000, layers_at_once=16)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"mps": True}, {"kernel_wait_ms": 200, "drain_ms": 2_200}),
        ({"fault_tolerance": False}, {"heartbeat_ms": 0, "parked_heartbeat_ms": 0, "kernel_wait_ms": 20_000}),
    ],
)
def test_the_usual_values_otherwise(given: dict[str, bool], other: dict[str, int]) -> None:
    assert shown(replace(USUAL, **given)) == {**GOLDEN, **given, **other}


def test_a_command_line_without_flags_has_the_usual_timing() -> None:
    assert ServeConfig(ranks=USUAL.ranks, model="").timing == USUAL


@given(TIMINGS)
@example(Timing(200, ranks=64, mps=True))
@example(Timing(3_600_000, ranks=64, mps=True))
@example(Timing(3_600_000, ranks=64, mps=True, fault_tolerance=False))
def test_every_setting_has_deadlines_that_fit_together(timing: Timing) -> None:
    """The constructor has checked it by its own list; here is what must hold whatever that list says."""
    progress, member, deadline_ms = timing.progress, timing.membership, timing.hang_deadline_ms
    idle_ms = progress.limit_ms * progress.idle_factor
    # With MPS a dead rank's kernels may wait for each of its peers, at two thirds of the clock that they count by.
    assert not timing.mps or timing.drain_ms > (timing.ranks - 1) * timing.kernel_wait_ms / (2 / 3)
    assert timing.drain_ms < member.init_deadline_ms
    assert member.relaunch_limit == timing.relaunch_limit
    if timing.fault_tolerance:
        assert timing.heartbeat_ms * 4 < deadline_ms
        assert timing.parked_heartbeat_ms + timing.calm_factor * timing.pulse_ms < idle_ms
        assert timing.heartbeat_ms + timing.held_up_ms < progress.limit_ms
        assert timing.kernel_wait_ms * 1.5 <= deadline_ms
        assert timing.beat_ms < progress.limit_ms
        assert member.attempt_deadline_ms * member.missed_attempts_limit >= deadline_ms
        assert member.stable_after_ms >= idle_ms
        assert timing.quiet_ms > deadline_ms


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("sync_retry_ms", 251, "behind"), ("calm_factor", 20, "prepare"), ("server_ready_ms", 120_001, "fork server"),
        ("server_reply_ms", 120_001, "imported"), ("dense_pull_ms", 60_000, "silent peer"),
        ("store_get_ms", 60_001, "peers"), ("slot_pull_ms", 5_001, "another source"),
        ("carry_out_ms", 10_999, "made again"), ("audit_ms", 5_999, "pull"), ("leave_ms", 1_999, "gone"),
        ("close_ms", 3_999, "cleans up"), ("heartbeat_ms", 251, "pause of all"),
        ("parked_heartbeat_ms", 1_251, "pause of all"), ("held_up_ms", 551, "stacks"), ("pulse_ms", 251, "verdict out"),
        ("kernel_wait_ms", 668, "kernels"), ("quiet_ms", 1_999, "stall"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_with_the_reason(name: str, value: int, why: str) -> None:
    timing = type("Other", (Timing,), {name: value})
    with pytest.raises(ValueError, match=why):
        timing()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"relaunch_backoff_ms": 10_001}, "grow"), ({"relaunch_backoff_max_ms": 10_001}, "shrink"),
        ({"relaunch_long_backoff_ms": 300_001}, "long ones"), ({"forming_grace_ms": 60_001}, "stuck"),
        ({"init_deadline_ms": 119_999}, "fork server"), ({"stable_after_ms": 3_749}, "served"),
        ({"missed_attempts_limit": 0}, "watch"),
    ],
)  # fmt: skip
def test_so_is_one_of_the_membership(changed: dict[str, int], why: str) -> None:
    timing = type("Other", (Timing,), {"membership": replace(USUAL.membership, **changed)})
    with pytest.raises(ValueError, match=why):
        timing()


def test_so_is_what_only_other_settings_forbid() -> None:
    """A drain is long with many ranks only, and so is a beat with a short deadline for hangs."""
    with pytest.raises(ValueError, match="predecessor"):
        type("Other", (Timing,), {"membership": USUAL.membership})(60_000, mps=True)
    with pytest.raises(ValueError, match="know"):
        type("Other", (Timing,), {"beat_ms": 310})(400)


def test_only_what_was_given_travels() -> None:
    assert [field.name for field in fields(Timing)] == list(GOLDEN)[:6]
