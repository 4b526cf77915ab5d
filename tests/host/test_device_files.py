"""What a process has opened stays open beyond its SIGKILL for as long as it is held."""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from elastic_ep.host import device_files
from elastic_ep.host.device_files import DeviceFiles
from elastic_ep.host.device_guard import DeviceGuard
from elastic_ep.wire.messages import Member
from tests.kit.bound import Bound

CLIENT = """
import fcntl, os, socket, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
for path in sys.argv[2:]:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    socket.socket.detach(sock)
print("ready", flush=True)
sys.stdin.read()
"""
OPENER = """
import fcntl, os, sys
fds = {}
print("ready", flush=True)
for line in sys.stdin:
    word, path = line.split()
    if word == "open":
        fds[path] = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fds[path], fcntl.LOCK_EX)
    else:
        os.close(fds[path])
    print("done", flush=True)
"""
SERVER = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
connection.recv(1)
print("lost", flush=True)
"""
FIRST, SECOND = Member(1, 1), Member(1, 2)

pytestmark = pytest.mark.holds_the_loop("clients are started and waited for on it")


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = Bound(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the driver's: who has it open holds its lock."""
    monkeypatch.setattr(device_files, "_DEVICE", str(tmp_path / "nvidia"))
    return tmp_path / "nvidia0"


def is_open_elsewhere(device: Path) -> bool:
    with device.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


async def until_let_go(device: Path) -> None:
    """A guard closes on another thread."""
    with anyio.fail_after(10):
        while is_open_elsewhere(device):
            await anyio.sleep(0.002)


def tell(opener: subprocess.Popen[str], word: str, device: Path) -> None:
    """Have it open or close the file."""
    assert opener.stdin is not None
    assert opener.stdout is not None
    print(word, device, file=opener.stdin, flush=True)
    assert opener.stdout.readline() == "done\n"


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def die_unreaped(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_the_driver_sees_a_death_when_the_hold_is_released(device: Path) -> None:
    with running(CLIENT, str(device)) as client:
        hold = DeviceFiles(client.pid)
        assert len(hold) == 1
        end(client)
        assert is_open_elsewhere(device)
        hold.release()
        assert not is_open_elsewhere(device)
        hold.release()


def test_without_a_hold_it_sees_it_at_once(device: Path) -> None:
    with running(CLIENT, str(device)) as client:
        assert is_open_elsewhere(device)
        end(client)
        assert not is_open_elsewhere(device)


def test_connections_to_mps_are_held_and_others_are_not(device: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / "mps"), str(tmp_path / "other")]
    with (
        running(SERVER, "nvidia-cuda-mps-server", paths[0]) as mps,
        running(SERVER, "a-broker", paths[1]) as other,
        running(CLIENT, str(device), *paths) as client,
    ):
        assert mps.stdout is not None
        assert other.stdout is not None
        hold = DeviceFiles(client.pid)
        assert len(hold) == 2
        end(client)
        assert other.stdout.readline() == "lost\n"
        assert not select.select([mps.stdout], [], [], 0)[0]
        hold.release()
        assert mps.stdout.readline() == "lost\n"


def test_a_process_that_is_gone_cannot_be_held(device: Path) -> None:
    with running(CLIENT, str(device)) as client:
        end(client)
    with pytest.raises((ProcessLookupError, FileNotFoundError)):
        DeviceFiles(client.pid)


