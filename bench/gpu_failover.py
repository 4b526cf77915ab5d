"""What the survivors of a SIGKILL lose, on a GPU that four ranks share: the data plane, a rank killed again and again.

Each rank is a process of its own with the experts of Qwen3-30B-A3B's shape (random weights, every expert twice in the
group), and replays one CUDA graph of all layers: gate, dispatch, experts, combine. It is not the served model: attention
and sampling are missing, and a small stand-in for the controller sits here. Notice (a robust mutex), mask, routing
and rejoining are the project's own.

Each kill is timed in phases, all from the SIGKILL, each as the last survivor's: notice; mask issued; the step in flight
ended; the first step committed after it. "stall" is that last one less one median step. Every committed step's result is
compared with the first one's, bit by bit, on the device.

    python -m bench.gpu_failover --out bench/results/gpu_failover.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import queue
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.kit.bound import Bound

from bench.kit.failover_rank import LINE, Link, Shape, now
from elastic_ep.host.device_files import DeviceFiles
from elastic_ep.host.robust_mutex import Locked, RobustMutexes

DEADLINE_S = 60.0
SLOTS = 512
Event = tuple[int, tuple[int, int] | None, dict[str, Any]]
"""When it was received, from which member, what."""


class Failed(RuntimeError):
    pass


@contextmanager
def mps(directory: Path, wanted: bool) -> Iterator[bool]:
    """A private MPS daemon, stopped at the end. False if there is none."""
    program = shutil.which("nvidia-cuda-mps-control")
    if not wanted or program is None:
        yield False
        return
    for name, place in (("CUDA_MPS_PIPE_DIRECTORY", "pipe"), ("CUDA_MPS_LOG_DIRECTORY", "log")):
        (directory / place).mkdir()
        os.environ[name] = str(directory / place)
    subprocess.run([program, "-d"], check=True)
    try:
        yield True
    finally:
        subprocess.run([program], input="quit -t 5\n", text=True, check=False, timeout=30)


class Group:
    def __init__(self, shape: Shape, directory: Path) -> None:
        self.shape = shape
        self.directory = directory
        self.events: queue.Queue[Event] = queue.Queue()
        self.links: dict[tuple[int, int], Link] = {}
        self.pids: dict[tuple[int, int], int] = {}
        self.wrong: list[Any] = []
        self.sums: dict[int, set[int]] = {}
        self.used = 0
        (directory / "store").mkdir()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(directory / "controller"))
        self.listener.listen()
        self.mutex_fd = RobustMutexes.create_file(SLOTS)
        self.mutexes = RobustMutexes(self.mutex_fd, SLOTS)
        self.words_fd = os.memfd_create("words")
        os.ftruncate(self.words_fd, shape.ranks * LINE)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (theirs.fileno(), self.mutex_fd, self.words_fd)
        self.server = Bound([sys.executable, "-m", "bench.kit.failover_rank", *map(str, fds)], pass_fds=fds)
        theirs.close()
        self.control = Link(ours)
        threading.Thread(target=self._read, args=(self.control, None), daemon=True).start()
        threading.Thread(target=self._accept, daemon=True).start()
        self.wait("warm", 1)

    def _accept(self) -> None:
        while True:
            link = Link(self.listener.accept()[0])
            hello = link.receive()
            assert hello is not None
            member = (hello["rank"], hello["incarnation"])
            self.links[member] = link
            self.pids[member] = hello["pid"]
            threading.Thread(target=self._read, args=(link, member), daemon=True).start()
            self.events.put((now(), member, hello))

    def _read(self, link: Link, member: tuple[int, int] | None) -> None:
        try:
            while (message := link.receive()) is not None:
                self.events.put((now(), member, message))
        except OSError:
            pass

    def _watch(self, member: tuple[int, int], slot: int) -> None:
        how = self.mutexes.lock(slot)
        self.events.put((now(), member, {"kind": "died", "how": how.value}))
        assert how is Locked.OWNER_DIED

    def wait(self, kind: str, count: int) -> list[Event]:
        """The next `count` events of this kind; others are noted or dropped."""
        return self.wait_all({kind: count})[kind]

    def wait_all(self, wanted: dict[str, int]) -> dict[str, list[Event]]:
        """As many events of each kind, in any order."""
        limit = time.monotonic() + DEADLINE_S
        found: dict[str, list[Event]] = {kind: [] for kind in wanted}
        while any(len(found[kind]) < count for kind, count in wanted.items()):
            try:
                event = self.events.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                counts = {kind: len(events) for kind, events in found.items()}
                raise Failed(f"wanted {wanted}, heard {counts}") from None
            message = event[2]
            if message["kind"] in found:
                found[message["kind"]].append(event)
            elif message["kind"] == "failed":
                raise Failed(message["why"])
            elif message["kind"] == "died":
                raise Failed(f"{event[1]} died unasked at {event[0]}, wanted {wanted}")
            elif message["kind"] == "wrong":
                self.wrong.append((event[1], message))
            elif message["kind"] == "result" and event[1] is not None:
                self.sums.setdefault(event[1][0], set()).add(message["sum"])
        return found

    def launch(self, members: list[tuple[int, int]]) -> list[Event]:
        for rank, incarnation in members:
            slot, self.used = self.used, self.used + 1
            self.mutexes.reset(slot)
            self.control.send(
                "fork",
                rank=rank,
                incarnation=incarnation,
                slot=slot,
                mutex_slots=SLOTS,
                shape=asdict(self.shape),
                path=str(self.directory / "controller"),
                store=str(self.directory / "store"),
            )
            _, member, _ = self.wait("hello", 1)[0]
            assert member == (rank, incarnation)
            threading.Thread(target=self._watch, args=(member, slot), daemon=True).start()
        return self.wait("ready", len(members))

    def send(self, to: list[tuple[int, int]], kind: str, /, **values: Any) -> None:
        for member in to:
            self.links[member].send(kind, **values)

    def steps(self, live: list[tuple[int, int]]) -> list[float]:
        """Durations of the last undisturbed steps, ms."""
        self.send(live, "stats")
        return [d / 1000 for event in self.wait("stats", len(live)) for d in event[2]["durations_us"]]

    def close(self) -> None:
        for pid in self.pids.values():
            if pid > 0:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.server.kill()
        self.server.wait()


def release(hold: DeviceFiles, after_s: float, released: threading.Event) -> None:
    time.sleep(after_s)
    hold.release()
    released.set()


def kill_one(
    group: Group, live: list[tuple[int, int]], random_: random.Random, options: argparse.Namespace
) -> dict[str, Any]:
    """Kill a rank, take it in again. Times in ms. With `--park` its device has nothing to do any more when it dies."""
    time.sleep(random_.uniform(0.1, 0.3))
    victim = random_.choice(live)
    pid = group.pids[victim]
    group.pids[victim] = -1
    survivors = [member for member in live if member != victim]
    if options.park:
        group.send([victim], "park")
        group.wait("parked", 1)
        time.sleep(0.005)
    hold = DeviceFiles(pid) if options.hold else None
    released = threading.Event()
    killed = now()
    os.kill(pid, signal.SIGKILL)
    if hold is not None:
        threading.Thread(target=release, args=(hold, options.hold, released), daemon=True).start()
    noticed = group.wait("died", 1)[0][0]
    group.send(survivors, "lost", member=victim)
    heard = group.wait_all({"masked": len(survivors), "recovered": len(survivors), "gone": 1})
    masked = {kind: [event[2] for event in events] for kind, events in heard.items()}
    assert masked["gone"][0]["pid"] == pid
    gone = masked["gone"][0]["at_ns"]
    if hold is not None and not released.wait(DEADLINE_S):
        raise Failed("the driver does not take the dead rank's memory back")
    row: dict[str, Any] = {
        "victim": victim[0],
        "notice_ms": (noticed - killed) / 1e6,
        "mask_issued_ms": max(m["masked_ns"] - killed for m in masked["masked"]) / 1e6,
        "in_flight_ended_ms": max(m["poisoned"][-1][1] - killed for m in masked["recovered"]) / 1e6,
        "committed_ms": max(m["committed"][1] - killed for m in masked["recovered"]) / 1e6,
        "each_committed_ms": [(m["committed"][1] - killed) / 1e6 for m in masked["recovered"]],
        "poisoned_steps": max(len(m["poisoned"]) for m in masked["recovered"]),
        "gone_ms": (gone - killed) / 1e6,
        "driver_gone_ms": (now() - killed) / 1e6,
    }
    joiner = (victim[0], victim[1] + 1)
    ready = group.launch([joiner])[0]
    row["ready_ms"] = (ready[0] - killed) / 1e6
    row["start_phases"] = ready[2]["phases"]
    connect(group, survivors, [joiner])
    row["connected_ms"] = (now() - killed) / 1e6
    group.send(survivors, "propose")
    first = max(event[2]["round"] for event in group.wait("at", len(survivors))) + 20
    group.send(
        [*survivors, joiner],
        "commit",
        first=first,
        members=[*survivors, joiner],
        joiner=joiner[0],
        wait_for=[rank for rank, _ in survivors],
    )
    joined = group.wait("joined", len(live))
    old = [event[2] for event in joined if event[1] != joiner]
    row["rejoin_step_ms"] = max(message["took_ns"] for message in old) / 1e6
    row["full_strength_ms"] = (max(event[2]["end_ns"] for event in joined) - killed) / 1e6
    live[:] = [*survivors, joiner]
    return row


def connect(group: Group, old: list[tuple[int, int]], new: list[tuple[int, int]]) -> None:
    for member in new:
        others = [m for m in [*old, *new] if m != member]
        group.send([member], "connect", members=sorted(others))
    if old:
        group.send(old, "connect", members=new)
    group.wait("connected", len(old) + len(new))


def measure(
    shape: Shape,
    options: argparse.Namespace,
    random_: random.Random,
    directory: Path,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """One group's life: until there are `kills` rows, or it fails as a whole."""
    group = Group(shape, directory)
    live = [(rank, 0) for rank in range(shape.ranks)]
    error = None
    steps: list[float] = []
    try:
        group.launch(live)
        connect(group, [], live)
        group.send(live, "commit", first=0, members=live, joiner=-1, wait_for=[])
        group.wait("joined", len(live))
        time.sleep(1.0)
        steps = group.steps(live)
        while len(rows) < options.kills:
            rows.append(kill_one(group, live, random_, options))
        time.sleep(1.0)
        steps += group.steps(live)
    except (Failed, OSError) as problem:
        time.sleep(1.0)
        others = []
        while not group.events.empty():
            at, member, message = group.events.get()
            others.append([at, member, message["kind"]])
        error = {"why": str(problem), "kills_so_far": len(rows), "then": others}
        print(f"stopped after {len(rows)} kills: {error}", flush=True)
    finally:
        group.close()
    return {
        "error": error,
        "steps_ms": steps,
        "wrong": group.wrong,
        "distinct_results": {rank: len(sums) for rank, sums in sorted(group.sums.items())},
    }


