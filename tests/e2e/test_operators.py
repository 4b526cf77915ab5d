"""What operators are told: one line a loss and a return, the last loss in the status, metrics, process titles.

Real ranks, killed, stopped and broken from outside; what is read is what a run writes to stderr, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from train.problems import held_out

from elastic_ep.group.port import LossCause
from elastic_ep.replay import replay
from tests.kit.served import Server, Stamps, chat, http, server, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

RANKS = 3
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Logged:
    """A server, and the lines that it has logged."""

    server: Server
    file: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        whole = self.file.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def about(self, event: str, rank: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event and line.get("rank") == rank]

    async def line(self, event: str, rank: str) -> dict[str, Any]:
        """The line, when it is there; more than one is a failure."""
        async with asyncio.timeout(DEADLINE_S):
            while not (found := self.about(event, rank)):
                await asyncio.sleep(0.02)
        assert len(found) == 1, found
        return found[0]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    folder = tmp_path_factory.mktemp("operators")
    file = folder / "stderr"
    arguments = ["--ranks", str(RANKS), "--log-format", "json", "--hang-deadline", "1"]
    with (
        file.open("w") as stderr,
        server(arguments, folder, module="tests.e2e.breakable", stderr=stderr) as running,
    ):
        yield Logged(running, file)


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ")


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def losses(samples: dict[str, float]) -> dict[str, float]:
    return {
        cause: samples[f'elastic_ep:rank_losses_total{{cause="{cause}"}}'] for cause in map(str, LossCause)
    }


async def lose(logged: Logged, rank: int, number: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Send the signal to a rank in mid-stream; its name, its line, and its last loss when it is back."""
    url = logged.server.url
    question = held_out(1)[0].question
    async with http() as session:
        engine = (await until_full(session, url))["engines"][rank]
        stamps = Stamps()
        streams = [
            asyncio.create_task(
                chat(session, url, question, stamps=stamps, max_tokens=120, ignore_eos=True, temperature=0.0)
            )
            for _ in range(2 * RANKS)
        ]
        async with asyncio.timeout(DEADLINE_S):
            await stamps.reach(5 * RANKS)
        os.kill(engine["pid"], number)
        name = f"{rank}.{engine['incarnation']}"
        line = await logged.line("rank lost", name)
        await asyncio.gather(*streams)
        full = await until_full(session, url, beyond={rank: engine["incarnation"]})
        return name, line, full["engines"][rank]


@pytest.mark.parametrize(
    ("number", "cause", "why"),
    [
        (signal.SIGKILL, "killed", r"killed by signal 9 \(SIGKILL\) from outside"),
        (signal.SIGSTOP, "hang", r"no sign of life|waited for it in vain|the group waits for it"),
        (signal.SIGUSR1, "exception", r"RuntimeError: broken on purpose"),
        (signal.SIGUSR2, "exit", r"exit status 7"),
        (signal.SIGTERM, "killed", r"killed by signal 15 \(SIGTERM\) from outside$"),
        (signal.SIGABRT, "crash", r"crashed by signal 6 \(SIGABRT\)"),
    ],
    ids=["kill", "hang", "exception", "exit", "term", "abort"],
)
def test_a_loss_is_one_line_with_its_cause_and_stays_in_the_status(
    logged: Logged, number: signal.Signals, cause: str, why: str
) -> None:
    async def both() -> tuple[Any, ...]:
        async with http() as session:
            before = losses(await metrics(session, logged.server.url))
            name, line, engine = await lose(logged, 1, number)
            return before, losses(await metrics(session, logged.server.url)), name, line, engine

    before, after, name, line, engine = asyncio.run(both())
    assert line["cause"] == cause
    assert re.search(why, line["why"]), line
    assert line["requests"] > 0
    heirs = dict(part.split(": ") for part in line["taken_over_by"].split(", "))
    assert sum(map(int, heirs.values())) == line["requests"]
    assert name not in heirs
    assert re.fullmatch(r"\d+ ms beyond a step", line["survivors_stalled"])
    last = engine["last_loss"]
    assert (last["cause"], last["why"], last["requests"]) == (cause, line["why"], line["requests"])
    assert last["state"] == "Serving"
    assert last["stall_s"] is not None
    assert last["back_after_s"] > 0
    assert datetime.fromisoformat(last["at"]).utcoffset() is not None
    assert len(logged.about("rank lost", name)) == 1
    assert len(logged.about("rank is back", f"1.{engine['incarnation']}")) == 1
    assert after == {**before, cause: before[cause] + 1}
    fenced = logged.about("rank fenced", name)
    assert len(fenced) == (cause == "hang"), "who is fenced is said once, and of nobody else"


def poisoned_before_the_stop(events: Path) -> int:
    """At the stop each rank leaves at a boundary of its own, which nobody can ask the metrics about any more."""
    before, stop, _ = events.read_text().partition('"StopRequested"')
    assert stop
    return before.count('"note":"poisoned_step"')


