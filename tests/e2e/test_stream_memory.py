"""What a lost rank had computed is not computed again: streams go on from pages on the shelf, whenever a rank dies, and
whatever has become of the pages. Each text is compared with that of a server where nothing is kept and nobody dies.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from train.problems import held_out

from elastic_ep.config import PAGE_SIZE
from elastic_ep.kv.shelf_file import ShelfLayout
from tests.e2e import mortal_server
from tests.kit.served import MODEL, Server, Stamps, chat, counters, http, server, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

RANKS = 4
STREAMS = 6
PROBLEMS = 2
"""In a prompt, and one more: some 300 tokens."""
ANSWER = 48
CACHE_PAGES = 66
"""Of a rank: room for two streams and a half. So pages of earlier cases are evicted all the time."""
DEADLINE_S = 60.0
_PROBLEMS = [f"{problem.question} {problem.solution}" for problem in held_out(64)]


def question(number: int, *, prefix: int | None = None) -> str:
    """No two share a page, those with the same `prefix` their beginning."""
    draw = random.Random(number if prefix is None else -prefix)
    shared = " ".join(draw.sample(_PROBLEMS, PROBLEMS))
    return f"Set {number if prefix is None else prefix}. {shared} {_PROBLEMS[number % len(_PROBLEMS)]}"


def sampling(number: int) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}


class Streams:
    """All of one case at once, half of them greedy, half sampled."""

    def __init__(self, session: aiohttp.ClientSession, url: str, case: int, count: int) -> None:
        self._stamps = [Stamps() for _ in range(count)]
        self._tasks = [
            asyncio.create_task(
                chat(
                    session,
                    url,
                    question(100 * case + index),
                    stamps=stamps,
                    max_tokens=ANSWER,
                    ignore_eos=True,
                    **sampling(index),
                )
            )
            for index, stamps in enumerate(self._stamps)
        ]

    async def begun(self, least: int) -> None:
        """So many have text."""
        async with asyncio.timeout(DEADLINE_S):
            begun = asyncio.as_completed([stamps.reach() for stamps in self._stamps])
            for _, one in zip(range(least), begun, strict=False):
                await one
        assert not all(task.done() for task in self._tasks), "nothing is left to be disturbed"

    async def texts(self) -> list[str]:
        async with asyncio.timeout(DEADLINE_S):
            return list(await asyncio.gather(*self._tasks))


Fault = Callable[[aiohttp.ClientSession, str], Awaitable[None]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Nothing is shared here, and until the last test nobody dies."""
    with server(["--ranks", "2", "--no-enable-prefix-caching"], tmp_path_factory.mktemp("plain")) as running:
        yield running


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--ranks", str(RANKS), "--num-gpu-blocks-override", str(CACHE_PAGES)]
    with server(arguments, tmp_path_factory.mktemp("keeping"), mortal_server.__name__) as running:
        yield running


def undisturbed(plain: Server, case: int, count: int = STREAMS) -> list[str]:
    async def ask() -> list[str]:
        async with http() as session:
            return await Streams(session, plain.url, case, count).texts()

    return asyncio.run(ask())


def disturbed(
    target: Server, case: int, fault: Fault, *, count: int = STREAMS, begun: int | None = None
) -> tuple[list[str], dict[str, int]]:
    """The texts when the fault strikes while all streams run, or `begun` of them, and what was counted from then on."""

    async def ask() -> tuple[list[str], dict[str, int]]:
        async with http() as session:
            await until_full(session, target.url)
            streams = Streams(session, target.url, case, count)
            await streams.begun(begun or count)
            before = await counters(session, target.url)
            await fault(session, target.url)
            texts = await streams.texts()
            counted = await counters(session, target.url)
            counted.subtract(before)
            await until_full(session, target.url)
            return texts, counted

    return asyncio.run(ask())


async def send(session: aiohttp.ClientSession, url: str, rank: int, way: signal.Signals) -> int:
    """The incarnation that got it."""
    engine = (await status(session, url))["engines"][rank]
    os.kill(engine["pid"], way)
    return int(engine["incarnation"])


async def loads(session: aiohttp.ClientSession, url: str) -> list[int]:
    """Of each rank, the streams that it has."""
    return [engine["running"] for engine in (await status(session, url))["engines"]]


def one_dies(way: signal.Signals) -> Fault:
    """One that has most to do."""

    async def fault(session: aiohttp.ClientSession, url: str) -> None:
        running = await loads(session, url)
        rank = running.index(max(running))
        incarnation = await send(session, url, rank, way)
        await until_full(session, url, beyond={rank: incarnation})

    return fault


