"""When a dead rank is launched again, and when start failures are alike: laws for any deaths and reasons."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.machines.membership.relaunch import (
    Death,
    early_deaths,
    explain,
    killed_from_outside,
    pause_ms,
)
from elastic_ep.machines.membership.start_failure import alike, normalised
from elastic_ep.timing import MembershipConfig

CONFIGS = st.builds(
    MembershipConfig,
    relaunch_limit=st.integers(1, 40),
    relaunch_backoff_ms=st.integers(1, 500),
    relaunch_backoff_max_ms=st.integers(500, 10_000),
    relaunch_long_backoff_ms=st.integers(10_000, 20_000),
    relaunch_long_backoff_max_ms=st.integers(20_000, 300_000),
)
DEATHS = st.builds(
    Death,
    status=st.sampled_from(["signal 9", "signal 15", "signal 11", "signal 6", "exit status 1", "unknown"]),
    served_ms=st.one_of(st.none(), st.integers(0, 10_000)),
    fenced=st.booleans(),
    blameless=st.booleans(),
)


@given(config=CONFIGS, early=st.integers(0, 10_000))
def test_the_pause_grows_has_a_limit_and_is_never_never(config: MembershipConfig, early: int) -> None:
    pause, next_pause = pause_ms(early, config), pause_ms(early + 1, config)
    assert pause is not None
    assert next_pause is not None
    assert pause <= next_pause <= config.relaunch_long_backoff_max_ms
    assert pause == 0 if early <= 1 else pause > 0
    if early > max(1, config.relaunch_limit):
        assert pause >= config.relaunch_long_backoff_ms
        assert next_pause == min(2 * pause, config.relaunch_long_backoff_max_ms)
    else:
        assert pause <= config.relaunch_backoff_max_ms


@given(early=st.integers(0, 100))
def test_limit_0_keeps_all_away(early: int) -> None:
    assert pause_ms(early, MembershipConfig(relaunch_limit=0)) is None


@given(config=CONFIGS, deaths=st.lists(DEATHS, max_size=40))
def test_only_the_ranks_own_early_deaths_in_a_row_count(
    config: MembershipConfig, deaths: list[Death]
) -> None:
    """Counted anew from the last death that ends a row, whatever came before it."""
    count = 0
    for death in deaths:
        count = early_deaths(count, death, config)
    row = deaths
    for place, death in enumerate(deaths):
        if death.blameless or death.served_ms is None:
            continue
        killed = death.status in ("signal 9", "signal 15") and not death.fenced
        if killed or death.served_ms >= config.stable_after_ms:
            row = deaths[place + 1 :]
    assert count == sum(not death.blameless for death in row)


@given(served_ms=st.integers(0, 10), row=st.integers(0, 100))
def test_who_served_and_was_killed_from_outside_is_back_at_once(served_ms: int, row: int) -> None:
    config = MembershipConfig()
    assert pause_ms(early_deaths(row, Death("signal 9", served_ms), config), config) == 0


@pytest.mark.parametrize(
    "status", ["signal 11", "signal 6", "exit status 0", "unknown", "SIGKILL", "signal x", ""]
)
def test_what_is_not_surely_a_kill_from_outside_counts(status: str) -> None:
    assert not killed_from_outside(status)
    assert early_deaths(3, Death(status, 10), MembershipConfig()) == 4


def test_the_pauses_are_as_the_readme_says() -> None:
    config = MembershipConfig()
    pauses = [pause_ms(early, config) for early in range(1, 18)]
    short = [0, 100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]
    assert pauses == [*short, 10_000, 20_000, 40_000, 80_000, 160_000, 300_000, 300_000]
    assert explain("died", 14, 80_000, config) == (
        "died; next launch in 80 s (early deaths in a row: 14); POST /v1/fault_tolerance/relaunch to try now"
    )
    assert explain("died", 3, 150, config) == "died; next launch in 1 s (early deaths in a row: 3)"


WORDS = st.lists(
    st.sampled_from(["no", "memory", "left", "CompileError:", "cannot", "load", "device"]), min_size=1
)
FACTS = st.tuples(
    st.integers(0, 63), st.integers(1, 4_194_304), st.integers(0, 2**48), st.floats(0, 1e6, allow_nan=False)
)


def told(words: list[str], facts: tuple[int, int, int, float]) -> str:
    rank, pid, address, seconds = facts
    return f"rank {rank}: {' '.join(words)} (pid {pid}, at {address:#x}, port 127.0.0.1:{pid}) after {seconds:.3f} s"


@given(words=WORDS, facts=st.lists(FACTS, min_size=1, max_size=8))
def test_reasons_that_differ_in_rank_pid_address_and_time_are_alike(
    words: list[str], facts: list[tuple[int, int, int, float]]
) -> None:
    assert alike(told(words, each) for each in facts)


@given(one=WORDS, other=WORDS, facts=FACTS)
def test_reasons_in_other_words_are_not_alike(
    one: list[str], other: list[str], facts: tuple[int, int, int, float]
) -> None:
    assert alike([told(one, facts), told(other, facts)]) == (one == other)


@given(reason=st.text())
def test_to_normalise_twice_changes_nothing_more(reason: str) -> None:
    assert normalised(normalised(reason)) == normalised(reason)


def test_no_reason_is_like_nothing() -> None:
    assert not alike([])
    assert not alike(["", ""])
    assert not alike(["no memory", ""])
