"""Where a body is read changes nothing in the answer, and hurts nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ep.gateway import reading, text_worker, turns
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.guided import KnownGrammars
from elastic_ep.gateway.reading import INLINE_BYTES, BodyReader
from elastic_ep.gateway.text_worker import FATAL_S, TextWorker, WorkerSetup
from elastic_ep.group.port import Busy
from elastic_ep.machines.requests.prefixes import beginnings
from tests.gateway.conftest import Start, settings
from tests.gateway.fakes import sample_text
from tests.gateway.text.held_text import broken_text, held_text, text_after_a_death
from tests.kit.bound import Bound, run

pytestmark = pytest.mark.anyio
DEADLINE_S = 20.0
_SPAWN = text_worker._spawn


@pytest.fixture
def spawned(text_processes_are_forked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes start as they do in a server."""
    monkeypatch.setattr(text_worker, "_spawn", _SPAWN)


@pytest.fixture
async def worker(anyio_backend: str) -> AsyncIterator[TextWorker]:
    made = TextWorker(WorkerSetup(settings(), held_text))
    yield made
    await made.close()


def prompt(text: str) -> bytes:
    return json.dumps({"prompt": text}).encode()


class Held:
    """A body that the process reads until `release`."""

    def __init__(self, worker: TextWorker, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self._fd = -1
        self.answer = asyncio.create_task(worker.read("tokenize", prompt(f"hold {path}")))

    async def begun(self) -> Held:
        await until(self._opened)
        return self

    def _opened(self) -> bool:
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            return False
        return True

    def release(self) -> None:
        os.close(self._fd)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.005)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


BODIES: list[tuple[str, Any]] = [
    ("completion", {"prompt": "Anna has 12 apples.", "seed": 5, "max_tokens": 3}),
    ("completion", {"prompt": ["Anna", "Bob"], "n": 2, "seed": 1, "echo": True}),
    ("completion", {"prompt": [[1, 2, 3], [4]], "echo": True, "seed": 2, "stop": "x"}),
    ("completion", {"prompt": [[1, 2], [-4]]}),
    ("completion", {"prompt": "a" * 400}),
    ("completion", {"prompt": ""}),
    ("completion", {"prompt": "x", "temperature": "hot"}),
    ("completion", {"prompt": "x", "model": "another"}),
    ("completion", {}),
    ("chat", {"messages": [{"role": "user", "content": "Anna"}] * 3, "seed": 3, "logprobs": True}),
    ("chat", {"messages": [{"role": "user"}, {"role": "user", "content": [{"type": "image"}]}]}),
    ("chat", {"messages": "no"}),
    ("tokenize", {"prompt": "Anna has <|im_end|> é"}),
    ("tokenize", {"prompt": 5}),
    ("detokenize", {"tokens": [40, 41, 42]}),
    ("detokenize", {"tokens": [100000]}),
    ("detokenize", [1]),
]


