"""An agent that dies or hangs: its ranks live, and the next one goes on where it was stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from elastic_ep.host import keeper
from elastic_ep.wire.host_messages import AgentLost, AgentReady, Died, Launched, LaunchFailed, Reaped
from elastic_ep.wire.messages import Member
from tests.kit.bound import run as run_bound
from tests.kit.harness import DEADLINE_S, Run, alive, running
from tests.kit.processes import stop

A, B, C = Member(0, 1), Member(1, 1), Member(2, 1)


def with_host(directory: Path, body: Callable[[Run], Awaitable[None]], agent: str = keeper.AGENT) -> Run:
    async def main() -> Run:
        async with running(directory, agent=agent) as run:
            await body(run)
        return run

    return anyio.run(main)


def kill_agent(run: Run, number: int = signal.SIGKILL) -> int:
    pid = run.launcher.agent_pid
    assert pid is not None
    if number == signal.SIGSTOP:
        stop(pid)
    else:
        os.kill(pid, number)
    return pid


async def next_agent(run: Run, ready: int) -> AgentReady:
    """The agent that is the `ready`th to be ready."""
    with anyio.fail_after(DEADLINE_S):
        while True:
            found = [event for event in run.events if isinstance(event, AgentReady)]
            if len(found) >= ready:
                return found[ready - 1]
            await run.changed()


def test_ranks_outlive_their_agent_and_the_next_one_adopts_them(directory: Path) -> None:
    async def body(run: Run) -> None:
        a, b = (await run.up(A))["pid"], (await run.up(B))["pid"]
        server = run.launcher.server_pid
        first = kill_agent(run)
        assert (await run.expect(AgentLost)).pid == first
        assert (await next_agent(run, 2)).adopted == 2
        assert alive(a)
        assert alive(b)
        os.kill(a, signal.SIGKILL)
        await run.expect(Died, lambda event: event.member == A)
        assert (await run.expect(Reaped, lambda event: event.member == A)).status == "signal 9"
        run.launcher.kill(B)
        assert (await run.expect(Reaped, lambda event: event.member == B)).status == "signal 9"
        await run.up(C)
        assert run.launcher.server_pid == server

    run = with_host(directory, body)
    for member in (A, B, C):
        assert run.of(member) == ["Launched", "Died", "Reaped"]
    assert not directory.exists()


def test_an_adopted_ranks_mutex_gives_notice(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        kill_agent(run)
        await next_agent(run, 2)
        assert run.launcher.server_pid is not None
        stop(run.launcher.server_pid)
        os.kill(pid, signal.SIGKILL)
        assert (await run.expect(Died)).cause == "mutex"
        os.kill(run.launcher.server_pid, signal.SIGCONT)
        await run.expect(Reaped)

    with_host(directory, body, agent="tests.kit.agent_without_pidfds")


def test_who_dies_while_there_is_no_agent_is_told_by_the_next(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        await run.launch(B)
        stopped = kill_agent(run, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        run.launcher.kill(B)
        run.launcher.launch(C, '{"do": "sleep"}')
        os.kill(stopped, signal.SIGKILL)
        await run.expect(Reaped, lambda event: event.member == A)
        await run.expect(Reaped, lambda event: event.member == B)
        await run.expect(Launched, lambda event: event.member == C)

    run = with_host(directory, body)
    for member in (A, B, C):
        assert run.of(member) == ["Launched", "Died", "Reaped"]


def test_ranks_may_be_launched_while_an_agent_starts(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body(run: Run) -> None:
        first = kill_agent(run)
        await run.expect(AgentLost)
        run.launcher.launch(A, '{"do": "sleep"}')  # nobody is there
        with anyio.fail_after(DEADLINE_S):
            while run.launcher.agent_pid in (None, first):
                await anyio.lowlevel.checkpoint()
        run.launcher.launch(B, '{"do": "sleep"}')  # it has not begun
        await run.expect(Launched, lambda event: event.member == A)
        await run.expect(Launched, lambda event: event.member == B)

    with_host(directory, body)
    assert "Traceback" not in capfd.readouterr().err


def test_an_agent_that_does_not_answer_is_replaced(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PING_S", 0.02)

    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        kill_agent(run, signal.SIGSTOP)
        assert (await run.expect(AgentLost)).status == "signal 9"
        await next_agent(run, 2)
        assert alive(pid)

    with_host(directory, body)


def test_agent_and_fork_server_die_together(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        first = run.launcher.server_pid
        assert first is not None
        kill_agent(run)
        os.kill(first, signal.SIGKILL)
        await next_agent(run, 2)
        facts = await run.up(B)
        assert facts["parent"] == run.launcher.server_pid != first
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)
        assert (await run.expect(Reaped, lambda event: event.member == A)).status == "unknown"

    with_host(directory, body)


@pytest.mark.parametrize("seed", range(3))
def test_an_agent_may_die_at_any_moment_of_launches(directory: Path, seed: int) -> None:
    """Each rank comes to one end; whom nobody was told of does not live."""
    draw = random.Random(seed)
    said: list[int] = []
    members = [Member(rank, 1) for rank in range(6)]

    async def body(run: Run) -> None:
        for member in members:
            run.launcher.launch(member, '{"do": "sleep"}')
            for _ in range(draw.randrange(40)):
                await anyio.lowlevel.checkpoint()
            if draw.random() < 0.5 and run.launcher.agent_pid is not None:
                kill_agent(run)
        for member in members:
            await run.expect_any((Launched, LaunchFailed), member)
            if draw.random() < 0.3:
                run.launcher.kill(member)
        said.extend(facts["pid"] for facts in run.hellos.rest())

    run = with_host(directory, body)
    for member in members:
        assert run.of(member) in (["Launched", "Died", "Reaped"], ["LaunchFailed"])
    told = {event.pid for event in run.events if isinstance(event, Launched)}
    assert not any(map(alive, {*told, *said}))


def test_the_agent_does_without_torch() -> None:
    code = "import sys, elastic_ep.host.agent; sys.exit(bool({'torch', 'numpy', 'zmq'} & set(sys.modules)))"
    assert run_bound([sys.executable, "-c", code], DEADLINE_S).returncode == 0


def test_an_agent_that_never_starts_fails_the_start(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body(run: Run) -> None:
        raise AssertionError("not reached")

    with pytest.raises(keeper.ForkServerFailed, match="agent does not start"):
        with_host(directory, body, agent="no_such_agent")
    assert "no_such_agent" in capfd.readouterr().err
    assert not directory.exists()
