"""A rank of `bench.gpu_failover`, and the server that forks ranks with torch imported.

The rank's data plane is the real one: Mooncake exchange, gate and expert kernels, all layers of a step in one CUDA
graph. The rest of a model (attention, sampling) is left out, and a step's input is always the same, so its result
must be the same bits whoever takes part.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_ep.host.death_watch import hold_until_death
from elastic_ep.host.robust_mutex import RobustMutexes
from elastic_ep.timing import USUAL

WORD = struct.Struct("q")
LINE = 64
PACKET = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    ranks: int = 4
    layers: int = 24
    tokens: int = 16
    hidden: int = 2048
    inner: int = 768
    experts: int = 128
    top_k: int = 8
    timeout_ms: int = 20_000

    @property
    def home(self) -> int:
        """Experts of which a rank has the first copy; it has the second copy of as many."""
        return self.experts // self.ranks

    @property
    def slots(self) -> int:
        return 2 * self.home


def physical(shape: Shape, live: frozenset[int]) -> list[int]:
    """Where each expert is asked for: at its first copy, or at the second if that rank is gone."""
    table = []
    for expert in range(shape.experts):
        home, slot = divmod(expert, shape.home)
        after = (home + 1) % shape.ranks
        table.append(home * shape.slots + slot if home in live else after * shape.slots + shape.home + slot)
    return table


def now() -> int:
    return time.monotonic_ns()


class Link:
    """JSON packets."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    def send(self, kind: str, **values: Any) -> None:
        with self._lock:
            self._socket.sendall(json.dumps({"kind": kind, **values}).encode())

    def receive(self) -> dict[str, Any] | None:
        data = self._socket.recv(PACKET)
        return json.loads(data) if data else None


