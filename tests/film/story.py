"""Random stories of requests and losses, told by the real routing machine, as the lines of a log."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.events import RoutingConfig
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.codec import to_plain
from elastic_ep.wire.messages import Member, SamplingParams, Token

STEP_NS = 7_000_000
SECRET = 424242
"""Every token; nothing of it may be in a film."""


@dataclass
class Story:
    """`delivered`, `owners` and `losses` are what really happened: by request its tokens' times and who computed each."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    delivered: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    owners: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    losses: list[tuple[int, int]] = field(default_factory=list)
    now_ns: int = 0

    @property
    def now_ms(self) -> float:
        return round(self.now_ns / 1e6, 3)

    def line(self, **fields: Any) -> None:
        self.lines.append(json.loads(json.dumps({"t_ns": self.now_ns, **fields})))


def tell(seed: int, ranks: int = 4, steps: int = 120) -> Story:
    """A story of `steps` steps. Its first line says the run."""
    dice, story = random.Random(seed), Story()
    router = RoutingMachine(RoutingConfig(max_num_seqs=8, max_queued=1024))
    members = {rank: Member(rank, 1) for rank in range(ranks)}
    away: dict[int, int] = {}
    story.line(run={"format": 3, "version": "0", "began_ns": 0, "config": {"ranks": ranks}}, n=0)

    def route(event: ev.Event) -> list[Any]:
        effects = list(router.step(event))
        story.line(machine="routing", heard=to_plain(event), effects=[to_plain(each) for each in effects])
        return effects

    def group(*effects: Any) -> None:
        story.line(machine="membership", heard=["Tick", 0], effects=list(effects))

    for member in members.values():
        group(["RankMoved", list(member), "Serving", ""], ["MemberUp", list(member)])
        route(ev.RankUp(member))
    for step in range(steps):
        story.now_ns += STEP_NS + dice.randrange(STEP_NS)
        if dice.random() < 0.4:
            prompt = (SECRET,) * dice.randrange(1, 5)
            new = ev.NewRequest(step, prompt, SamplingParams(max_tokens=dice.randrange(1, 40)), 0, 0)
            route(ev.Submitted(new))
        if dice.random() < 0.05 and members:
            rank, member = dice.choice(sorted(members.items()))
            del members[rank]
            away[rank] = member.incarnation
            story.losses.append((rank, member.incarnation))
            notice = {"rank": rank, "incarnation": member.incarnation, "source": "mutex"}
            story.line(note="death_notice", at_ns=story.now_ns, **notice)
            view = ["View", step, [["Seat", *other, 0] for other in members.values()], None]
            group(
                ["RankMoved", list(member), "Failed", "died"],
                ["Publish", view],
                ["MemberDown", list(member), "died"],
            )
            route(ev.RankDown(member, "died"))
        elif away and dice.random() < 0.2:
            rank = dice.choice(sorted(away))
            members[rank] = Member(rank, away.pop(rank) + 1)
            group(["RankMoved", list(members[rank]), "Serving", ""], ["MemberUp", list(members[rank])])
            route(ev.RankUp(members[rank]))
        for member in list(members.values()):
            mine = [request for request in router.requests.values() if request.owner == member]
            if not mine:
                continue
            tokens = []
            for request in mine[:4]:
                ends = len(request.emitted) + 1 >= request.asked.params.max_tokens
                finish = "length" if ends else None
                tokens.append(Token(request.asked.request_id, len(request.emitted), SECRET, finish))
            for effect in route(ev.TokensCommitted(member, tuple(tokens))):
                if isinstance(effect, ev.Deliver):
                    story.delivered[effect.request_id].append(story.now_ms)
                    story.owners[effect.request_id].append(member.rank)
    return story
