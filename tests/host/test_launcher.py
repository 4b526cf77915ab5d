"""The launcher with a real fork server and real ranks (of the tests' own), and real kills."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from elastic_ep.host.keeper import ForkServerFailed
from elastic_ep.host.private_directory import NotPrivate
from elastic_ep.host.server_process import begun
from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import (
    Died,
    Launched,
    LaunchFailed,
    Reaped,
    ServerLost,
    ServerReady,
)
from elastic_ep.wire.messages import Member
from tests.kit.bound import Bound
from tests.kit.harness import DEADLINE_S, Run, alive, running, title
from tests.kit.processes import stop

A, B = Member(3, 1), Member(4, 2)


def with_launcher(directory: Path, body: Callable[[Run], Awaitable[None]], **options: Any) -> Run:
    async def main() -> Run:
        async with running(directory, **options) as run:
            await body(run)
        return run

    return anyio.run(main)


async def gone(run: Run, member: Member) -> Reaped:
    return await run.expect(Reaped, lambda event: event.member == member)


async def noticed(run: Run, member: Member) -> Died:
    return await run.expect(Died, lambda event: event.member == member)


def test_what_a_rank_is_born_with(directory: Path) -> None:
    async def body(run: Run) -> None:
        facts = await run.up(A)
        assert (await run.expect(Launched)).pid == facts["pid"]
        assert (await run.expect(ServerReady)).threads == 1
        assert facts["parent"] == run.launcher.server_pid
        assert facts["group"] == facts["pid"]  # Ctrl-C does not reach it
        assert facts["session"] == os.getsid(0)  # it is scheduled among ours
        assert facts["nice"] == os.nice(0) + 5
        assert facts["name"] == "eep-rank-3.1"
        assert title(facts["pid"]) == "elastic_ep: rank 3.1 Launching"
        assert title(facts["parent"]) == f"elastic_ep: fork server {directory}"
        assert facts["threads"] == 2  # the other one holds the death mutex
        assert facts["sockets"] == 0
        assert facts["life"]
        assert not facts["torch"]

    run = with_launcher(directory, body)
    assert run.of(A) == ["Launched", "Died", "Reaped"]
    assert not directory.exists()


def test_kill_is_noticed_by_the_mutex_and_then_confirmed(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        await run.up(B)
        killed_ns = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        end = await gone(run, A)
        notice = await noticed(run, A)
        assert end.status == "signal 9"
        assert killed_ns < notice.at_ns
        assert notice.at_ns <= end.at_ns or notice.cause != "mutex"
        assert not alive(pid)
        assert run.of(B) == ["Launched"]

    run = with_launcher(directory, body)
    assert run.of(A) == ["Launched", "Died", "Reaped"]


def test_the_mutex_alone_gives_notice(directory: Path) -> None:
    """Without the pidfd and the fork server's word."""

    async def body(run: Run) -> None:
        facts = await run.up(A)
        assert run.launcher.server_pid is not None
        stop(run.launcher.server_pid)
        os.kill(facts["pid"], signal.SIGKILL)
        assert (await noticed(run, A)).cause == "mutex"
        os.kill(run.launcher.server_pid, signal.SIGCONT)
        assert (await gone(run, A)).status == "signal 9"

    with_launcher(directory, body, agent="tests.kit.agent_without_pidfds")