def test_series_are_there_before_the_first_loss_and_count_what_the_log_says(tmp_path: Path) -> None:
    async def story(logged: Logged) -> tuple[dict[str, float], dict[str, float]]:
        url = logged.server.url
        async with http() as session:
            await until_full(session, url)
            at_start = await metrics(session, url)
            await lose(logged, 2, signal.SIGKILL)
            await lose(logged, 0, signal.SIGKILL)
            return at_start, await metrics(session, url)

    file = tmp_path / "stderr"
    with (
        file.open("w") as stderr,
        server(["--ranks", "3", "--log-format", "json"], tmp_path, stderr=stderr) as running,
    ):
        logged = Logged(running, file)
        at_start, at_end = asyncio.run(story(logged))
    assert losses(at_start) == dict.fromkeys(map(str, LossCause), 0.0)
    assert at_start['elastic_ep:group_state{state="Serving"}'] == 1.0
    assert at_start['elastic_ep:group_state{state="Holding"}'] == 0.0
    assert at_start["elastic_ep:tolerates"] == 1.0
    assert at_start["elastic_ep:kv_cache_usage_perc"] == 0.0
    assert all(f'elastic_ep:rank_kv_cache_usage_perc{{rank="{rank}"}}' in at_start for rank in range(3))
    assert at_start.keys() == at_end.keys(), "a series that appears later has lost its first increase"

    timeline = replay(running.run_dir)
    by_cause = Counter(loss.reason.split(":")[0] for loss in timeline.losses)
    assert losses(at_end) == {**dict.fromkeys(map(str, LossCause), 0.0), **by_cause}
    assert timeline.counts["losses"] == 2
    assert at_end["elastic_ep:requests_replayed_total"] == timeline.counts["requests replayed"]
    assert at_end["elastic_ep:requests_moved_total"] == timeline.counts.get("requests moved", 0)
    assert at_end["elastic_ep:poisoned_steps_total"] == poisoned_before_the_stop(running.events)
    said = [line for line in logged.lines if line["event"] == "rank lost"]
    assert sum(line["requests"] for line in said) == sum(loss.requests for loss in timeline.losses)

    stopped = "\n".join(timeline.lines).partition("group: Stopping")[2]
    assert stopped.count("has ended, as asked") == 3
    assert stopped.count("Stopped (as asked)") == 3
    assert "death" not in stopped
    assert "died" not in stopped
    levels = Counter(line["level"] for line in logged.lines)
    assert levels == {"info": levels["info"], "warning": 2}, "a stop is no warning"
    assert [line["event"] for line in logged.lines[-2:]] == [
        "stopping: running requests finish first",
        "stopped",
    ]


def test_gauges_follow_the_work_and_fall_to_zero(logged: Logged) -> None:
    used = "elastic_ep:kv_cache_usage_perc"
    busy = ("elastic_ep:num_requests_running", used)

    async def story() -> tuple[dict[str, float], dict[str, Any]]:
        url = logged.server.url
        async with http() as session, asyncio.timeout(DEADLINE_S):
            await until_full(session, url)
            question = held_out(1)[0].question
            stream = asyncio.create_task(chat(session, url, question, max_tokens=200, ignore_eos=True))
            seen = await metrics(session, url)
            while not all(seen[name] > 0 for name in busy):
                await asyncio.sleep(0.01)
                seen = await metrics(session, url)
            stream.cancel()
            await asyncio.wait([stream])
            later = seen
            while any(later[name] for name in busy):
                await asyncio.sleep(0.02)
                later = await metrics(session, url)
            while not (now := await status(session, url))["idle"]:
                await asyncio.sleep(0.02)
            return seen, now

    seen, now = asyncio.run(story())
    by_rank = [seen[f'elastic_ep:rank_kv_cache_usage_perc{{rank="{rank}"}}'] for rank in range(RANKS)]
    assert seen[used] == pytest.approx(sum(by_rank) / RANKS)
    assert max(by_rank) <= 1.0
    assert now["state"] == "Serving", "an idle group is well"
    assert [engine["kv_cache_usage"] for engine in now["engines"]] == [0.0] * RANKS


def test_titles_say_which_process_is_which(logged: Logged) -> None:
    async def serving() -> dict[str, Any]:
        async with http() as session:
            return await until_full(session, logged.server.url)

    engines = asyncio.run(serving())["engines"]
    for engine in engines:
        assert title(engine["pid"]) == f"elastic_ep: rank {engine['id']}.{engine['incarnation']} Serving"
    run = logged.server.process.pid
    assert title(run).startswith("elastic_ep: run default at http://127.0.0.1:")
    parents = {
        int(Path(f"/proc/{engine['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        for engine in engines
    }
    (fork_server,) = parents
    assert title(fork_server).startswith("elastic_ep: fork server /")
    assert Path(f"/proc/{run}/comm").read_text() == "eep-run\n"


def test_the_group_says_when_it_holds_and_when_it_serves_again(tmp_path: Path) -> None:
    """Without redundant copies each loss takes experts away, until a survivor has read them anew."""

    async def story(logged: Logged) -> dict[str, Any]:
        async with http() as session:
            engine = (await until_full(session, logged.server.url))["engines"][1]
            os.kill(engine["pid"], signal.SIGKILL)
            return await until_full(session, logged.server.url, beyond={1: engine["incarnation"]})

    file = tmp_path / "stderr"
    flags = ["--ranks", "3", "--ep-num-redundant-experts", "0", "--log-format", "json"]
    with file.open("w") as stderr, server(flags, tmp_path, stderr=stderr) as running:
        logged = Logged(running, file)
        asyncio.run(story(logged))
    events = [line["event"] for line in logged.lines]
    first = events.index("the group serves")
    held = events.index("the group holds: experts have no copy")
    again = events.index("the group serves", first + 1)
    assert first < held < again
    assert "layer 0 expert" in logged.lines[held]["experts"]
    assert logged.lines[held]["level"] == "warning"
    (lost,) = logged.about("rank lost", "1.1")
    assert lost["requests"] == 0
    assert "survivors_stalled" not in lost