def test_what_the_process_closes_meanwhile_is_left_out(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duplicate = device_files._duplicate
    with running(CLIENT, str(device)) as client:
        monkeypatch.setattr(device_files, "_duplicate", lambda pidfd, number: duplicate(pidfd, number + 100))
        hold = DeviceFiles(client.pid)
        assert len(hold) == 0
        hold.release()


def test_a_hold_that_fails_leaves_nothing_open(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    duplicate = device_files._duplicate

    def first_alone(pidfd: int, number: int) -> int:
        if made:
            raise PermissionError("not a second one")
        made.append(duplicate(pidfd, number))
        return made[0]

    monkeypatch.setattr(device_files, "_duplicate", first_alone)
    monkeypatch.setattr(device_files, "_is_mps", lambda fd: True)
    with (
        running(SERVER, "a-broker", str(tmp_path / "one")),
        running(CLIENT, str(device), str(tmp_path / "one")) as client,
    ):
        with pytest.raises(PermissionError):
            DeviceFiles(client.pid)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(made[0])


def unnoted(kind: str, /, **facts: Any) -> None:
    pass


async def dies_before_it_is_looked_into_again(device: Path) -> None:
    with running(CLIENT, str(device)) as client, DeviceGuard(1000.0, unnoted) as guard:
        guard.keep(FIRST, client.pid)
        die_unreaped(client)
        guard.keep(FIRST, client.pid)
        assert is_open_elsewhere(device)


def test_a_look_at_a_dying_process_loses_nothing(device: Path) -> None:
    anyio.run(dies_before_it_is_looked_into_again, device)


async def looked_into_while_it_starts(device: Path, notes: list[int]) -> None:
    def note(kind: str, /, **facts: Any) -> None:
        if kind == "device_kept":
            notes.append(facts["files"])

    second = device.with_name("nvidia1")
    with running(OPENER) as opener, DeviceGuard(1000.0, note) as guard:
        guard.keep(FIRST, opener.pid)
        for path in (device, second):
            tell(opener, "open", path)
            guard.keep(FIRST, opener.pid)
            guard.keep(FIRST, opener.pid)
        tell(opener, "close", device)
        assert is_open_elsewhere(device)
        guard.keep(FIRST, opener.pid)
        await until_let_go(device)  # what it closes itself
        end(opener)
        guard.gone(FIRST)
        assert is_open_elsewhere(second)


def test_a_rank_that_starts_is_held_by_what_it_has_opened_so_far(device: Path) -> None:
    notes: list[int] = []
    anyio.run(looked_into_while_it_starts, device, notes)
    assert notes == [0, 1, 2, 1]


async def looked_into_often(device: Path) -> None:
    with running(CLIENT, str(device)) as client, DeviceGuard(1000.0, unnoted) as guard:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            guard.keep(FIRST, client.pid)
        with anyio.fail_after(10):
            while len(os.listdir("/proc/self/fd")) != before + 1:
                await anyio.sleep(0.002)


def test_looks_do_not_pile_up_descriptors(device: Path) -> None:
    anyio.run(looked_into_often, device)


async def dies_while_it_is_looked_into(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = device.with_name("nvidia1")
    duplicate = device_files._duplicate
    with running(OPENER) as opener, DeviceGuard(1000.0, unnoted) as guard:

        def last_words(pidfd: int, number: int) -> int:
            fd = duplicate(pidfd, number)
            die_unreaped(opener)
            return fd

        tell(opener, "open", device)
        tell(opener, "open", second)
        guard.keep(FIRST, opener.pid)
        monkeypatch.setattr(device_files, "_duplicate", last_words)
        guard.keep(FIRST, opener.pid)
        assert is_open_elsewhere(device)
        assert is_open_elsewhere(second)


def test_a_death_in_the_middle_of_a_look_loses_nothing(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anyio.run(dies_while_it_is_looked_into, device, monkeypatch)


async def refused_later(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pidfd: int, number: int) -> int:
        raise PermissionError

    with running(CLIENT, str(device)) as client, DeviceGuard(1000.0, unnoted) as guard:
        guard.keep(FIRST, client.pid)
        monkeypatch.setattr(device_files, "_duplicate", refuse)
        guard.keep(FIRST, client.pid)
        end(client)
        assert is_open_elsewhere(device)


def test_a_look_that_fails_loses_nothing(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anyio.run(refused_later, device, monkeypatch)


async def killed_before_it_opens_anything(at_once: list[int]) -> None:
    with running(OPENER) as opener, DeviceGuard(1000.0, unnoted) as guard:
        guard.keep(FIRST, opener.pid)
        end(opener)
        guard.gone(FIRST)
        guard.when_free(SECOND.rank, lambda: at_once.append(1))


def test_a_rank_that_has_opened_nothing_keeps_nobody(device: Path) -> None:
    at_once: list[int] = []
    anyio.run(killed_before_it_opens_anything, at_once)
    assert at_once == [1]


async def guarded(device: Path, notes: list[str]) -> None:
    def note(name: str, /, **facts: Any) -> None:
        notes.append(name)

    free = anyio.Event()
    with running(CLIENT, str(device)) as client, DeviceGuard(0.05, note) as guard:
        guard.keep(FIRST, client.pid)
        guard.keep(FIRST, client.pid)
        at_once: list[int] = []
        guard.when_free(FIRST.rank, lambda: at_once.append(1))
        assert at_once == [1], "an incarnation that lives keeps nobody"
        end(client)
        guard.keep(FIRST, client.pid)
        guard.gone(FIRST)
        guard.gone(FIRST)
        guard.when_free(SECOND.rank, free.set)
        assert not free.is_set()
        assert is_open_elsewhere(device)
        with anyio.fail_after(10):
            await free.wait()
        assert not is_open_elsewhere(device)


def test_a_new_incarnation_waits_until_the_device_is_free(device: Path) -> None:
    notes: list[str] = []
    anyio.run(guarded, device, notes)
    assert notes == ["device_kept", "device_not_kept", "device_released"]


async def ended_early(device: Path) -> None:
    with running(CLIENT, str(device)) as client:
        with DeviceGuard(1000.0, unnoted) as guard:
            guard.keep(FIRST, client.pid)
            end(client)
            guard.gone(FIRST)
            assert is_open_elsewhere(device)
        await until_let_go(device)


def test_the_end_of_the_run_releases_everything(device: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    anyio.run(ended_early, device)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
