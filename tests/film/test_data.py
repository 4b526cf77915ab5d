"""A film shows what happened: compared with stories whose every delivery is known."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.film import data
from elastic_ep.film.data import MOST_STREAMS, film
from tests.film.story import SECRET, Story, tell

SEEDS = range(12)


def made(story: Story, **options: Any) -> dict[str, Any]:
    """As whoever plays it has it."""
    found: dict[str, Any] = json.loads(json.dumps(film(story.lines[0]["run"], story.lines[1:], **options)))
    return found


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are short, so that scenes of a story are complete, and what came before forgotten, long before its end."""
    times = {"BEFORE_MS": 30.0, "AFTER_MS": 30.0, "NOT_BACK_MS": 60.0, "LONGEST_MS": 300.0, "LATE_MS": 10.0}
    for name, ms in times.items():
        monkeypatch.setattr(data, name, ms)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_loss_is_in_one_scene_and_every_token_at_its_time_and_rank(seed: int) -> None:
    story = tell(seed)
    shows_all_of_it(made(story), story)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("brief")
def test_of_a_long_log_it_is_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of one of which nothing is forgotten; what is kept meanwhile is a small part of it."""
    story, kept = tell(seed, steps=500), []
    forget = data._Reel.forget

    def noted(self: Any, before_ms: float) -> None:
        forget(self, before_ms)
        kept.append(sum(len(stream.tokens) + len(stream.owners) for stream in self.streams.values()))
        kept[-1] += len(self.marks) + len(self.losses) + sum(map(len, self.states.values()))

    monkeypatch.setattr(data._Reel, "forget", noted)
    found = made(story)
    shows_all_of_it(found, story)
    assert len(found["scenes"]) > 2
    assert max(kept) < sum(map(len, story.delivered.values())) / 3
    monkeypatch.setattr(data._Reel, "forget", lambda *_: None)
    assert without_usual(found) == without_usual(made(story))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("brief")
def test_a_scene_waits_for_its_rank_to_be_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    story = tell(seed, steps=500)
    for name in ("BEFORE_MS", "AFTER_MS", "NOT_BACK_MS"):
        monkeypatch.setattr(data, name, 1.0)
    monkeypatch.setattr(data, "LONGEST_MS", 1500.0)  # no rank is away for longer
    shown = times(made(story))
    monkeypatch.setattr(data, "LATE_MS", 1e9)  # all of it is cut at the end
    assert shown == times(made(story))
    assert len(shown) > 2


def times(film: dict[str, Any]) -> list[tuple[float, float]]:
    return [(scene["from"], scene["to"]) for scene in film["scenes"]]


def without_usual(film: dict[str, Any]) -> dict[str, Any]:
    """What is usual is said by the tokens that are still there."""
    for scene in film["scenes"]:
        for stream in scene["streams"]:
            del stream["silence"]["usual"]
    return film


def shows_all_of_it(found: dict[str, Any], story: Story) -> None:
    assert not found["partial"]
    shown = [(loss["rank"], loss["incarnation"]) for scene in found["scenes"] for loss in scene["losses"]]
    assert shown == story.losses
    for scene in found["scenes"]:
        begin, end = scene["from"], scene["to"]
        assert all(begin <= loss["at"] <= end for loss in scene["losses"])
        streams = {stream["id"]: stream for stream in scene["streams"]}
        for request, times in story.delivered.items():
            within = [t for t in times if begin <= t <= end]
            assert (streams[request]["tokens"] if request in streams else []) == within
            for at, rank in zip(times, story.owners[request], strict=True):
                if begin <= at <= end:
                    owners = streams[request]["owners"]
                    assert owners[bisect_right([owner[0] for owner in owners], at) - 1][1] == rank


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clients_silence_is_the_longest_wait_that_a_loss_was_in_or_before(seed: int) -> None:
    story = tell(seed)
    submitted = {
        line["heard"][1][1]: round(line["t_ns"] / 1e6, 3)
        for line in story.lines
        if line.get("heard", [""])[0] == "Submitted"
    }
    for scene in made(story)["scenes"]:
        lost = scene["losses"][0]["at"]
        for stream in scene["streams"]:
            stop = scene["to"] if stream["to"] is None else stream["to"]
            points = [submitted[stream["id"]], *story.delivered[stream["id"]]]
            points += [stop] * (points[-1] < stop)
            waits = [
                min(after, scene["to"]) - max(before, scene["from"])
                for before, after in pairwise(points)
                if after >= lost and before <= scene["to"]
            ]
            assert stream["silence"]["ms"] == pytest.approx(max([0.0, *waits]), abs=0.002)


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_that_began_before_what_is_left_of_a_log_have_their_ranks_too(seed: int) -> None:
    story = tell(seed)
    owner_at = {
        (request, at): rank
        for request, times in story.delivered.items()
        for at, rank in zip(times, story.owners[request], strict=True)
    }
    rest = film(story.lines[0]["run"], story.lines[len(story.lines) // 2 :])
    for scene in rest["scenes"]:
        for stream in scene["streams"]:
            for at in stream["tokens"]:
                rank = [owner for since, owner in stream["owners"] if since <= at][-1]
                assert rank == owner_at[stream["id"], at]


def test_nothing_of_a_text_is_in_it() -> None:
    for seed in SEEDS:
        assert str(SECRET) not in json.dumps(made(tell(seed)))


def test_of_one_loss_alone() -> None:
    story = next(story for story in map(tell, SEEDS) if len(story.losses) > 2)
    (scene,) = made(story, only=story.losses[1])["scenes"]
    assert [(loss["rank"], loss["incarnation"]) for loss in scene["losses"]] == [story.losses[1]]
    assert made(story, only=(99, 1))["scenes"] == []


@pytest.mark.usefixtures("brief")
def test_of_one_loss_no_more_is_read_than_belongs_to_it() -> None:
    story = tell(2, steps=500)
    read = 0

    def lines() -> Iterator[dict[str, Any]]:
        nonlocal read
        for line in story.lines[1:]:
            read += 1
            yield line

    wanted = story.losses[1]
    (scene,) = film(story.lines[0]["run"], lines(), wanted)["scenes"]
    assert [(loss["rank"], loss["incarnation"]) for loss in scene["losses"]] == [wanted]
    assert scene["losses"][0]["back"] is not None
    assert read < len(story.lines) / 3


@pytest.mark.parametrize("limit", [{"MOST_SCENES": 2}, {"MOST_FILM_TOKENS": 200}])
@pytest.mark.usefixtures("brief")
def test_of_very_many_losses_the_last_are_shown(
    limit: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tell(2, steps=500)
    whole = made(story)["scenes"]
    for name, most in limit.items():
        monkeypatch.setattr(data, name, most)
    found = made(story)
    assert 1 <= len(found["scenes"]) < len(whole)
    assert found["scenes"] == whole[-len(found["scenes"]) :]
    assert found["partial"] == f"the first {len(whole) - len(found['scenes'])} scenes are left out"


def test_reasons_that_may_quote_a_client_are_masked_and_others_are_not() -> None:
    story = next(story for story in map(tell, SEEDS) if story.losses)
    for cause, why, shown in (
        ("exception", "ValueError: 'my secret'", "ValueError: _"),
        ("killed", "signal 9", "signal 9"),
    ):
        (rank, incarnation), lines = story.losses[0], list(story.lines[1:])
        note = {
            "note": "loss",
            "rank": rank,
            "incarnation": incarnation,
            "cause": cause,
            "why": why,
            "requests": 3,
        }
        lines.append({"t_ns": story.now_ns, **note})
        loss = film(story.lines[0]["run"], lines)["scenes"][0]["losses"][0]
        assert (loss["why"], loss["cause"], loss["requests"]) == (shown, cause, 3)


def test_with_many_streams_those_that_moved_are_shown() -> None:
    lines: list[dict[str, Any]] = []

    def route(at_ms: int, heard: list[Any], *effects: list[Any]) -> None:
        lines.append({"t_ns": at_ms * 10**6, "machine": "routing", "heard": heard, "effects": list(effects)})

    for request in range(MOST_STREAMS + 50):
        route(1, ["Submitted", ["NewRequest", request]], ["Send", [request % 2, 1], "Assign", request, 0])
    down = ["MemberDown", [1, 1], "died"]
    lines.append({"t_ns": 5 * 10**6, "machine": "membership", "heard": ["DeathNoticed"], "effects": [down]})
    moved = range(1, MOST_STREAMS + 50, 2)
    route(6, ["RankDown", [1, 1], "died"], *(["Replayed", each, [1, 1]] for each in moved))
    (scene,) = film({}, lines)["scenes"]
    ids = {stream["id"] for stream in scene["streams"]}
    assert len(ids) == MOST_STREAMS
    assert ids.issuperset(moved)
    assert scene["streams_left_out"] == 50


def test_a_scene_holds_no_more_tokens_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    story = next(story for story in map(tell, SEEDS) if story.losses)
    (before, *_) = made(story)["scenes"]
    assert before["streams_left_out"] == 0
    monkeypatch.setattr(data, "MOST_TOKENS", 50)
    (scene, *_) = made(story)["scenes"]
    assert 0 < sum(len(stream["tokens"]) for stream in scene["streams"]) <= 50
    assert scene["streams_left_out"] == len(before["streams"]) - len(scene["streams"]) > 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_cut_or_forged_log_makes_a_film_that_says_so(drawn: st.DataObject) -> None:
    story = tell(3, steps=20)
    place = drawn.draw(st.integers(1, len(story.lines) - 1))
    odd: Any = drawn.draw(
        st.recursive(
            st.none() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["t_ns", "note", "machine"]), inner)
            ),
            max_leaves=6,
        )
    )
    head, lines = story.lines[0]["run"], story.lines[1:]
    whole_before = film(head, lines[:place])
    assert not whole_before["partial"]
    forged = film(head, [*lines[:place], odd, *lines[place:]])
    if isinstance(odd, dict) and isinstance(odd.get("t_ns"), int):
        return  # it is a line, perhaps one that says nothing
    assert forged["partial"]
    assert forged["scenes"] == whole_before["scenes"]
