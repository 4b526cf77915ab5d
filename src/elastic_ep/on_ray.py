"""`python -m elastic_ep.on_ray`: has Ray start an agent (`agent.py`) on each further host, and another when one is lost.

What `--ray` starts beside the run process, and what ends with it: when its standard input does. One actor a host, in
a placement group that puts no two on one node, nor any on the run process's; an agent is its actor's child, and dies
with it.

HAZARD: Ray is asked where agents may run, and never who is alive. It says so many seconds late, or not at all while a
link is cut; the group has gone on by then.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import structlog

from elastic_ep import logs
from elastic_ep.config import ConfigError, LogConfig

EXTRA = "ray"
LOOK_S = 0.5
REFUSED_S = 5.0
"""Before an agent is started again where one has ended by itself."""
EXITED = "exit status "
USAGE_ERROR = 2
log = structlog.get_logger()


class Cluster(Protocol):
    """What is asked of Ray. A handle stands for an agent on a node."""

    def start(self, bundle: int) -> Any:
        """Returns at once; the agent runs when there is a node for it."""

    def ended(self, handles: Collection[Any], timeout_s: float) -> dict[Any, str]:
        """Which agents have ended within that time, and why; those whose node is lost, too."""


def keep(cluster: Cluster, agents: int, over: threading.Event) -> None:
    """One agent in each bundle until `over` is set, but for those that were told to end."""
    running = {cluster.start(bundle): bundle for bundle in range(agents)}
    while running and not over.is_set():
        for handle, why in cluster.ended(running.keys(), LOOK_S).items():
            bundle = running.pop(handle)
            if over.is_set() or why == f"{EXITED}0":
                continue
            log.warning("an agent that Ray had started has ended: another is started", bundle=bundle, why=why)
            if why.startswith(EXITED) and over.wait(REFUSED_S):
                return
            running[cluster.start(bundle)] = bundle


def command(join: str, key_file: str, address: str) -> list[str]:
    """Of an agent."""
    return [
        sys.executable, "-m", "elastic_ep.agent", "--join", join, "--key-file", key_file, "--address", address,
    ]  # fmt: skip


def run_agent(join: str, key: bytes, address: str) -> str:
    """On the agent's host: until it has ended; how. The key is there as a file for as long."""
    with tempfile.TemporaryDirectory(prefix="elastic_ep-") as folder:
        path = Path(folder, "group.key")
        path.touch(mode=0o600)
        path.write_bytes(key)
        status = subprocess.run(command(join, str(path), address), check=False).returncode
    return f"{EXITED}{status}"


class RayCluster:
    """Raises whatever Ray does if there is no such cluster."""

    def __init__(self, address: str, agents: int, join: str, key: bytes) -> None:
        import ray
        from ray.util.placement_group import placement_group

        ray.init(address=address, log_to_driver=True, namespace="elastic_ep")
        self._ray = ray
        here = ray.get_runtime_context().get_node_id()
        elsewhere = {"ray.io/node-id": f"!{here}"}
        self._group = placement_group(
            [{"CPU": 1.0}] * agents, strategy="STRICT_SPREAD", bundle_label_selector=[elsewhere] * agents
        )
        self._told = (join, key)

    def start(self, bundle: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        actor = self._ray.remote(_Agent).options(num_cpus=1, max_restarts=0, scheduling_strategy=where)
        handle = actor.remote()
        return _Running(handle, handle.run.remote(*self._told))

    def ended(self, handles: Collection[Any], timeout_s: float) -> dict[Any, str]:
        by_result = {handle.result: handle for handle in handles}
        done, _ = self._ray.wait(list(by_result), num_returns=1, timeout=timeout_s)
        return {by_result[result]: self._why(result) for result in done}

    def _why(self, result: Any) -> str:
        try:
            return str(self._ray.get(result))
        except self._ray.exceptions.RayError as error:
            return str(error).partition("\n")[0]


class _Running:
    """An actor lives as long as its handle does."""

    def __init__(self, actor: Any, result: Any) -> None:
        self.actor = actor
        self.result = result


class _Agent:
    """What Ray has on a host."""

    def run(self, join: str, key: bytes) -> str:
        import ray

        return run_agent(join, key, ray.util.get_node_ip_address())


# The run process's side


@contextmanager
def agents(address: str, number: int, join: str, key_file: str) -> Iterator[None]:
    """The command of this module runs meanwhile. Raises `ConfigError`."""
    check()
    arguments = ["--ray", address, "--agents", str(number), "--join", join, "--key-file", key_file]
    # HAZARD: Ray takes signals of the terminal, too, and would end agents before the group has told them to go.
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic_ep.on_ray", *arguments], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check() -> None:
    """Raises `ConfigError` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"--ray needs Ray, which is not installed: pip install 'elastic-ep[{EXTRA}]'")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic_ep.on_ray", description=__doc__)
    for name in ("--ray", "--agents", "--join", "--key-file"):
        parser.add_argument(name, required=True, type=int if name == "--agents" else str)
    options = parser.parse_args(arguments)
    logs.configure(LogConfig(), "ray")
    # Unless it is said, Ray takes a token file of some other start for an order to ask for tokens.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    over = threading.Event()

    def until_the_run_process_ends() -> None:
        sys.stdin.buffer.read()
        over.set()

    threading.Thread(target=until_the_run_process_ends, daemon=True).start()
    try:
        cluster = RayCluster(options.ray, options.agents, options.join, Path(options.key_file).read_bytes())
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        log.error("no agents from Ray", why=str(error).partition("\n")[0], ray=options.ray)
        return USAGE_ERROR
    keep(cluster, options.agents, over)
    return 0


if __name__ == "__main__":
    sys.exit(main())
