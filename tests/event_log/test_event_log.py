"""The event log as files: whose they are, what is in them, how long they may be, and what replay makes of any part."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import itertools
import json
import os
import pkgutil
import random
import re
import stat
import threading
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import elastic_ep.machines
from elastic_ep.config import ConfigError, EventLogMode, ServeConfig
from elastic_ep.event_log import files as log_files
from elastic_ep.event_log import writer as log_writer
from elastic_ep.event_log.files import CURRENT, segment_name
from elastic_ep.event_log.log import EventLog
from elastic_ep.machines.registry import MACHINES
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.prefixes import marks_of
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.machines.snapshot import UNLOGGED
from elastic_ep.replay import DIFFERS, SAME, UNREADABLE, main
from elastic_ep.run import parse
from elastic_ep.wire.messages import (
    Bias,
    Cached,
    FailureCode,
    Grammar,
    GrammarKind,
    Member,
    SamplingParams,
    Token,
    TopLogprob,
)  # fmt: skip
from elastic_ep.wire.privacy import MAX_BLANK, blanks, expanded, masked

CONFIG = ev.RoutingConfig(2, max_queued=4, request_timeout_ms=900, num_pages=30)
SECRET = 987_654_321
"""A token that nobody may find in a log without text."""


# A run of the router, the same whatever is in the texts


def story(seed: int, events: int) -> Iterator[Callable[[RoutingMachine], ev.Event]]:
    """What happens next, given the machine: requests, tokens, deaths, failures, cancels, time."""
    choose = random.Random(seed)
    numbers, incarnations = itertools.count(), [0, 0]
    yield lambda _machine: ev.RankUp(Member(0, bumped(incarnations, 0)))
    for _ in range(events):
        draw = choose.random()
        yield lambda machine, draw=draw: _next(machine, draw, choose, numbers, incarnations)  # type: ignore[misc]


def bumped(incarnations: list[int], rank: int) -> int:
    incarnations[rank] += 1
    return incarnations[rank]


def _next(
    machine: RoutingMachine,
    draw: float,
    choose: random.Random,
    numbers: Iterator[int],
    incarnations: list[int],
) -> ev.Event:
    running = [(m, r) for m, rank in machine.ranks.items() for r in rank.requests.values()]
    if draw < 0.3:
        length = choose.choice((1, 3, 5, 300))
        few = (SECRET,) * choose.randint(0, 2)
        params = SamplingParams(
            choose.randint(1, 4),
            stop_token_ids=few,
            logprobs=1,
            allowed_token_ids=few,
            logit_bias=(Bias(SECRET, 1.5),),
            grammar=choose.choice((None, Grammar(GrammarKind.REGEX, f"{SECRET}+"))),
        )
        marks = tuple(choose.choice((1, 2)) * 100 + depth for depth in range(marks_of(length, 16)))
        request = ev.NewRequest(next(numbers), (SECRET,) * length, params, SECRET, 0, marks)
        return ev.Submitted(request, machine.now_ms)
    if draw < 0.75 and running:
        member, request_ = choose.choice(running)
        token = Token(
            request_.asked.request_id,
            len(request_.emitted),
            SECRET,
            None,
            -0.987654321,
            (TopLogprob(SECRET, -0.5),),
        )
        cached, held = (Cached(request_.asked.request_id, 16),), choose.choice((None, (), (0, 3)))
        return ev.TokensCommitted(member, (token,), cached=cached, held=held)
    if draw < 0.8 and running:
        member, request_ = choose.choice(running)
        return ev.Failed(member, request_.asked.request_id, FailureCode.FAILED, f"token {SECRET} is too much")
    if draw < 0.85 and running:
        return ev.RankDown(running[0][0], "died")
    if draw < 0.9 and running:
        return ev.CancelRequested(running[0][1].asked.request_id)
    if draw < 0.95:
        return ev.Tick(machine.now_ms + 200)
    rank = choose.randint(0, 1)
    return ev.RankUp(Member(rank, bumped(incarnations, rank)))


def rewritten(event: ev.Event, token: Callable[[], int]) -> ev.Event:
    """The same event for other texts of the same lengths."""
    match event:
        case ev.Submitted(request):
            stops = tuple(token() for _ in request.params.stop_token_ids)
            prompt = tuple(token() for _ in request.prompt)
            allowed = tuple(token() for _ in request.params.allowed_token_ids)
            bias = tuple(Bias(token(), float(token())) for _ in range(token() % 3))
            params = replace(request.params, stop_token_ids=stops, allowed_token_ids=allowed, logit_bias=bias)
            if params.grammar is not None:
                params = replace(params, grammar=replace(params.grammar, text="x" * (token() % 9)))
            return replace(event, request=replace(request, prompt=prompt, params=params, seed=token()))
        case ev.TokensCommitted(tokens=tokens):
            others = [
                t._replace(
                    token=token(), logprob=-float(token()), top=(TopLogprob(token(), -1.0),) * (token() % 4)
                )
                for t in tokens
            ]
            return replace(event, tokens=tuple(others))
        case ev.Failed():
            return replace(event, reason=f"cannot run {token()}")
    return event


def write(
    folder: Path,
    seed: int,
    events: int,
    mode: EventLogMode = EventLogMode.IDS,
    token: Callable[[], int] | None = None,
    max_bytes: int = 0,
    flush_every: int = 20,
) -> Path:
    """The log of a run in which every token is `token`'s; its folder."""
    machine, ticks = RoutingMachine(CONFIG), itertools.count()
    log = EventLog(folder, mode, max_bytes=max_bytes, clock_ns=lambda: next(ticks))
    first = {
        "version": "0.1.0",
        "machines": {"routing": {"config": ["RoutingConfig", *dataclasses.astuple(CONFIG)]}},
    }
    log.begin(first, {"routing": machine})
    for place, then in enumerate(story(seed, events)):
        event = then(machine)
        event = rewritten(event, token) if token else event
        log.record("routing", event, machine.step(event))
        if max_bytes and place % flush_every == 0:
            log.flush()
    log.close()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# What is in it


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), other=st.integers(0, 1 << 32), events=st.integers(1, 60))
def test_without_text_runs_that_differ_in_their_texts_only_have_the_same_log(
    tmp_path_factory: pytest.TempPathFactory, seed: int, other: int, events: int
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    tokens = random.Random(other)
    one = write(folder / "one", seed, events)
    two = write(folder / "two", seed, events, token=lambda: tokens.getrandbits(31))
    assert contents(one) == contents(two)
    assert str(SECRET).encode() not in contents(one)[CURRENT]
    assert main([str(one), "--quiet"]) == SAME


def test_files_of_a_long_run_hold_no_text_either(tmp_path: Path) -> None:
    tokens = random.Random(5)
    one = write(tmp_path / "one", 3, 3000, max_bytes=200_000)
    two = write(tmp_path / "two", 3, 3000, token=lambda: tokens.getrandbits(31), max_bytes=200_000)
    assert len(contents(one)) > 3
    for folder in (one, two):
        whole = b"".join(contents(folder).values())
        assert not re.search(rb"987.?654", whole)
        assert main([str(folder), "--quiet"]) == SAME


def test_with_text_all_of_it_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 3, 200, EventLogMode.FULL)
    text = contents(folder)[CURRENT].decode()
    assert str(SECRET) in text
    assert "-0.987654321" in text
    assert main([str(folder), "--quiet"]) == SAME


