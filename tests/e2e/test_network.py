"""Namespaces as hosts: links are cut in silence, and mended; nothing is left of who is killed."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.bound import Bound
from tests.kit.network import Network, network, refused

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(refused()), reason=refused())]
PORT = 7000
DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with network(3) as made:
        yield made


def connection(net: Network, one: int, other: int, port: int) -> tuple[socket.socket, socket.socket]:
    """From `one` to `other`, both ends."""
    with net.hosts[other].entered():
        listener = socket.create_server((net.addresses[other], port))
    with listener, net.hosts[one].entered():
        dialled = socket.create_connection((net.addresses[other], port), DEADLINE_S)
        return dialled, listener.accept()[0]


def arrives(sender: socket.socket, receiver: socket.socket, within_s: float) -> bool:
    sender.sendall(b"x")
    return bool(select.select([receiver], [], [], within_s)[0]) and receiver.recv(100) != b""


def test_what_is_cut_does_not_arrive_and_nobody_is_told_until_it_is_mended(net: Network) -> None:
    first, second = connection(net, 0, 1, PORT), connection(net, 0, 1, PORT + 1)
    third = connection(net, 2, 1, PORT)
    assert all(arrives(*pair, DEADLINE_S) for pair in (first, second, third))
    with net.cut(1, 0, PORT):
        assert not arrives(*first, 0.3)
        assert arrives(*second, DEADLINE_S)
        assert arrives(*third, DEADLINE_S)
    assert select.select([first[1]], [], [], DEADLINE_S)[0], "what was sent arrives late"
    with net.cut(1):
        assert not arrives(*second, 0.3)
        assert not arrives(*third, 0.3)
    for end in (*first, *second, *third):
        end.close()


def test_a_link_can_be_cut_in_one_direction(net: Network) -> None:
    near, far = connection(net, 0, 2, PORT)
    with net.cut(2, 0, back=False):
        assert arrives(near, far, DEADLINE_S)
        assert not arrives(far, near, 0.3)
    near.close()
    far.close()


def test_a_slow_link_is_slow(net: Network) -> None:
    near, far = connection(net, 0, 1, PORT)
    data = bytes(500_000)
    with net.slow(1, "20mbit"):
        began = time.monotonic()
        near.setblocking(False)
        sent = got = 0
        while got < len(data):
            readable, writable, _ = select.select([far], [near] if sent < len(data) else [], [], DEADLINE_S)
            assert readable or writable
            if writable:
                sent += near.send(data[sent:])
            if readable:
                got += len(far.recv(1 << 20))
        assert time.monotonic() - began > 0.1, "20 Mbit/s are 2.5 MB/s"
    near.close()
    far.close()


def test_nothing_is_left_of_the_hosts_of_one_that_is_killed() -> None:
    text = (
        "import time\nfrom tests.kit.network import network\nwith network(2) as made:\n"
        "    print(*(one.pid for one in (made.router, *made.hosts)), flush=True)\n    time.sleep(60)\n"
    )
    with Bound([sys.executable, "-c", text], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as maker:
        assert maker.stdout is not None
        pids = [int(word) for word in maker.stdout.readline().split()]
        assert len(pids) == 3
        watched = [os.pidfd_open(pid) for pid in pids]
        maker.kill()
        for pidfd in watched:
            assert select.select([pidfd], [], [], DEADLINE_S)[0]
            os.close(pidfd)
