"""Agents that Ray places: what is asked of it, with a cluster that is no cluster, and what is refused."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Collection
from pathlib import Path

import pytest

from elastic_ep import on_ray
from elastic_ep.agent import parse as parse_agent
from elastic_ep.config import ConfigError
from elastic_ep.on_ray import keep, run_agent
from elastic_ep.run import parse
from elastic_ep.wire.group_key import GroupKey

HOSTS = ["--hosts", "3", "--ranks-per-host", "2", "--hosts-address", "10.0.0.1:9000", "--key-file", "key"]


class Story:
    """A cluster in which agents end as told: of each look, bundle and why."""

    def __init__(self, *looks: dict[int, str]) -> None:
        self.looks = list(looks)
        self.started: list[int] = []
        self.over = threading.Event()

    def start(self, bundle: int) -> tuple[int, int]:
        self.started.append(bundle)
        return bundle, len(self.started)

    def ended(self, handles: Collection[tuple[int, int]], timeout_s: float) -> dict[tuple[int, int], str]:
        if not self.looks:
            self.over.set()
            return {}
        look = self.looks.pop(0)
        return {handle: look[handle[0]] for handle in handles if handle[0] in look}


def test_an_agent_is_started_in_every_bundle_and_anew_where_its_node_is_lost() -> None:
    story = Story({}, {1: "the actor died"}, {}, {0: "the actor died", 1: "the node was lost"})
    keep(story, 2, story.over)
    assert story.started == [0, 1, 1, 0, 1]


def test_one_that_was_told_to_end_is_not_started_again_and_one_that_failed_is_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_ray, "REFUSED_S", 0.01)
    story = Story({0: "exit status 0"}, {1: "exit status 2"})
    keep(story, 2, story.over)
    assert story.started == [0, 1, 1]
    monkeypatch.setattr(on_ray, "REFUSED_S", 1000.0)
    story = Story({0: "exit status 0", 1: "exit status 0"})
    keep(story, 2, story.over)
    assert story.started == [0, 1], "and when all have ended it is over"


def test_an_agent_has_the_key_in_a_file_of_its_own_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = GroupKey.of_or_into_file(tmp_path / "key")
    seen = tmp_path / "seen"
    script = (
        "import os, shutil, sys\n"
        "path = sys.argv[sys.argv.index('--key-file') + 1]\n"
        f"assert os.stat(path).st_mode & 0o777 == 0o600; shutil.copy(path, {str(seen)!r}); sys.exit(5)"
    )
    arguments: list[str] = []

    def instead(join: str, key_file: str, address: str) -> list[str]:
        arguments[:] = on_ray_command(join, key_file, address)
        return [sys.executable, "-c", script, *arguments[3:]]

    on_ray_command = on_ray.command
    monkeypatch.setattr(on_ray, "command", instead)
    assert run_agent("10.0.0.1:9000", (tmp_path / "key").read_bytes(), "10.0.0.2") == "exit status 5"
    assert seen.read_bytes() == (tmp_path / "key").read_bytes()
    given = arguments[arguments.index("--key-file") + 1]
    assert not Path(given).exists()
    arguments[arguments.index("--key-file") + 1] = str(tmp_path / "key")
    options = parse_agent(arguments[3:])
    assert (options.group, options.address, options.key) == (("10.0.0.1", 9000), "10.0.0.2", key)


def test_ray_is_for_several_hosts_and_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(HOSTS).agents_on_ray == 0
    assert parse([*HOSTS, "--ray", "auto"]).agents_on_ray == 2
    assert parse([*HOSTS, "--ray", "auto", "--ray-agents", "3"]).agents_on_ray == 3
    with pytest.raises(ConfigError, match="--ray-agents needs --ray"):
        parse([*HOSTS, "--ray-agents", "3"])
    with pytest.raises(ConfigError, match="--ray-agents 1: --hosts 3 needs 2"):
        parse([*HOSTS, "--ray", "auto", "--ray-agents", "1"])
    with pytest.raises(ConfigError, match="--ray is for several hosts"):
        parse(["--ray", "auto"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'elastic-ep\[ray\]'"):
        on_ray.check()


def test_its_command_ends_with_a_line_where_there_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GroupKey.of_or_into_file(tmp_path / "key")

    def nobody(*_told: object) -> object:
        raise ConnectionError("could not find any running Ray instance\nmore")

    monkeypatch.setattr(on_ray, "RayCluster", nobody)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    arguments = ["--ray", "auto", "--agents", "2", "--join", "a:1", "--key-file", str(tmp_path / "key")]
    assert on_ray.main(arguments) == on_ray.USAGE_ERROR
    assert "could not find any running Ray instance" in "".join(capsys.readouterr())