def classes(hint: Any, seen: set[type]) -> set[type]:
    """Every dataclass and named tuple that a value of this type may hold."""
    if isinstance(hint, type) and hint not in seen and (is_dataclass(hint) or hasattr(hint, "_fields")):
        seen.add(hint)
        for inner in typing.get_type_hints(hint, include_extras=True).values():
            classes(inner, seen)
    for inner in typing.get_args(hint):
        classes(inner, seen)
    return seen


NOT_LOGGED = {
    "experts.balance", "experts.planner", "rank.bisection", "registry", "snapshot", "tables",
}  # fmt: skip


def logged() -> set[type]:
    """What events, effects and states consist of."""
    found: set[type] = set()
    for entry in MACHINES.values():
        classes(entry.event, found)
    prefix = "elastic_ep.machines."
    names = {module.name for module in pkgutil.walk_packages(elastic_ep.machines.__path__, prefix)}
    not_logged = {prefix + name for name in NOT_LOGGED}
    assert names > not_logged
    for name in names - not_logged:
        if name.startswith(UNLOGGED):
            continue
        module = importlib.import_module(name)
        classes(getattr(module, "Effect", None), found)
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                classes(value, found)
    return found


WORDS_OF_OUR_OWN = {
    "Case.when": "a chart's",
    "Death.status": "ProcessGone.status",
    "Outlook.reason": "another event's",
    "RankRecord.failed": "Reported.reason",
    "RankRecord.start_failure": "another event's, of a rank that has had no request",
    "StartFailed.reason": "RankRecord.start_failure",
    "Copied.error": "of a rank's slots' thread, which sees weights alone",
    "DeathNoticed.cause": "the controller's",
    "HostLost.cause": "the controller's",
    "Fault.reason": "the machine's: numbers of requests and places",
    "Fence.reason": "another event's",
    "Finish.reason": "as in Token.finish",
    "MemberDown.reason": "another event's",
    "MemberResumed.reason": "the membership machine's: one of two sentences, or an operator took his word back",
    "Verdict.stay": "one of two sentences",
    "NothingWillServe.reason": "of ranks that were lost: another event's",
    "ProcessGone.status": "an exit status or a signal, or why a process cannot be started",
    "RankDown.reason": "another event's",
    "RankMoved.reason": "another event's",
    "Refuse.detail": "NothingWillServe.reason",
    "Refuse.reason": "one of three words",
    "Reported.reason": "masked by the controller if the rank has had requests",
    "RankReport.reason": "StepsFailed.reason",
    "StepsFailed.reason": "masked by the rank before it logs it",
    "RankRecord.fenced": "another event's",
    "RankRecord.reason": "another event's",
    "Suspect.reason": "the machine's",
    "Suspected.reason": "the controller's; of a protocol error masked",
    "Token.finish": "one of three words",
}
"""Every text in events, effects and states that is logged as it is, and why no client's text can be in it."""


