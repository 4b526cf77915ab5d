"""Golden transcripts of the routing machine: `tests/scenarios/routing/*.txt`.

Lines that begin with `> ` are events, the indented lines after each are its effects; `#` begins a comment. To
write the effects anew after a deliberate change, and then to read the difference in git:

    python tests/machines/test_routing_scenarios.py --update

The words of the events (a member is rank/incarnation):

    config max_num_seqs=2 max_queued=8      any field of RoutingConfig; first line only
    submit 0 max_tokens=4                   request 0; its prompt is one token, 100 + its id
    submit 0 pages=4 marks=1,2,3,4          of four pages of 16 tokens, and one token
    up 0/1, drain 0/1, down 0/1 killed      a rank serves, drains, is lost
    held 0/1 2 3                            requests 2 and 3 wait in the rank
    tokens 0/1 0:0 0:1=stop                 request:index, optionally =finish; the token is index + 1000 * id
    cancel 0, stop, deadline
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.messages import Assign, Cancel, Member, SamplingParams, Token

FOLDER = Path(__file__).parents[1] / "scenarios" / "routing"


def parse_event(text: str) -> ev.Event:
    word, *rest = text.split()
    match word:
        case "submit":
            request_id, options = int(rest[0]), _options(rest[1:])
            params = SamplingParams(int(options.get("max_tokens", "16")))
            prompt = (100 + request_id,) * (16 * int(options.get("pages", "0")) + 1)
            marks = tuple(map(int, filter(None, options.get("marks", "").split(","))))
            return ev.Submitted(ev.NewRequest(request_id, prompt, params, 0, 0, marks))
        case "held":
            return ev.TokensCommitted(_member(rest[0]), (), held=tuple(map(int, rest[1:])))
        case "cancel":
            return ev.CancelRequested(int(rest[0]))
        case "up":
            return ev.RankUp(_member(rest[0]))
        case "drain":
            return ev.RankDraining(_member(rest[0]))
        case "down":
            return ev.RankDown(_member(rest[0]), " ".join(rest[1:]))
        case "tokens":
            return ev.TokensCommitted(_member(rest[0]), tuple(_token(item) for item in rest[1:]))
        case "stop":
            return ev.StopRequested()
        case "deadline":
            return ev.DeadlinePassed()
    raise ValueError(f"no such event: {text}")


def show(effect: ev.Effect) -> str:
    match effect:
        case ev.Send(member, Assign() as assign):
            return f"send {_name(member)} assign {assign.request_id} emitted={list(assign.emitted)}"
        case ev.Send(member, Cancel(request_id)):
            return f"send {_name(member)} cancel {request_id}"
        case ev.Deliver(request_id, tokens):
            shown = " ".join(f"{t.index}:{t.token}" + (f"={t.finish}" if t.finish else "") for t in tokens)
            return f"deliver {request_id} {shown}"
        case ev.FromCache(request_id, count):
            return f"from cache {request_id} {count}"
        case ev.Finish(request_id, reason):
            return f"finish {request_id} {reason}"
        case ev.Refuse(request_id, reason, retry_after_s):
            return f"refuse {request_id} {reason} retry_after_s={retry_after_s}"
        case ev.Replayed(request_id, member):
            return f"replayed {request_id} from {_name(member)}"
        case ev.Moved(request_id, member):
            return f"moved {request_id} from {_name(member)}"
        case ev.Fault(member, reason):
            return f"fault {_name(member)} {reason}"
        case ev.WorkBegan() | ev.WorkEnded() | ev.Drained():
            return {"WorkBegan": "work began", "WorkEnded": "work ended"}.get(
                type(effect).__name__, "drained"
            )
    raise ValueError(f"no word for {effect}")


def play(script: str) -> str:
    """The script with every event's effects as they are now."""
    machine: RoutingMachine | None = None
    lines: list[str] = []
    for line in script.splitlines():
        if line.startswith("> config"):
            fields = {name: float(value) for name, value in _options(line.split()[2:]).items()}
            numbers = {name: int(value) if value.is_integer() else value for name, value in fields.items()}
            machine = RoutingMachine(ev.RoutingConfig(**{"max_queued": 1024, **numbers}))  # type: ignore[arg-type]  # from a text
            lines.append(line)
        elif line.startswith("> "):
            assert machine is not None, "the first event must be config"
            lines.append(line)
            lines += [f"    {show(effect)}" for effect in machine.step(parse_event(line[2:]))]
            machine.check()
        elif not line.startswith("    "):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _options(words: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _member(text: str) -> Member:
    rank, incarnation = text.split("/")
    return Member(int(rank), int(incarnation))


def _name(member: Member) -> str:
    return f"{member.rank}/{member.incarnation}"


def _token(text: str) -> Token:
    place, _, finish = text.partition("=")
    request_id, index = map(int, place.split(":"))
    return Token(request_id, index, index + 1000 * request_id, finish or None)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    script = path.read_text()
    assert play(script) == script


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 5


if __name__ == "__main__" and sys.argv[1:] == ["--update"]:
    for path in sorted(FOLDER.glob("*.txt")):
        path.write_text(play(path.read_text()))
