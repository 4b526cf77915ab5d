"""Kill -9, kill -STOP, pairs and joiners under load: no error, no other text, everything back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
from train.problems import held_out

from elastic_ep.replay import main as replay
from tests.e2e.conftest import ADMIN_KEY
from tests.kit.guided_asks import guided_asks
from tests.kit.harness import title
from tests.kit.served import Server, Stamps, begun, chat, counters, http, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

QUESTIONS = [problem.question for problem in held_out(16)]
GUIDED = guided_asks(12)
Texts = dict[int, str]


async def answer_all(session: aiohttp.ClientSession, url: str, started: asyncio.Event | None = None) -> Texts:
    """Every question at once, half greedy, half sampled; `started` is set when half of them stream."""
    streaming = 0

    async def one(index: int) -> str:
        nonlocal streaming
        stamps = Stamps()
        how = {"temperature": 0.0} if index % 2 else {"temperature": 1.2, "seed": index}
        task = asyncio.create_task(
            chat(session, url, QUESTIONS[index], stamps=stamps, max_tokens=100, ignore_eos=True, **how)
        )
        await begun(task, stamps)
        streaming += 1
        if started and streaming >= len(QUESTIONS) // 2:
            started.set()
        return await task

    texts = await asyncio.gather(*(one(index) for index in range(len(QUESTIONS))))
    return dict(enumerate(texts))


@pytest.fixture(scope="module")
def expected(serving: Server) -> Texts:
    """The texts before anything has happened: later faults must not have changed them either."""

    async def undisturbed() -> Texts:
        async with http() as session:
            await until_full(session, serving.url)
            return await answer_all(session, serving.url)

    return asyncio.run(undisturbed())


async def with_fault(url: str, fault: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> Texts:
    """The texts when the fault strikes while all streams run."""
    async with http() as session:
        await until_full(session, url)
        started = asyncio.Event()
        streams = asyncio.create_task(answer_all(session, url, started))
        await asyncio.wait_for(started.wait(), 60)
        await fault(session)
        disturbed = await asyncio.wait_for(streams, 120)
        await until_full(session, url)
        return disturbed


def send(
    url: str, ranks: list[int], number: signal.Signals
) -> Callable[[aiohttp.ClientSession], Awaitable[None]]:
    async def fault(session: aiohttp.ClientSession) -> None:
        engines = (await status(session, url))["engines"]
        for rank in ranks:
            os.kill(engines[rank]["pid"], number)

    return fault


@pytest.mark.parametrize("rank", [0, 5])
def test_a_killed_rank_costs_no_token(serving: Server, expected: Texts, rank: int) -> None:
    disturbed = asyncio.run(with_fault(serving.url, send(serving.url, [rank], signal.SIGKILL)))
    assert disturbed == expected


def test_ranks_leave_and_come_back_and_no_client_notices(serving: Server, expected: Texts) -> None:
    """Their streams move in mid-answer; a rank that is not asked to go keeps its process."""

    async def fault(session: aiohttp.ClientSession) -> None:
        async def scale(size: int) -> dict[str, Any]:
            body = {"new_data_parallel_size": size, "drain_timeout": 0}
            who = {"Authorization": f"Bearer {ADMIN_KEY}"}
            async with session.post(f"{serving.url}/scale_elastic_ep", json=body, headers=who) as response:
                assert response.status == 200, await response.text()
                told: dict[str, Any] = await response.json()
                return told

        assert (await scale(6))["ranks"] == [0, 1, 2, 3, 4, 5]
        told = await status(session, serving.url)
        assert (told["state"], told["data_parallel_size"], told["scaling"]) == ("Serving", 6, False)
        assert [engine["state"] for engine in told["engines"][6:]] == ["Stopped", "Stopped"]
        assert [engine["last_loss"] for engine in told["engines"]] == losses
        assert (await scale(8))["ranks"] == list(range(8))

    before = asyncio.run(engines(serving.url))
    losses = asyncio.run(last_losses(serving.url))
    disturbed = asyncio.run(with_fault(serving.url, fault))
    after = asyncio.run(engines(serving.url))
    assert disturbed == expected
    assert [rank for rank, pid in after.items() if pid != before[rank]] == [6, 7]


async def last_losses(url: str) -> list[Any]:
    async with http() as session:
        return [engine["last_loss"] for engine in (await status(session, url))["engines"]]


def test_a_killed_agent_costs_nothing_and_the_next_one_tells_of_a_killed_rank(
    serving: Server, expected: Texts
) -> None:
    async def fault(session: aiohttp.ClientSession) -> None:
        before = (await status(session, serving.url))["engines"]
        agent = next(child for child in psutil.Process(serving.process.pid).children() if is_agent(child))
        agent.kill()
        os.kill(before[4]["pid"], signal.SIGKILL)

    before = asyncio.run(engines(serving.url))
    disturbed = asyncio.run(with_fault(serving.url, fault))
    after = asyncio.run(engines(serving.url))
    assert disturbed == expected
    assert [pid for rank, pid in after.items() if rank != 4] == [
        pid for rank, pid in before.items() if rank != 4
    ]
    assert after[4] != before[4]


def is_agent(process: psutil.Process) -> bool:
    return "host agent" in title(process.pid)


async def engines(url: str) -> dict[int, int]:
    """The pid of each rank."""
    async with http() as session:
        return {engine["id"]: engine["pid"] for engine in (await until_full(session, url))["engines"]}


def test_a_stopped_rank_is_fenced_and_costs_no_token(serving: Server, expected: Texts) -> None:
    disturbed = asyncio.run(with_fault(serving.url, send(serving.url, [2], signal.SIGSTOP)))
    assert disturbed == expected


def test_more_ranks_than_there_are_copies_hold_the_requests(serving: Server, expected: Texts) -> None:
    """Six of eight: some expert has no copy left, so requests wait until ranks are back."""
    ranks = [0, 1, 2, 3, 4, 5]
    disturbed = asyncio.run(with_fault(serving.url, send(serving.url, ranks, signal.SIGKILL)))
    assert disturbed == expected


def test_all_ranks_at_once(serving: Server, expected: Texts) -> None:
    disturbed = asyncio.run(with_fault(serving.url, send(serving.url, list(range(8)), signal.SIGKILL)))
    assert disturbed == expected


async def guided_answers(
    session: aiohttp.ClientSession, url: str, started: asyncio.Event | None = None
) -> list[str]:
    """To all of `GUIDED` at once; `started` is set when half of them are in mid-answer."""
    streaming = 0

    async def one(number: int) -> str:
        nonlocal streaming
        stamps = Stamps()
        fields = GUIDED[number].fields
        task = asyncio.create_task(chat(session, url, QUESTIONS[number], stamps=stamps, **fields))
        await begun(task, stamps, 10)
        streaming += 1
        if started and streaming >= len(GUIDED) // 2:
            started.set()
        return await task

    return await asyncio.gather(*map(one, range(len(GUIDED))))


def test_texts_that_follow_grammars_go_on_as_they_would_have(serving: Server) -> None:
    """And are valid, though the model has never seen JSON. The two ranks die that have most of them."""

    async def both() -> tuple[list[str], list[str]]:
        async with http() as session:
            await until_full(session, serving.url)
            undisturbed = await guided_answers(session, serving.url)
            before = (await counters(session, serving.url))["requests_replayed"]
            started = asyncio.Event()
            streams = asyncio.create_task(guided_answers(session, serving.url, started))
            await asyncio.wait_for(started.wait(), 60)
            engines = (await status(session, serving.url))["engines"]
            busiest = sorted(engines, key=lambda engine: engine["running"])[-2:]
            await send(serving.url, [engine["id"] for engine in busiest], signal.SIGKILL)(session)
            disturbed = await asyncio.wait_for(streams, 120)
            assert (await counters(session, serving.url))["requests_replayed"] > before
            await until_full(session, serving.url)
            return undisturbed, disturbed

    undisturbed, disturbed = asyncio.run(both())
    for ask, text in zip(GUIDED, disturbed, strict=True):
        assert ask.valid(text), text
    assert disturbed == undisturbed


async def scored(url: str, kill: list[int]) -> list[Any]:
    """Prompts with the log-probability of each token, and answers. Ranks are killed once half of them are computed."""
    scores = {"echo": True, "logprobs": 2, "prompt_logprobs": 1}
    async with http() as session:
        engines = (await until_full(session, url))["engines"]

        async def one(index: int) -> Any:
            prompt = " ".join(QUESTIONS[index : index + 3])
            body = {
                "prompt": prompt,
                "max_tokens": index % 3 * 20,
                "ignore_eos": True,
                "temperature": 0,
                **scores,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                return (await response.json())["choices"]

        tasks = [asyncio.create_task(one(index)) for index in range(12)]
        async with asyncio.timeout(60):
            while kill and not all(task.done() for task in tasks):
                if sum(engine["running"] for engine in (await status(session, url))["engines"]) >= 6:
                    break
        for rank in kill:
            os.kill(engines[rank]["pid"], signal.SIGKILL)
        async with asyncio.timeout(100):
            return await asyncio.gather(*tasks)


def test_prompts_are_scored_as_they_would_have_been(serving: Server) -> None:
    expected = asyncio.run(scored(serving.url, []))
    for (choice,) in expected:
        logprobs, told = choice["logprobs"]["token_logprobs"], choice["prompt_logprobs"]
        assert logprobs[0] is told[0] is None
        assert len(told) > 50
        for entry, logprob in zip(told[1:], logprobs[1:], strict=False):
            assert logprob in [one["logprob"] for one in entry.values()]
    assert asyncio.run(scored(serving.url, [1, 2, 4])) == expected


@pytest.mark.parametrize("state", ["Launching", "InitCUDA", "InitDist", "Joining"])
def test_a_killed_joiner_harms_nobody(serving: Server, expected: Texts, state: str) -> None:
    async def fault(session: aiohttp.ClientSession) -> None:
        before = (await status(session, serving.url))["engines"][3]
        os.kill(before["pid"], signal.SIGKILL)
        order = ["Launching", "InitCUDA", "InitDist", "Joining", "Serving"]
        async with asyncio.timeout(60):
            while True:
                now = (await status(session, serving.url))["engines"][3]
                newer = now["incarnation"] > before["incarnation"] and now["state"] in order
                if newer and now["pid"] and order.index(now["state"]) >= order.index(state):
                    os.kill(now["pid"], signal.SIGKILL)
                    return

    disturbed = asyncio.run(with_fault(serving.url, fault))
    assert disturbed == expected


def beats(events: Path) -> Counter[int]:
    """By rank, the heartbeats that say it is parked, in the whole log."""
    heard: Counter[int] = Counter()
    whole = events.read_text().rpartition("\n")[0]  # the last line may be on its way
    for line in whole.splitlines():
        if '"progress"' in line and (record := json.loads(line)).get("machine") == "progress":
            for (rank, _incarnation), *_, parked in record["heard"][-2]:
                heard[rank] += parked
    return heard


def test_an_idle_group_parks(serving: Server) -> None:
    async def parked() -> tuple[dict[str, Any], dict[str, Any]]:
        async with http() as session, asyncio.timeout(60):
            while not (first := await status(session, serving.url))["idle"]:
                await asyncio.sleep(0.05)
            before = await asyncio.to_thread(beats, serving.events)
            now = before
            # Twice, as the first may have been sent before.
            while min((now - before).get(rank, 0) for rank in range(8)) < 2:
                await asyncio.sleep(0.05)
                now = await asyncio.to_thread(beats, serving.events)
            return first, await status(session, serving.url)

    first, later = asyncio.run(parked())
    assert later["idle"]
    assert first["state"] == later["state"] == "Serving", "an idle group is well"
    assert (later["epoch"], later["step"]) == (first["epoch"], first["step"])


def test_the_official_client(serving: Server) -> None:
    problem = held_out(1)[0]
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        messages: Any = [{"role": "user", "content": problem.question}]
        whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
        stream = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    text = whole.choices[0].message.content
    assert text is not None
    assert text.endswith(f"#### {problem.answer}")
    assert "".join(pieces) == text


def test_metrics_and_log_tell_what_happened(serving: Server, capsys: pytest.CaptureFixture[str]) -> None:
    async def metrics() -> str:
        async with http() as session, session.get(f"{serving.url}/metrics") as response:
            return await response.text()

    text = asyncio.run(metrics())
    assert 'elastic_ep:rank_losses_total{cause="killed"}' in text
    assert 'elastic_ep:rank_losses_total{cause="hang"}' in text
    assert 'elastic_ep:rank_state{rank="0",state="Serving"} 1.0' in text
    assert replay([str(serving.run_dir)]) == 0, capsys.readouterr()