def test_every_text_that_is_logged_is_known() -> None:
    """A new field with text is to be marked `PRIVATE`, or to be explained here."""
    texts = set()
    for cls in logged():
        hints = typing.get_type_hints(cls)
        names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(hints)
        for name, blank in zip(names, blanks(cls), strict=True):
            hint = hints[name]
            kinds = [hint, *typing.get_args(hint)]
            if blank is None and any(kind in (str, bytes, Any, dict, object) for kind in kinds):
                texts.add(f"{cls.__name__}.{name}")
    unknown = {text for text in texts if text not in WORDS_OF_OUR_OWN}
    assert not unknown


COUNTS = {
    "Cached.tokens",
    "FromCache.tokens",
    "Request.emitted_before",
    "SamplingParams.max_tokens",
    "SamplingParams.min_tokens",
}


def test_every_token_is_marked() -> None:
    """By its name: what has to do with tokens and is no number of them, nor of records that say themselves."""
    found = set()
    for cls in logged():
        hints = typing.get_type_hints(cls)
        names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(hints)
        for name, blank in zip(names, blanks(cls), strict=True):
            plain = not classes(hints[name], set())
            if blank is None and plain and re.search("token|prompt|emitted|seed|logprob$|bias|text", name):
                found.add(f"{cls.__name__}.{name}")
    assert found == COUNTS


def test_what_marks_nobody_would_find_are_refused() -> None:
    from elastic_ep.wire.privacy import TokenId

    @dataclasses.dataclass
    class Wrong:
        pairs: dict[int, TokenId]

    Wrong.__annotations__["pairs"] = dict[int, TokenId]
    with pytest.raises(TypeError, match=r"Wrong\.pairs"):
        blanks(Wrong)


@given(st.lists(st.integers(0, 200_000), min_size=1), st.text("abc xyz'\"", max_size=20))
def test_masked_words_hold_no_numbers(numbers: list[int], quoted: str) -> None:
    text = masked(f"IndexError: index {numbers[0]} of {numbers} is wrong: {quoted!r}")
    assert not re.search(r"\d", text)
    assert text.startswith("IndexError: index _ of ")


def test_a_blank_is_no_way_to_fill_the_memory() -> None:
    assert json.loads('[{"blank":3}]', object_hook=expanded) == [[0, 0, 0]]
    for length in ("-1", str(MAX_BLANK + 1), "true", '"x"', "1.5"):
        with pytest.raises(ValueError, match="blank"):
            json.loads(f'{{"blank":{length}}}', object_hook=expanded)


