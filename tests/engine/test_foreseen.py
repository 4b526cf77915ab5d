"""A step that was prepared while the one before it ran computes what it would have computed otherwise.

In the place of a model is a rule: the next token is a sum over all tokens before it, which are read from where a step's
inputs say that they are. So a wrong token, position, page or length gives another text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import NextDecodes, StepInputs, StepShape
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights, dummy_source
from tests.engine.solo import TINY, assign
from tests.kit.solo_exchange import SoloDeviceExchange

CPU = torch.device("cpu")
LIMITS = EngineLimits(max_model_len=120, max_num_seqs=5, max_num_batched_tokens=24, num_pages=24)
VOCABULARY = 97
END = 11


def next_token(context: list[int]) -> int:
    return sum((place + 1) * (token + 1) for place, token in enumerate(context)) % VOCABULARY


@dataclass
class Rule:
    """In the place of graphs."""

    inputs: StepInputs
    cache: dict[int, int] = field(default_factory=dict)
    """Tokens by their place in the KV cache."""

    def run(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, page = self.inputs, LIMITS.page_size
        count = int(inputs.count)
        for slot, token in zip(inputs.slots[:count].tolist(), inputs.tokens[:count].tolist(), strict=True):
            self.cache[slot] = token
        tokens = torch.zeros(shape.outputs, dtype=torch.int64)
        for row in range(shape.outputs):
            length, table = int(inputs.lengths[row]), inputs.tables[row].tolist()
            if length:
                assert int(inputs.positions[inputs.last_rows[row]]) == length - 1
            places = (table[place // page] * page + place % page for place in range(length))
            tokens[row] = next_token([self.cache[place] for place in places]) if length else 0
        return torch.zeros(shape.outputs, 1), tokens


class RuleRunner(CudaRunner):
    def __init__(self) -> None:
        placement = launch_placement(1, TINY.moe_layers, TINY.moe.experts, 0)
        weights = Weights(TINY, placement, 0, dummy_source(TINY, 0), CPU, torch.float32)
        self.exchange = SoloDeviceExchange(TINY.moe.experts, CPU, torch.float32)
        super().__init__(LIMITS, weights, placement, 0, self.exchange, tile=4)
        self._graphs: Any = Rule(self._inputs)
        self.prepared = 0
        fill_next = self._inputs.fill_next

        def counted(prepared: NextDecodes, tokens: Any) -> None:
            self.prepared += 1
            fill_next(prepared, tokens)

        self._inputs.fill_next = counted  # type: ignore[method-assign]  # counts


@dataclass
class Client:
    prompt: list[int]
    most: int
    stops: tuple[int, ...]
    got: list[int] = field(default_factory=list)
    finish: str | None = None

    def expected(self) -> tuple[list[int], str]:
        tokens = list(self.prompt)
        while True:
            tokens.append(next_token(tokens))
            if tokens[-1] in self.stops:
                return tokens[len(self.prompt) :], "stop"
            if len(tokens) - len(self.prompt) == self.most:
                return tokens[len(self.prompt) :], "length"


def serve(seed: int, *, steps: int, busy: float) -> tuple[RuleRunner, dict[int, Client]]:
    """Clients come and go, steps are poisoned or find an expert without a copy: with the probability `busy` in each."""
    dice = random.Random(seed)
    runner, clients, step = RuleRunner(), dict[int, Client](), 0
    gone: set[int] = set()
    late: list[Any] = []
    while step < steps or runner.has_work:
        if step < steps and dice.random() < busy and runner.waiting < 3:
            number = len(clients)
            prompt = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 40))]
            client = clients[number] = Client(
                prompt, dice.randint(1, 60), dice.choice([(), (END,), (3, END)])
            )
            runner.add(assign(number, prompt, max_tokens=client.most, stop_token_ids=client.stops))
        if clients and dice.random() < busy / 4:
            number = dice.choice(list(clients))
            runner.cancel(number)
            gone.add(number)
        if dice.random() < busy / 4:
            runner.exchange.poison = frozenset({1})
        # As the forward thread does: a step's tokens are looked at when the next one has been launched, or before.
        told = iter(late)

        def launched(told: Any = told) -> None:
            for result in told:
                tell(clients, result)

        result = runner.run_step(step, schedule=dice.random() >= busy / 4, launched=launched)
        launched(told)
        late = [result]
        if dice.random() < 0.5:
            launched(iter(late))
            late = []
        step += 1
    for result in late:
        tell(clients, result)
    for number in gone:
        clients[number].finish = clients[number].finish or "cancelled"
    return runner, clients


def tell(clients: dict[int, Client], result: Any) -> None:
    assert len(result.sampled) == len(result.tokens)
    for token in result.tokens:
        client = clients[token.request_id]
        assert token.index == len(client.got), "each token once, in order"
        assert client.finish is None
        client.got.append(token.token)
        client.finish = token.finish


def check(clients: dict[int, Client]) -> None:
    for client in clients.values():
        tokens, finish = client.expected()
        if client.finish == "cancelled":
            tokens, finish = tokens[: len(client.got)], "cancelled"
        assert (client.got, client.finish) == (tokens, finish)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 30), busy=st.sampled_from([0.05, 0.2, 0.6]))
def test_texts_are_what_they_should_be(seed: int, busy: float) -> None:
    runner, clients = serve(seed, steps=60, busy=busy)
    check(clients)
    assert not runner.page_counts.held


@pytest.mark.parametrize("busy", [0.05])
def test_most_steps_of_decodes_are_prepared(busy: float) -> None:
    runner, clients = serve(7, steps=200, busy=busy)
    check(clients)
    assert runner.prepared > 80
    assert runner.preemptions == 0