class Plane:
    """Weights, exchange and the captured step."""

    def __init__(
        self, shape: Shape, rank: int, incarnation: int, store: Path, phases: dict[str, float]
    ) -> None:
        import torch
        from tests.kit.file_store import FileStore

        from elastic_ep.exchange.base import ExchangeShape
        from elastic_ep.exchange.mooncake import MooncakeExchange
        from elastic_ep.wire.messages import Member

        began = now()

        def lap(name: str) -> None:
            nonlocal began
            torch.cuda.synchronize()
            phases[name] = (now() - began) / 1e6
            began = now()

        self.shape, self.rank = shape, rank
        torch.cuda.set_device(0)
        torch.zeros(1, device="cuda")
        lap("context_ms")
        like: Any = {"device": "cuda", "dtype": torch.bfloat16}
        mine = [*range(rank * shape.home, (rank + 1) * shape.home)]
        before = (rank - 1) % shape.ranks
        mine += range(before * shape.home, (before + 1) * shape.home)
        chosen = torch.tensor(mine, device="cuda")
        self.gates, self.gate_up, self.down = [], [], []
        for layer in range(shape.layers):
            torch.manual_seed(layer)
            self.gates.append(torch.randn(shape.hidden, shape.experts, **like) * shape.hidden**-0.5)
            w = torch.randn(shape.experts, shape.hidden, 2 * shape.inner, **like).mul_(shape.hidden**-0.5)
            self.gate_up.append(w[chosen])
            w = torch.randn(shape.experts, shape.inner, shape.hidden, **like).mul_(shape.inner**-0.5)
            self.down.append(w[chosen])
        del w
        lap("weights_ms")
        torch.cuda.empty_cache()
        self.exchange = MooncakeExchange(
            ExchangeShape(
                shape.ranks, shape.tokens, shape.hidden, shape.top_k, shape.slots, 2 * shape.layers
            ),
            Member(rank, incarnation),
            FileStore(store),
            timeout_ms=shape.timeout_ms,
            connect_timeout_ms=USUAL.store_get_ms,
        )
        lap("buffer_ms")
        torch.manual_seed(1000 + rank)
        self.x = torch.randn(shape.tokens, shape.hidden, **like)
        self.table = torch.zeros(shape.experts, dtype=torch.int64, device="cuda")
        self.expected = torch.zeros(shape.tokens, shape.hidden, **like)
        self.bad_host = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.stream = torch.cuda.Stream(0)
        with torch.cuda.stream(self.stream), torch.inference_mode():
            self.route()
            self.exchange.begin_step(-1)
            self.step()
            self.exchange.end_step()
            lap("first_step_ms")
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.out = self.step()
                self.bad = (self.out != self.expected).sum().view(1)
            lap("capture_ms")
            self.exchange.begin_step(-1)
            self.graph.replay()
            self.exchange.end_step()
            lap("replay_ms")

    def step(self) -> Any:
        import torch
        from torch.nn import functional

        from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
        from elastic_ep.engine.ops_cuda.kernels.gate import gate

        shape = self.shape
        expected = max(1, shape.ranks * shape.tokens * shape.top_k // shape.experts)
        x = self.x
        for router, gate_up, down in zip(self.gates, self.gate_up, self.down, strict=True):
            h = functional.rms_norm(x, (shape.hidden,))
            chosen, weights = gate(torch.mm(h, router), self.table, shape.top_k, renormalise=True)
            got = self.exchange.dispatch(h, chosen)
            y = expert_ffn(got.packed, got.counts, gate_up, down, expected_rows=expected)
            x = x + self.exchange.combine(y, weights)
        return x

    def route(self) -> None:
        """To the live ranks. What they do not have (a rank alone) goes nowhere."""
        import torch

        live = self.exchange.live
        slots = self.shape.slots
        table = [copy if copy // slots in live else -1 for copy in physical(self.shape, live)]
        self.table.copy_(torch.tensor(table), non_blocking=False)
        self.exchange.route_to({copy // slots for copy in table if copy >= 0})


class Rank:
    def __init__(self, config: dict[str, Any], words: mmap.mmap) -> None:
        began = now()
        self.config = config
        self.shape = Shape(**config["shape"])
        self.rank, self.incarnation = config["rank"], config["incarnation"]
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(config["path"])
        self.link = Link(sock)
        self.link.send("hello", rank=self.rank, incarnation=self.incarnation, pid=os.getpid())
        self.words = words
        phases: dict[str, float] = {}
        self.plane = Plane(self.shape, self.rank, self.incarnation, Path(config["store"]), phases)
        phases["all_ms"] = (now() - began) / 1e6
        self.round = -1
        self.pending: dict[str, Any] | None = None
        self.start = threading.Event()
        self.parked = False
        self.masked_ns: dict[int, int] = {}
        self.durations: list[int] = []
        self.link.send("ready", phases=phases)

    def listen(self) -> None:
        from elastic_ep.wire.messages import Member

        while (message := self.link.receive()) is not None:
            match message["kind"]:
                case "lost":
                    got = now()
                    self.plane.exchange.mask(Member(*message["member"]))
                    self.masked_ns[message["member"][0]] = now()
                    self.link.send("masked", got_ns=got, masked_ns=now())
                case "connect":
                    threading.Thread(target=self.connect, args=(message["members"],), daemon=True).start()
                case "propose":
                    self.link.send("at", round=self.round)
                case "commit":
                    self.pending = message
                    self.start.set()
                case "park":
                    self.parked = True
                case "stats":
                    self.link.send("stats", durations_us=[d // 1000 for d in self.durations[-3000:]])
        os._exit(0)

    def connect(self, members: list[list[int]]) -> None:
        from elastic_ep.wire.messages import Member

        began = now()
        try:
            for member in members:
                self.plane.exchange.connect(Member(*member))
            self.link.send("connected", took_ms=(now() - began) / 1e6)
        except Exception:
            self.link.send("failed", why=traceback.format_exc())

    def forward(self) -> None:
        import torch

        self.start.wait()
        with torch.cuda.stream(self.plane.stream), torch.inference_mode():
            self.loop()

    def switch(self, pending: dict[str, Any]) -> None:
        """Take the new members in, at their first round. A joiner waits until the others are there."""
        from elastic_ep.wire.messages import Member

        if self.round < 0:
            self.round = pending["first"]
        elif self.round != pending["first"]:
            raise RuntimeError(f"round {self.round} is beyond {pending['first']}")
        for member in pending["members"]:
            self.plane.exchange.activate(Member(*member))
        self.plane.route()
        for rank in pending["wait_for"] if self.rank == pending["joiner"] else ():
            while WORD.unpack_from(self.words, rank * LINE)[0] < self.round:
                time.sleep(0.00002)

    def loop(self) -> None:
        plane, exchange = self.plane, self.plane.exchange
        last = now()
        poisoned: list[list[int]] = []
        switched = have = False
        while True:
            if self.parked:
                self.link.send("parked")
                threading.Event().wait()
            pending = self.pending
            if pending is not None and (self.round < 0 or self.round >= pending["first"]):
                self.pending = None
                self.switch(pending)
                switched = True
            WORD.pack_into(self.words, self.rank * LINE, self.round)
            exchange.begin_step(self.round)
            plane.graph.replay()
            plane.bad_host.copy_(plane.bad, non_blocking=True)
            exchange.read_masks()
            lost = exchange.end_step()
            end = now()
            if lost:
                poisoned.append([self.round, end])
                plane.route()
            else:
                if not have:
                    have = True
                    plane.expected.copy_(plane.out)
                    total = int(plane.out.view(plane.x.dtype).float().double().sum().item() * 1024)
                    self.link.send("result", sum=total)
                elif plane.bad_host.item():
                    self.link.send("wrong", round=self.round, elements=plane.bad_host.item())
                if poisoned:
                    self.link.send("recovered", poisoned=poisoned, committed=[self.round, end])
                    poisoned = []
                elif switched:
                    self.link.send("joined", round=self.round, took_ns=end - last, end_ns=end)
                else:
                    self.durations.append(end - last)
                switched = False
            last = end
            self.round += 1


def run_rank(config: dict[str, Any], mutex_fd: int, words_fd: int) -> None:
    hold_until_death(RobustMutexes(mutex_fd, config["mutex_slots"]), config["slot"])
    rank = Rank(config, mmap.mmap(words_fd, config["shape"]["ranks"] * LINE))
    threading.Thread(target=rank.listen, daemon=True).start()
    rank.forward()


def serve(control_fd: int, mutex_fd: int, words_fd: int) -> None:
    """Fork a rank for every packet; say when one has been reaped. Ends with the control socket."""
    import torch  # noqa: F401

    from elastic_ep.engine.ops_cuda.kernels import expert_ffn, gate
    from elastic_ep.exchange import mooncake

    # No device is touched before the fork. The name keeps the imports.
    assert all((mooncake, expert_ffn, gate))
    control = Link(socket.socket(fileno=control_fd))
    control.send("warm")

    def reap(pid: int) -> None:
        os.waitpid(pid, 0)
        control.send("gone", pid=pid, at_ns=now())

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (message := control.receive()) is not None:
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(message, mutex_fd, words_fd)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        # Waiters are threads that only wait: the children never use what they might hold.
        threading.Thread(target=reap, args=(pid,), daemon=True).start()
    os._exit(0)


__all__ = ["LINE", "Link", "Shape", "asdict", "now", "physical"]

if __name__ == "__main__":
    serve(*(int(word) for word in sys.argv[1:4]))