# Whose it is


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o277, 0o777])
def test_only_the_owner_may_read_it_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = write(tmp_path / "made" / "run", 1, 2000, max_bytes=200_000)
    finally:
        os.umask(before)
    assert len(contents(folder)) > 1
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert [stat.S_IMODE(place.stat().st_mode) for place in (folder, folder.parent)] == [0o700, 0o700]


def test_off_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, mode in ((tmp_path / "runs" / "x", EventLogMode.OFF), (None, EventLogMode.IDS)):
        log = EventLog(folder, mode)
        log.begin({}, {})
        log.record("routing", ev.StopRequested(), [])
        log.note("fact", value=1)
        log.flush()
        log.close()
        assert log.path is None
    assert list(tmp_path.iterdir()) == []
    assert main([str(tmp_path)]) == UNREADABLE
    assert "--event-log off" in capsys.readouterr().err


def test_a_run_that_did_not_begin_leaves_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    assert (tmp_path / "run" / CURRENT).exists()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_flags() -> None:
    assert parse([]).event_log_mode is EventLogMode.IDS
    assert parse(["--event-log", "full"]).event_log_mode is EventLogMode.FULL
    assert parse(["--disable-fault-tolerance"]).event_log_mode is EventLogMode.OFF
    assert parse(["--disable-fault-tolerance", "--event-log", "off"]).event_log_mode is EventLogMode.OFF
    with pytest.raises(ConfigError, match=r"--event-log ids.*--disable-fault-tolerance"):
        parse(["--disable-fault-tolerance", "--event-log", "ids"])
    with pytest.raises(ConfigError, match="--event-log-max-mb -1"):
        ServeConfig(ranks=1, model="x", event_log_max_mb=-1)


# How long it may be


