"""What deploy/ asks of Prometheus is served: every name, and every label that is asked for. And what it starts exists."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.agent import parse as parse_agent
from elastic_ep.group.metrics import Metrics
from elastic_ep.machines.membership.events import GroupState
from elastic_ep.run import parse as parse_run
from elastic_ep.wire.group_key import GroupKey
from elastic_ep.wire.messages import Member, PageCounts, RankState

DEPLOY = Path(__file__).parents[1] / "deploy"
_NAME = re.compile(r"\b(?:elastic_ep|vllm|sglang):\w+")
_ASKED = re.compile(r"\b((?:elastic_ep|vllm|sglang):\w+)\{([^}]*)\}")
_FROM_SCRAPING = {"instance", "job"}


def served() -> dict[str, dict[str, set[str]]]:
    """Of a server before its first request: the values of each label, by name of a sample."""
    metrics = Metrics()
    metrics.known_as("m")
    metrics.rank_state(0, RankState.SERVING)
    metrics.group(GroupState.SERVING, idle=False, tolerates=1)
    metrics.kv_cache({0: 0.0}, [0])
    metrics.pages(Member(0, 1), PageCounts())
    found: dict[str, dict[str, set[str]]] = {}
    for line in metrics.render().decode().splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels = found.setdefault(name.partition(" ")[0], defaultdict(set))
            for label, value in re.findall(r'(\w+)="([^"]*)"', rest):
                labels[label].add(value)
    return found


def expressions(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for item in node:
            yield from expressions(item)


def asked(file: str) -> list[str]:
    text = (DEPLOY / file).read_text()
    read: Any = json.loads if file.endswith(".json") else importlib.import_module("yaml").safe_load
    found = list(expressions(read(text)))
    assert len(found) > 8
    return found


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yml"])
def test_every_name_and_label_is_served(file: str) -> None:
    there, seen = served(), 0
    for expression in asked(file):
        names = set(_NAME.findall(expression))
        assert names <= there.keys(), expression
        seen += len(names)
        for name, matchers in _ASKED.findall(expression):
            for label, how, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
                if label not in _FROM_SCRAPING:
                    assert label in there[name], (name, label)
                    known = any(
                        value == one if how == "=" else re.fullmatch(value, one) for one in there[name][label]
                    )
                    assert known, (name, label, value)
    assert seen > 8


def test_panels_do_not_overlap_and_each_shows_something() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        places = {
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in places) < 24
        assert not places & taken
        taken |= places
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_names_of_others_carry_their_labels() -> None:
    there = served()
    theirs = [name for name in there if not name.startswith("elastic_ep:")]
    assert len(theirs) > 60
    for name in theirs:
        assert there[name]["model_name"] == {"m"}, name
        assert ("engine" in there[name]) is name.startswith("vllm:"), name
        assert "rank" not in there[name], name


# How groups are started

_STARTS = {
    "Dockerfile": 1,
    "leaderworkerset.yaml": 2,
    "kuberay.yaml": 1,
    "elastic-ep.service": 1,
    "elastic-ep-agent.service": 1,
}
_STANDS_FOR = {
    "HOSTS": "3", "RANKS_PER_HOST": "4", "ADDRESS": "10.0.0.1", "JOIN": "10.0.0.2", "POD_IP": "10.0.0.1",
}  # fmt: skip


def starts(file: str) -> list[list[str]]:
    """Its command lines of this project: the module, and what it is given."""
    text = (DEPLOY / file).read_text()
    lines: list[str] = []
    if file.endswith(".yaml"):
        lines = [" ".join(words) for words in commands(importlib.import_module("yaml").safe_load(text))]
    elif file == "Dockerfile":
        lines = [
            shlex.join(json.loads(line.removeprefix("CMD ")))
            for line in text.splitlines()
            if line.startswith("CMD ")
        ]
    else:
        joined = text.replace("\\\n", " ")
        lines = [line.partition("=")[2] for line in joined.splitlines() if line.startswith("ExecStart=")]
    found = []
    for line in lines:
        line = re.sub(r"\$\((?:getent|hostname)[^)]*\)", "10.0.0.1", line)
        line = re.sub(r"\$[({]?(\w+)[)}]?", lambda name: _STANDS_FOR.get(name[1], "/key"), line)
        words = shlex.split(line)
        at = next(at for at, word in enumerate(words) if word.startswith("elastic_ep."))
        found.append(words[at:])
    return found


def commands(node: Any) -> Iterator[list[str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "entrypoint":
                yield [value]
            elif key == "args":
                yield value
            else:
                yield from commands(value)
    elif isinstance(node, list):
        for item in node:
            yield from commands(item)


@pytest.mark.parametrize("file", _STARTS)
def test_what_a_file_starts_is_a_command_line_that_is_understood(file: str, tmp_path: Path) -> None:
    found = starts(file)
    assert len(found) == _STARTS[file]
    key = tmp_path / "key"
    GroupKey.of_or_into_file(key)
    for module, *given in found:
        if module == "elastic_ep.run":
            parse_run(given)
        else:
            given[given.index("--key-file") + 1] = str(key)
            assert module == "elastic_ep.agent"
            assert parse_agent(given).group[1] == 9000