def repeat(shape: Shape, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Groups one after the other until there are enough kills; a group that failed is counted as such."""
    random_ = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    lives: list[dict[str, Any]] = []
    limit = time.monotonic() + options.seconds
    while len(rows) < options.kills and len(lives) < 12 and time.monotonic() < limit:
        place = directory / str(len(lives))
        place.mkdir()
        lives.append(measure(shape, options, random_, place, rows))
    return {
        "rows": rows,
        "errors": [life["error"] for life in lives if life["error"]],
        "steps_ms": [step for life in lives for step in life["steps_ms"]],
        "wrong": [wrong for life in lives for wrong in life["wrong"]],
        "distinct_results": [life["distinct_results"] for life in lives],
    }


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def machine() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {"gpu": gpu, "cores": os.cpu_count(), "kernel": platform.release(), **versions}


def _summary(values: list[float]) -> dict[str, float | int]:
    return {
        **{
            name: round(percentile(values, share), 3)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        },
        "max": round(max(values), 3),
        "n": len(values),
    }


def digest(raw: dict[str, Any]) -> dict[str, Any]:
    if not raw["rows"] or not raw["steps_ms"]:
        return {}
    median = statistics.median(raw["steps_ms"])
    names = [name for name in raw["rows"][0] if name.endswith("_ms") and not name.startswith("each")]
    table = {name: _summary([row[name] for row in raw["rows"]]) for name in names}
    table["stall_ms"] = _summary([row["committed_ms"] - median for row in raw["rows"]])
    table["rejoin_pause_ms"] = _summary([row["rejoin_step_ms"] - median for row in raw["rows"]])
    return {"median_step_ms": round(median, 3), "step_ms": _summary(raw["steps_ms"]), **table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16, help="a rank and step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-mps", action="store_true")
    parser.add_argument("--park", action="store_true", help="let the victim's device finish first")
    parser.add_argument(
        "--hold", type=float, default=0.0, help="seconds that a dead rank's device files stay open"
    )
    parser.add_argument("--timeout-ms", type=int, default=20_000, help="how long a kernel waits for a peer")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no other group after that")
    parser.add_argument("--commit", default="unknown", help="noted in the result")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shape = Shape(layers=options.layers, tokens=options.tokens, timeout_ms=options.timeout_ms)
    with tempfile.TemporaryDirectory() as name, mps(Path(name), not options.no_mps) as shared:
        raw = repeat(shape, options, Path(name))
    result = {
        "machine": machine(),
        "commit": options.commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m bench.gpu_failover", *sys.argv[1:]]),
        "mps": shared,
        "shape": asdict(shape),
        "summary": digest(raw),
        **raw,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key not in ("rows", "steps_ms")})
    if raw["errors"] or raw["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