async def outcome(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except ApiError as error:
        return error.status, error.body(), error.headers


@pytest.mark.parametrize("page_size", [0, 4])
async def test_a_prompts_beginnings_are_found_where_it_is_read(start: Start, page_size: int) -> None:
    """A short one here, a long one in the process for large bodies; none where prompts share no pages."""
    running = await start(shared_page_size=page_size, max_model_len=9000)
    for text in ("Anna has 12 apples and gives 5", "Anna " * (INLINE_BYTES // 4)):
        ids = sample_text().encode(text)
        for body in ({"prompt": text, "n": 2}, {"prompt": ids}):
            assert (await running.post("/v1/completions", body))[0] == 200
            asked = running.backend.submitted[-1]
            assert asked.prompt == tuple(ids)
            assert asked.beginnings == (beginnings(ids, page_size) if page_size else ())
    chat = {"messages": [{"role": "user", "content": "Anna has 12 apples"}]}
    assert (await running.post("/v1/chat/completions", chat))[0] == 200
    asked = running.backend.submitted[-1]
    assert asked.beginnings == (beginnings(asked.prompt, page_size) if page_size else ())
    assert bool(asked.beginnings) == bool(page_size)


async def test_both_readers_say_the_same(worker: TextWorker) -> None:
    here = BodyReader(settings(), held_text())
    for task, body in BODIES:
        raw = json.dumps(body).encode()
        expected = await outcome(asyncio.to_thread(here.read, task, raw))
        assert await outcome(worker.read(task, raw)) == expected, body


async def test_a_large_body_is_answered_as_a_small_one(start: Start) -> None:
    running = await start()
    padding = {"unknown_field": "x" * INLINE_BYTES}
    paths = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
    for task, body in BODIES:
        if isinstance(body, dict) and "n" not in body:
            path = paths.get(task, f"/{task}")
            status, small = await running.post(path, body)
            assert status, small == await running.post(path, body | padding)


async def test_small_bodies_need_no_process(start: Start) -> None:
    running = await start()
    assert (await running.post("/tokenize", {"prompt": "Anna"}))[0] == 200
    assert running.worker.pid is None
    assert (await running.post("/tokenize", {"prompt": "Anna", "u": "x" * INLINE_BYTES}))[0] == 200
    assert running.worker.pid is not None


async def test_a_template_of_the_clients_own_never_runs_on_the_event_loop(start: Start) -> None:
    running = await start(trust_request_chat_template=True)
    body = {"messages": [{"role": "user", "content": "Anna"}], "chat_template": "{{ messages[0].content }}!"}
    assert (await running.post("/v1/chat/completions", body))[0] == 200
    assert running.worker.pid is not None
    assert running.backend.submitted[0].prompt == tuple(sample_text().encode("Anna!"))


GRAMMARS: list[tuple[str, dict[str, Any], bool]] = [
    ("/v1/completions", {"response_format": {"type": "json_object"}}, True),
    ("/v1/completions", {"guided_json": {"type": "object", "properties": {"a": {"type": "null"}}}}, True),
    ("/v1/completions", {"regex": "a+"}, True),
    ("/v1/completions", {"ebnf": 'root ::= "a"'}, False),
    ("/v1/completions", {"structural_tag": {"format": {"type": "any_text"}}}, False),
]


@pytest.mark.parametrize(("path", "fields", "learnt"), GRAMMARS)
async def test_a_grammar_that_is_known_is_read_on_the_event_loop(
    start: Start, path: str, fields: dict[str, Any], learnt: bool
) -> None:
    """Once another process has looked at it, and if it is little work to turn it into ours."""
    running = await start()
    asked = 0

    async def counted(*given: Any) -> Any:
        nonlocal asked
        asked += 1
        return await before(*given)

    before, running.worker.read = running.worker.read, counted  # type: ignore[method-assign, assignment]
    for times in (1, 1 if learnt else 2):
        assert (await running.post(path, {"prompt": "Anna", **fields}))[0] == 200
        assert asked == times
    first, second = running.backend.submitted
    assert first.params.grammar == second.params.grammar is not None


async def test_of_many_small_bodies_a_turn_of_the_loop_reads_what_takes_a_few_milliseconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that each body moves on by a third of that: so three a turn, and the others have theirs between."""
    now, turn, seen = 0.0, 0, list[int]()

    class Counted(BodyReader):
        def read_if_short(self, task: str, raw: bytes, before: str | None = None) -> Any:
            nonlocal now
            now += turns.TURN_S / 3 + 1e-6
            seen.append(turn)
            return b""

    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now))
    shared = reading.Reading(
        Counted(settings(), sample_text()), TextWorker(WorkerSetup(settings(), held_text)), KnownGrammars()
    )
    asked = asyncio.gather(*[shared.answer("tokenize", b"{}") for _ in range(20)])
    while not asked.done():
        turn += 1
        await asyncio.sleep(0)
    assert len(seen) == 20
    assert max(Counter(seen).values()) == 3


async def test_a_body_whose_process_dies_is_tried_once_more(
    worker: TextWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.monotonic() + 1.5 * FATAL_S
    await worker.warm()
    first = worker.pid
    answer = await worker.read("tokenize", prompt(f"die-once {tmp_path}/died"))
    assert isinstance(answer, bytes)
    assert worker.pid not in (None, first)
    with pytest.raises(ApiError) as twice:
        await worker.read("tokenize", prompt(f"die {tmp_path}/died"))
    assert twice.value.status == 500
    assert twice.value.code == "text_process_died"
    assert isinstance(await worker.read("tokenize", prompt("Anna")), bytes)
    lives = worker.pid
    with pytest.raises(ApiError) as again:
        await worker.read("tokenize", prompt(f"die {tmp_path}/died"))
    assert again.value.code == "text_process_died"
    assert worker.pid == lives, "clients that ask again by themselves cost nobody a process"
    monkeypatch.setattr(text_worker, "time", SimpleNamespace(monotonic=lambda: later))
    with pytest.raises(ApiError):
        await worker.read("tokenize", prompt(f"die {tmp_path}/died"))
    assert worker.pid != lives, "it is tried again some time"


@pytest.mark.usefixtures("spawned")
async def test_a_process_that_is_killed_as_it_starts_is_started_again(tmp_path: Path) -> None:
    worker = TextWorker(WorkerSetup(settings(), partial(text_after_a_death, str(tmp_path / "died"))))
    try:
        assert isinstance(await worker.read("tokenize", prompt("Anna")), bytes)
    finally:
        await worker.close()


async def test_a_process_that_was_killed_between_two_bodies_is_replaced(worker: TextWorker) -> None:
    await worker.warm()
    assert worker.pid is not None
    os.kill(worker.pid, 9)
    assert isinstance(await worker.read("tokenize", prompt("Anna")), bytes)


@pytest.mark.parametrize("limit", ["MAX_WAITING", "MAX_WAITING_SHORT"])
async def test_bodies_are_read_in_order_and_too_many_are_refused(
    worker: TextWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(text_worker, "SHORT_BYTES", 0)
    monkeypatch.setattr(text_worker, limit, 4)
    held = await Held(worker, tmp_path / "held").begun()
    done: list[int] = []

    async def one(number: int) -> None:
        await worker.read("tokenize", prompt("Anna"))
        done.append(number)

    waiting = []
    for number in range(3):
        waiting.append(asyncio.create_task(one(number)))
        await asyncio.sleep(0)
    with pytest.raises(Busy):
        await worker.read("tokenize", prompt("Anna"))
    assert not done
    held.release()
    await asyncio.gather(held.answer, *waiting)
    await one(3)
    assert done == [0, 1, 2, 3], "whoever was in line is so no more"


def test_the_other_process_is_told_no_keys() -> None:
    sent = TextWorker(WorkerSetup(settings(api_keys=("key",), admin_key="key"), held_text))._setup.settings
    assert (sent.api_keys, sent.admin_key) == ((), None)


async def test_a_body_that_waits_too_long_is_refused_and_the_rest_goes_on(
    worker: TextWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await Held(worker, tmp_path / "held").begun()
    monkeypatch.setattr(text_worker, "WAIT_S", 0.01)
    with pytest.raises(Busy):
        await worker.read("tokenize", prompt("Anna"))
    held.release()
    assert isinstance(await held.answer, bytes)


async def test_a_body_that_takes_too_long_ends_with_its_process(
    worker: TextWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.warm()
    first = worker.pid
    assert first is not None
    with monkeypatch.context() as patched:
        patched.setattr(text_worker, "READ_S", 0.05)
        held = await Held(worker, tmp_path / "held").begun()
        with pytest.raises(ApiError) as refused:
            await held.answer
    assert refused.value.code == "text_too_costly"
    assert gone(first)
    assert isinstance(await worker.read("tokenize", prompt("Anna")), bytes)


@pytest.mark.parametrize("under_way", [True, False])
async def test_a_client_that_leaves_frees_its_place(
    worker: TextWorker, tmp_path: Path, under_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_worker, "LET_GO_S", 0.05)
    held = await Held(worker, tmp_path / "held").begun()
    pid = worker.pid
    second = asyncio.create_task(worker.read("tokenize", prompt("Anna")))
    await asyncio.sleep(0)
    leaving = held.answer if under_way else second
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    if under_way:
        assert isinstance(await second, bytes)
        assert worker.pid != pid
    else:
        held.release()
        assert isinstance(await held.answer, bytes)
        assert worker.pid == pid
    assert worker.waiting == 0


async def test_what_its_client_left_late_is_not_the_next_ones_answer(
    worker: TextWorker, tmp_path: Path
) -> None:
    held = await Held(worker, tmp_path / "held").begun()
    held.answer.cancel()
    await asyncio.sleep(0)
    held.release()  # well before it would be ended
    with pytest.raises(asyncio.CancelledError):
        await held.answer
    answer = await worker.read("tokenize", prompt("Anna"))
    assert isinstance(answer, bytes)
    assert json.loads(answer)["tokens"] == held_text().encode("Anna")


@pytest.mark.usefixtures("spawned")
async def test_a_text_that_does_not_load_is_said(anyio_backend: str) -> None:
    worker = TextWorker(WorkerSetup(settings(), broken_text))
    for _ in range(2):
        with pytest.raises(ApiError, match=r"tokenizer\.json is missing") as refused:
            await worker.read("tokenize", prompt("Anna"))
        assert refused.value.status == 503
    assert worker.pid is None


async def test_a_defect_in_the_process_is_raised_here_and_costs_no_process(worker: TextWorker) -> None:
    await worker.warm()
    first = worker.pid
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        await worker.read("detokenize", json.dumps({"tokens": [0]}).encode())
    assert isinstance(await worker.read("tokenize", prompt("Anna")), bytes)
    assert worker.pid == first


KILLED = """
import asyncio, sys
from tests.gateway.conftest import settings
from tests.gateway.text.held_text import held_text
from elastic_ep.gateway.text_worker import TextWorker, WorkerSetup
async def main():
    worker = TextWorker(WorkerSetup(settings(), held_text))
    await worker.warm()
    print(worker.pid, flush=True)
    await worker.read("tokenize", sys.argv[1].encode())
asyncio.run(main())
"""


def test_it_does_not_outlive_the_run_process(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    with Bound(
        [sys.executable, "-c", KILLED, prompt(f"hold {fifo}").decode()],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with fifo.open("wb"):  # it reads
            process.kill()
            asyncio.run(until(lambda: gone(pid)))


def test_a_process_that_was_forked_reads_grammars_at_once_and_holds_nothing_of_others() -> None:
    command = [sys.executable, "-m", "tests.gateway.forking"]
    done = run(command, 60, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "same process": True,
        "started": 0,
        "guided": True,
        "files": 2,
        "gone": True,
        "pipe closed": True,
        "beside a thread": False,
    }