@settings(max_examples=15, deadline=None, phases=[Phase.generate])  # to shrink a run takes minutes
@given(
    seed=st.integers(0, 1 << 32),
    events=st.integers(500, 1500),
    max_bytes=st.integers(60_000, 200_000),
    mode=st.sampled_from([EventLogMode.IDS, EventLogMode.FULL]),
)
def test_it_stays_within_its_limit_and_what_is_left_replays(
    tmp_path_factory: pytest.TempPathFactory, seed: int, events: int, max_bytes: int, mode: EventLogMode
) -> None:
    """Whole, and from any of its files on."""
    most = 0
    write_all = log_files.LogFiles.write

    def measured(self: log_files.LogFiles, data: bytes) -> None:
        nonlocal most
        write_all(self, data)
        most = max(most, sum(file.stat().st_size for file in self.path.parent.iterdir()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_files.LogFiles, "write", measured)
        folder = write(tmp_path_factory.mktemp("logs") / "run", seed, events, mode, max_bytes=max_bytes)
    assert most <= max_bytes
    assert main([str(folder), "--quiet"]) == SAME
    for file in folder.iterdir():
        assert main([str(file), "--quiet"]) == SAME


def test_a_line_that_cannot_fit_ends_the_log_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", 1, 500, max_bytes=3000)
    assert main([str(folder), "--quiet"]) == SAME
    assert sum(map(len, contents(folder).values())) <= 3000


# A changed one is refused


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = contents(write(tmp_path_factory.mktemp("logs") / "run", 7, 3000, max_bytes=120_000))
    assert segment_name(1) not in files, "the oldest is gone"
    assert len(files) >= 4
    return files


def copy(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_missing_file_is_named(
    rotated: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing in sorted(rotated.keys() - {CURRENT}):
        folder = copy({name: data for name, data in rotated.items() if name != missing}, tmp_path / "run")
        assert main([str(folder), "--quiet"]) == DIFFERS
        assert f"{missing} is missing" in capsys.readouterr().err


def test_a_file_cut_anywhere_but_the_last_is_refused(
    rotated: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = sorted(rotated)[1]
    data = rotated[name]
    lines = [at + 1 for at, byte in enumerate(data[:-1]) if byte == 10]
    for cut in (len(data) - 1, len(data) - 30, lines[-1], lines[len(lines) // 2], lines[0], 20, 0):
        folder = copy({**rotated, name: data[:cut]}, tmp_path / "run")
        assert main([str(folder), "--quiet"]) == DIFFERS
        assert name in capsys.readouterr().err


def test_the_last_file_may_be_cut_anywhere(
    rotated: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rotated[CURRENT]
    for cut in (0, 10, len(data) // 3, len(data) - 1):
        folder = copy({**rotated, CURRENT: data[:cut]}, tmp_path / "run")
        assert main([str(folder), "--quiet"]) == SAME
        assert "cut off" in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(
    rotated: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(rotated)))
    place = data.draw(st.integers(0, len(rotated[name]) - 2))
    changed = bytearray(rotated[name])
    changed[place] ^= data.draw(st.integers(1, 255))
    folder = copy({**rotated, name: bytes(changed)}, tmp_path_factory.mktemp("logs") / "run")
    assert main([str(folder), "--quiet"]) in (DIFFERS, UNREADABLE)


def test_another_state_is_refused_even_with_its_checksum_mended(
    rotated: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zlib

    names = [*sorted(rotated.keys() - {CURRENT}), CURRENT]
    last = rotated[CURRENT].splitlines()
    checksum, out = json.loads(last[0])["after"], []
    for line in last:
        body = re.sub(rb'"replays":\d+', b'"replays":77', line.rpartition(b',"crc":')[0]) + b"}"
        checksum = zlib.crc32(body, checksum)
        out.append(b'%s,"crc":%d}\n' % (body[:-1], checksum))
    folder = copy({**rotated, CURRENT: b"".join(out)}, tmp_path / "run")
    assert main([str(folder), "--quiet"]) == DIFFERS
    told = capsys.readouterr().err
    assert "state of routing, replays" in told
    assert names[-1] in told


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"format": 99}, UNREADABLE, "format 99"),
        ({"format": 2}, UNREADABLE, "format 2"),
        ({"version": "0.0.7"}, SAME, "same"),
        ({"version": "0.0.7", "machines": {"routing": {}}}, UNREADABLE, "0.0.7"),
        ({"version": "0.0.7", "machines": {"unheard": {}}}, UNREADABLE, "0.0.7"),
    ],
)
def test_logs_of_other_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], status: int, said: str
) -> None:
    log = EventLog(tmp_path / "run")
    machine = RoutingMachine(CONFIG)
    config = {"machines": {"routing": {"config": ["RoutingConfig", *dataclasses.astuple(CONFIG)]}}}
    log.begin({**config, **change}, {"routing": machine})
    event = ev.RankUp(Member(0, 1))
    log.record("routing", event, machine.step(event))
    log.close()
    assert main([str(tmp_path / "run"), "--quiet"]) == status
    told = capsys.readouterr()
    assert said in told.out + told.err


def test_a_difference_under_another_version_says_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(tmp_path / "run")
    machine = RoutingMachine(CONFIG)
    config = {"machines": {"routing": {"config": ["RoutingConfig", *dataclasses.astuple(CONFIG)]}}}
    log.begin({**config, "version": "0.0.7"}, {"routing": machine})
    log.record("routing", ev.RankUp(Member(0, 1)), [ev.Drained()])
    log.close()
    assert main([str(tmp_path / "run"), "--quiet"]) == DIFFERS
    assert "the log is of elastic_ep 0.0.7" in capsys.readouterr().err


# A disk that is full, or hangs


def lines_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_a_full_disk_ends_the_log_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = 4000
    real = os.write

    def almost_full(fd: int, data: Any) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(left, len(data))
        left -= taken
        return real(fd, data[:taken])

    monkeypatch.setattr(os, "write", almost_full)
    folder = write(tmp_path / "run", 1, 300)
    assert lines_of(capsys).count("the event log ends here") == 1
    assert len(contents(folder)[CURRENT]) == 4000
    assert main([str(folder), "--quiet"]) == SAME
    assert "cut off" in capsys.readouterr().out


def test_nobody_waits_for_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "run")
    log.begin({"version": "0.1.0"})

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(log_writer, "PATIENCE_S", 600.0)  # more than the test has
    log.note("anything")
    log.flush()
    log.flush()
    log.close()


def test_a_disk_that_hangs_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one who records never waits, and does not keep lines for ever."""
    hangs, goes_on = threading.Event(), threading.Event()
    real = log_files.LogFiles.write

    def write_slowly(self: log_files.LogFiles, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            hangs.set()
            assert goes_on.wait(30)
        real(self, data)

    monkeypatch.setattr(log_files.LogFiles, "write", write_slowly)
    monkeypatch.setattr(log_writer, "MAX_PENDING", 100)
    log = EventLog(tmp_path / "run")
    log.begin({})
    log.note("first")
    assert hangs.wait(30)
    for number in range(1000):
        log.note("more", number=number)
    assert lines_of(capsys).count("the event log ends here") == 1
    goes_on.set()
    log.close()
    assert (tmp_path / "run" / CURRENT).read_bytes().count(b"\n") >= 2


def test_what_cannot_be_encoded_ends_the_log_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(tmp_path / "run")
    log.begin({})
    log.note("odd", value=object())
    log.flush()
    log.note("more")
    log.close()
    assert "the event log ends here" in lines_of(capsys)
    assert (tmp_path / "run" / CURRENT).read_bytes().count(b"\n") == 1


def test_a_reason_that_is_no_whole_text_is_logged_all_the_same(tmp_path: Path) -> None:
    """What a rank says of a file may hold bytes of its name that are no characters."""
    folder = tmp_path / "run"
    log = EventLog(folder)
    log.begin({"machines": {"routing": {"config": ["RoutingConfig", *dataclasses.astuple(CONFIG)]}}})
    machine = RoutingMachine(CONFIG)
    for event in (ev.NothingWillServe("no such file: é\udcff"), ev.RankUp(Member(0, 1))):
        log.record("routing", event, machine.step(event))
    log.close()
    assert contents(folder)[CURRENT].count(b"\n") == 3
    assert main([str(folder), "--quiet"]) == SAME


@pytest.mark.parametrize("effects_in_a_turn", [0, 1 << 20])
def test_what_is_encoded_bit_by_bit_or_by_the_thread_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effects_in_a_turn: int
) -> None:
    at_once = write(tmp_path / "at_once", 5, 120)
    monkeypatch.setattr(log_writer, "_EFFECTS_IN_A_TURN", effects_in_a_turn)
    monkeypatch.setattr(log_writer, "SLICE_S", 0.0)
    monkeypatch.setattr(log_writer, "SHARE", 0.0)
    monkeypatch.setattr(log_writer, "_LINES_AT_ONCE", 7)
    due: list[Callable[[], None]] = []
    turns = 0
    begin = EventLog.begin

    def begin_with_a_loop(self: EventLog, run: Any, machines: Any) -> None:
        begin(self, run, machines, lambda _seconds, call: due.append(call))

    monkeypatch.setattr(EventLog, "begin", begin_with_a_loop)

    def turn(seed: int, events: int) -> Iterator[Callable[[RoutingMachine], ev.Event]]:
        nonlocal turns
        for then in stories(seed, events):
            yield then
            assert len(due) == 1, "once, however much waits"
            if turns % 3:
                due.pop()()
            turns += 1

    stories = story
    monkeypatch.setattr(f"{__name__}.story", turn)
    bit_by_bit = write(tmp_path / "bit_by_bit", 5, 120)
    assert turns > 100
    assert contents(at_once) == contents(bit_by_bit)


def test_states_are_taken_when_all_events_are_recorded(tmp_path: Path) -> None:
    """A record may come between another machine's event and its record; what is called soon comes after both."""
    due: list[Callable[[], None]] = []
    machine = RoutingMachine(CONFIG)
    log = EventLog(tmp_path / "run", max_bytes=20_000)
    config = {"machines": {"routing": {"config": ["RoutingConfig", *dataclasses.astuple(CONFIG)]}}}
    log.begin(config, {"routing": machine}, lambda _seconds, call: due.append(call))
    for then in story(2, 200):
        event = then(machine)
        effects = machine.step(event)
        log.note("of another")
        log.record("routing", event, effects)
        for call in list(due):
            due.remove(call)
            call()
        log.flush()
    log.close()
    assert len(contents(tmp_path / "run")) > 2
    assert main([str(tmp_path / "run"), "--quiet"]) == SAME