def computed_again(counted: dict[str, int]) -> int:
    return counted["prefix_cache_queries"] - counted["prefix_cache_hits"]


def test_what_has_been_stored_is_not_computed_again(plain: Server, keeping: Server) -> None:
    texts, counted = disturbed(keeping, 1, one_dies(mortal_server.ALL_STORED))
    assert texts == undisturbed(plain, 1)
    moved = counted["requests_replayed"]
    assert moved >= 1
    assert moved <= computed_again(counted) <= PAGE_SIZE * moved
    assert counted["shelf_pages_fetched"] >= moved


@pytest.mark.parametrize("way", [mortal_server.IN_READ, mortal_server.IN_PUT])
def test_a_rank_dies_while_it_copies_a_page_to_the_shelf(
    plain: Server, keeping: Server, way: signal.Signals
) -> None:
    case = 2 + (way is mortal_server.IN_PUT)
    texts, counted = disturbed(keeping, case, one_dies(way))
    assert texts == undisturbed(plain, case)
    assert counted["shelf_pages_fetched"] >= counted["requests_replayed"] >= 1
    assert counted["shelf_pages_bad"] == 0, "what is unfinished is not there, and nothing else is wrong"


def test_a_rank_dies_while_it_copies_pages_from_the_shelf(plain: Server, keeping: Server) -> None:
    """It takes over a stream from one that dies, and dies itself when the first page of that is in its cache."""

    async def fault(session: aiohttp.ClientSession, url: str) -> None:
        running = await loads(session, url)
        heir, other = running.index(min(running)), running.index(max(running))
        assert running[heir] < running[other], "then it is the heir"
        lost = {heir: await send(session, url, heir, mortal_server.IN_WRITE)}
        lost[other] = await send(session, url, other, signal.SIGKILL)
        await until_full(session, url, beyond=lost)

    texts, counted = disturbed(keeping, 4, fault)
    assert texts == undisturbed(plain, 4)
    assert counted["rank_losses"] == 2
    assert counted["shelf_pages_bad"] == 0


def test_two_ranks_one_after_the_other(plain: Server, keeping: Server) -> None:
    """The second when the streams of the first have been given to others."""

    async def fault(session: aiohttp.ClientSession, url: str) -> None:
        replayed = (await counters(session, url))["requests_replayed"]
        lost = {2: await send(session, url, 2, signal.SIGKILL)}
        async with asyncio.timeout(DEADLINE_S):
            while (await counters(session, url))["requests_replayed"] == replayed:
                await asyncio.sleep(0)
        lost[3] = await send(session, url, 3, signal.SIGKILL)
        await until_full(session, url, beyond=lost)

    texts, counted = disturbed(keeping, 5, fault)
    assert texts == undisturbed(plain, 5)
    assert counted["rank_losses"] == 2
    assert counted["shelf_pages_fetched"] >= 2


def spoil(target: Server, region: int, page_bytes: int) -> int:
    """Change a byte of every page that a rank has put on the shelf; how many there were."""
    folder = Path(f"/proc/{target.process.pid}/fd")
    (shelf,) = [link for link in folder.iterdir() if "elastic_ep shelf" in os.readlink(link)]
    fd = os.open(shelf, os.O_RDWR)
    try:
        layout = layout_of(os.fstat(fd).st_size, page_bytes)
        slots = layout.counts(fd)[region].slots
        for slot in range(slots):
            place = layout.page_at(region, slot) + page_bytes // 2
            os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 1]), place)
    finally:
        os.close(fd)
    return slots