def test_death_before_hello_is_noticed_by_other_means(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = await run.launch(A)
        os.kill(pid, signal.SIGKILL)
        assert (await noticed(run, A)).cause in {"pidfd", "reaped"}
        assert (await gone(run, A)).status == "signal 9"
        run.launcher.watch(A)  # a hello that comes after all: no effect

    run = with_launcher(directory, body, entry="rank_entries:slow_start")
    assert run.of(A) == ["Launched", "Died", "Reaped"]


@pytest.mark.parametrize(
    ("do", "config", "status"),
    [
        ("return", {"status": 0}, "exit status 0"),
        ("return", {"status": 5}, "exit status 5"),
        ("leave", {}, "exit status 7"),
        ("raise", {}, "exit status 1"),
    ],
)
def test_exits_by_itself(
    directory: Path, capfd: pytest.CaptureFixture[str], do: str, config: dict[str, int], status: str
) -> None:
    async def body(run: Run) -> None:
        await run.launch(A, do, **config)
        assert (await gone(run, A)).status == status

    run = with_launcher(directory, body)
    assert run.of(A) == ["Launched", "Died", "Reaped"]
    assert ("broken on purpose" in capfd.readouterr().err) == (do == "raise")


def test_fence_a_stopped_rank(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        stop(pid)
        run.launcher.kill(A)
        run.launcher.kill(A)
        assert (await gone(run, A)).status == "signal 9"
        run.launcher.kill(A)
        run.launcher.kill(Member(0, 99))

    run = with_launcher(directory, body)
    assert run.of(A) == ["Launched", "Died", "Reaped"]


def test_fence_at_any_moment_of_a_launch(directory: Path) -> None:
    first, second = Member(0, 1), Member(1, 1)

    async def body(run: Run) -> None:
        run.launcher.launch(first, '{"do": "sleep"}')
        run.launcher.launch(second, '{"do": "sleep"}')
        run.launcher.kill(second)  # still queued
        with anyio.fail_after(DEADLINE_S):
            while not run.launcher._ranks[first].asked:
                await anyio.lowlevel.checkpoint()
        run.launcher.kill(first)  # asked for, no answer yet
        await gone(run, first)
        await run.expect(LaunchFailed, lambda event: event.member == second)

    run = with_launcher(directory, body)
    assert run.of(first) == ["Launched", "Died", "Reaped"]
    assert run.of(second) == ["LaunchFailed"]


def test_many_incarnations_reuse_the_mutexes(directory: Path) -> None:
    async def body(run: Run) -> None:
        for incarnation in range(1, 21):  # one rank has four mutexes
            member = Member(0, incarnation)
            pid = (await run.up(member))["pid"]
            os.kill(pid, signal.SIGKILL)
            assert (await gone(run, member)).status == "signal 9"
            assert run.of(member) == ["Launched", "Died", "Reaped"]

    with_launcher(directory, body, timing=Timing(ranks=1))


LARGE = 3_000_000


def test_twice_is_refused(directory: Path) -> None:
    async def body(run: Run) -> None:
        await run.up(A)
        with pytest.raises(ValueError, match="already"):
            run.launcher.launch(A, "{}")

    with_launcher(directory, body)


def test_a_configuration_may_be_larger_than_a_packet(directory: Path) -> None:
    """As the placement of a model with many layers and experts is."""

    async def body(run: Run) -> None:
        assert (await run.up(A, padding='"' * LARGE))["padding"] == LARGE

    with_launcher(directory, body)


def test_ranks_outlive_their_fork_server(directory: Path) -> None:
    async def body(run: Run) -> None:
        pid = (await run.up(A))["pid"]
        first = run.launcher.server_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        lost = await run.expect(ServerLost)
        assert (lost.pid, lost.status) == (first, "signal 9")
        facts = await run.up(B)  # by a new fork server
        assert facts["parent"] == run.launcher.server_pid != first
        assert alive(pid)
        assert run.of(A) == ["Launched"]
        os.kill(pid, signal.SIGKILL)
        assert (await gone(run, A)).status == "unknown"

    run = with_launcher(directory, body)
    assert run.of(A) == ["Launched", "Died", "Reaped"]
    assert not directory.exists()


def test_a_hung_fork_server_is_replaced(directory: Path) -> None:
    async def body(run: Run) -> None:
        first = run.launcher.server_pid
        assert first is not None
        stop(first)
        run.launcher.launch(A, '{"do": "sleep"}')
        run.launcher.launch(B, '{"do": "sleep"}')
        failed = await run.expect(LaunchFailed)
        assert failed.member == A
        assert failed.reason == "fork server: signal 9"
        await run.expect(Launched, lambda event: event.member == B)
        assert run.launcher.server_pid != first

    with_launcher(directory, body, agent="tests.kit.impatient_agent")


def test_a_fork_server_that_does_not_start(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def body(run: Run) -> None:
        raise AssertionError("not reached")

    with pytest.raises(ForkServerFailed):
        with_launcher(directory, body, preload=("no_such_module",))
    assert "no_such_module" in capfd.readouterr().err
    assert not directory.exists()


def test_a_fork_server_that_is_never_ready_is_given_up(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_done.py").write_text("import time\ntime.sleep(1000)\n")
    (tmp_path / "hasty_agent.py").write_text(
        "from elastic_ep.timing import Timing\nTiming.server_ready_ms = 500\nimport tests.kit.impatient_agent\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")

    async def body(run: Run) -> None:
        raise AssertionError("not reached")

    with pytest.raises(ForkServerFailed):
        with_launcher(directory, body, preload=("never_done",), agent="hasty_agent")
    assert not directory.exists()


def test_a_fork_server_that_is_told_nothing_goes() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "elastic_ep.host.fork_server", str(theirs.fileno())]
        with Bound(command, pass_fds=(theirs.fileno(),)) as server:
            ours.close()
            assert server.wait(DEADLINE_S) in (0, -signal.SIGKILL), "by itself, or while it imports"


def test_a_fork_server_that_was_begun_early_is_the_first_one(directory: Path) -> None:
    with begun(("json",)) as server:
        assert server is not None
        first = server.popen.pid

        async def body(run: Run) -> None:
            assert (await run.up(A))["parent"] == run.launcher.server_pid == first
            os.kill(first, signal.SIGKILL)
            await run.expect(ServerLost)
            assert (await run.up(B))["parent"] == run.launcher.server_pid != first

        with_launcher(directory, body, begun=server)
    assert not alive(first)


def test_a_fork_server_that_was_begun_early_ends_if_nobody_takes_it() -> None:
    with begun(("never_there",)) as server:
        assert server is not None
    assert server.popen.returncode is not None


def test_a_fork_server_that_cannot_import_fails_the_start(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body(run: Run) -> None:
        raise AssertionError("not reached")

    with begun(("never_there",)) as server, pytest.raises(ForkServerFailed):
        with_launcher(directory, body, begun=server)
    assert "never_there" in capfd.readouterr().err


def test_a_bad_entry_fails_the_rank_only(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def body(run: Run) -> None:
        await run.launch(A)
        assert (await gone(run, A)).status == "exit status 1"

    with_launcher(directory, body, entry="rank_entries:nothing")
    assert "nothing" in capfd.readouterr().err


def test_only_a_private_directory_will_do(directory: Path) -> None:
    async def body(run: Run) -> None:
        raise AssertionError("not reached")

    directory.chmod(0o755)
    with pytest.raises(NotPrivate, match="0700"):
        with_launcher(directory, body)
    with pytest.raises(NotPrivate, match="No such file"):
        with_launcher(directory / "absent", body)
    link = directory / "link"
    link.symlink_to(directory)
    with pytest.raises(NotPrivate, match="not a directory"):
        with_launcher(link, body)
    assert (directory / "socket").exists()


def test_leaving_kills_everything_stopped_ranks_included(directory: Path) -> None:
    pids: list[int] = []
    left: list[float] = []

    async def body(run: Run) -> None:
        pids.extend([(await run.up(A))["pid"], (await run.up(B))["pid"]])
        pids.extend([run.launcher.server_pid or 0, run.launcher.janitor.pid])
        stop(pids[0])
        run.launcher.launch(Member(0, 1), '{"do": "sleep"}')
        left.append(time.monotonic())

    run = with_launcher(directory, body)
    assert time.monotonic() - left[0] < 5, "each phase has its deadline, and none was reached"
    assert not any(map(alive, pids))
    assert not directory.exists()
    assert run.of(A) == run.of(B) == ["Launched", "Died", "Reaped"]


def test_torch_is_there_at_once_and_the_server_stays_single_threaded(directory: Path) -> None:
    async def body(run: Run) -> None:
        assert (await run.expect(ServerReady)).threads == 1
        facts = await run.up(A)
        assert facts["torch"], "what it runs does not import it"
        assert facts["torch_threads"] == 1

    with_launcher(directory, body, preload=("torch",))
