"""What deploy/ asks of Prometheus is served: every name, and every label that is asked for."""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.group.metrics import Metrics
from elastic_ep.machines.membership.events import GroupState
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