def layout_of(size: int, page_bytes: int) -> ShelfLayout:
    slots = bisect_left(
        range(size // page_bytes), size, key=lambda n: ShelfLayout(RANKS, n, page_bytes).total
    )
    layout = ShelfLayout(RANKS, slots, page_bytes)
    assert layout.total == size
    return layout


def test_pages_that_have_gone_bad_are_dropped_and_computed(plain: Server, keeping: Server) -> None:
    victim = 1

    async def fault(session: aiohttp.ClientSession, url: str) -> None:
        seen = await counters(session, url, victim)
        assert spoil(keeping, victim, seen["shelf_bytes"] // seen["shelf_pages"]) > 0
        incarnation = await send(session, url, victim, signal.SIGKILL)
        await until_full(session, url, beyond={victim: incarnation})

    texts, counted = disturbed(keeping, 6, fault)
    assert texts == undisturbed(plain, 6)
    assert counted["shelf_pages_bad"] > 0
    assert computed_again(counted) > PAGE_SIZE * counted["requests_replayed"]


def test_a_rank_that_is_back_has_the_pages_of_its_previous_life(plain: Server, keeping: Server) -> None:
    """They were stored by nobody else."""
    prefix, first, count, tokens = 777, 700, 4 * RANKS, 4

    def ask(session: aiohttp.ClientSession, url: str, number: int) -> Awaitable[str]:
        text = question(first + number, prefix=prefix)
        return chat(session, url, text, max_tokens=tokens, **sampling(number))

    async def stored(session: aiohttp.ClientSession) -> list[int]:
        return [(await counters(session, keeping.url, rank))["shelf_pages_stored"] for rank in range(RANKS)]

    async def again() -> list[str]:
        async with http() as session:
            asked = (await counters(session, keeping.url))["prompt_tokens"]
            before = await stored(session)
            await ask(session, keeping.url, 0)
            pages = ((await counters(session, keeping.url))["prompt_tokens"] - asked) // PAGE_SIZE
            async with asyncio.timeout(DEADLINE_S):
                while sum(after := await stored(session)) < sum(before) + pages:
                    await asyncio.sleep(0.01)
            (owner,) = [rank for rank in range(RANKS) if after[rank] > before[rank]]
            incarnation = await send(session, keeping.url, owner, signal.SIGKILL)
            await until_full(session, keeping.url, beyond={owner: incarnation})
            fetched = (await counters(session, keeping.url, owner))["shelf_pages_fetched"]
            texts = await asyncio.gather(*(ask(session, keeping.url, number) for number in range(count)))
            assert (await counters(session, keeping.url, owner))["shelf_pages_fetched"] > fetched
            return list(texts)

    async def expected() -> list[str]:
        async with http() as session:
            return list(await asyncio.gather(*(ask(session, plain.url, number) for number in range(count))))

    assert asyncio.run(again()) == asyncio.run(expected())


async def whole(url: str, number: int) -> tuple[str, int, int]:
    """The text, tokens of the prompt, and how many of these were cached, of questions that begin alike."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question(number, prefix=888)}],
        "max_tokens": 16,
        **sampling(number),
    }
    async with http() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        answer = await response.json()
    usage = answer["usage"]
    details = usage["prompt_tokens_details"] or {"cached_tokens": 0}
    text: str = answer["choices"][0]["message"]["content"]
    return text, usage["prompt_tokens"], details["cached_tokens"]


def test_a_second_request_with_the_same_prefix(plain: Server, keeping: Server) -> None:
    for number in (800, 801, 802):  # greedy and sampled
        text, tokens, cached = asyncio.run(whole(keeping.url, number))
        wanted, _, never = asyncio.run(whole(plain.url, number))
        assert text == wanted
        assert never == 0, "--no-enable-prefix-caching"
        if number == 800:
            assert cached < PAGE_SIZE, "nobody has asked this before"
        else:
            assert tokens // 2 < cached < tokens


def test_while_pages_are_evicted(plain: Server, keeping: Server) -> None:
    """Three streams are more than a rank's cache holds; the survivors get more. Asked again, some pages are there."""
    count = 3 * RANKS
    expected = undisturbed(plain, 9, count)
    for _ in range(2):
        texts, counted = disturbed(keeping, 9, one_dies(signal.SIGKILL), count=count, begun=count // 2)
        assert texts == expected
        assert counted["kv_cache_evictions"] > 0
        assert counted["shelf_pages_fetched"] >= counted["requests_replayed"] >= 1


def test_a_full_shelf(plain: Server, tmp_path: Path) -> None:
    """There is room for a few pages of each rank: streams that move compute what has given way."""
    with server(["--ranks", "2", "--kv-shelf-gib", "0.002"], tmp_path) as target:
        texts, counted = disturbed(target, 10, one_dies(signal.SIGKILL))

        async def dropped() -> int:
            async with http() as session:
                return (await counters(session, target.url))["shelf_pages_dropped"]

        assert asyncio.run(dropped()) > 0
    assert texts == undisturbed(plain, 10)
    assert computed_again(counted) > PAGE_SIZE * counted["requests_replayed"]


def test_what_is_not_shared_is_kept_for_its_own_stream(plain: Server) -> None:
    texts = undisturbed(plain, 11)
    again, counted = disturbed(plain, 11, one_dies(signal.SIGKILL))
    assert again == texts
    assert counted["shelf_pages_fetched"] >= counted["requests_replayed"] >= 1
