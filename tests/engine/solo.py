"""An exchange of one rank with itself, and small models."""

from __future__ import annotations

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.exchange.base import Received
from elastic_ep.exchange.pull import HOST_FORMAT, TILE
from elastic_ep.models import qwen3_moe
from elastic_ep.models.decoder_config import DecoderConfig
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import Placement, launch_placement
from elastic_ep.weights.bank import Weights, dummy_source
from elastic_ep.wire.messages import Assign, Member, SamplingParams, Token

TINY_CONFIG = DecoderConfig(
    vocab_size=211,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    max_position_embeddings=512,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    eos_token_ids=(3,),
)
TINY = qwen3_moe.spec(TINY_CONFIG)


class SoloExchange:
    """One rank. `poison` names ranks that the next `end_step` reports as masked."""

    format = HOST_FORMAT

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.waiting_for: int | None = None
        self.operations = 0
        self.poison: frozenset[int] = frozenset()
        self.garbage = False

    def connect(self, member: Member) -> None:
        raise NotImplementedError

    activate = mask = connect

    def begin_step(self, step: int) -> None:
        pass

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self.operations += 1
        self._slot = physical_experts.reshape(-1)
        counts = torch.bincount(self._slot, minlength=self._slots)
        order = torch.argsort(self._slot, stable=True)
        self._position = torch.empty_like(order)
        self._position[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self._slot[order]]
        capacity = max(1, -(-int(counts.max()) // TILE)) * TILE
        packed = torch.zeros(self._slots, capacity, x.shape[1])
        packed[self._slot, self._position] = x.repeat_interleave(physical_experts.shape[1], dim=0)
        return Received(packed, counts)

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.operations += 1
        rows = y[self._slot, self._position].view(*weights.shape, y.shape[2])
        out = torch.zeros(len(weights), y.shape[2])
        for k in range(weights.shape[1]):
            out += weights[:, k, None] * rows[:, k]
        return out * float("nan") if self.garbage else out

    def end_step(self) -> frozenset[int]:
        poison, self.poison, self.garbage = self.poison, frozenset(), False
        return poison

    def close(self) -> None:
        pass


def solo_runner(
    spec: ModelSpec = TINY,
    *,
    limits: EngineLimits | None = None,
    weights: Weights | None = None,
    exchange: SoloExchange | None = None,
) -> ModelRunner:
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    limits = limits or EngineLimits(max_model_len=400, num_pages=200)
    weights = weights or dummy_weights(spec, placement)
    return ModelRunner(limits, weights, placement, 0, exchange or SoloExchange(spec.moe.experts))


def dummy_weights(spec: ModelSpec, placement: Placement, rank: int = 0, seed: int = 0) -> Weights:
    return Weights(spec, placement, rank, dummy_source(spec, seed), torch.device("cpu"))


def assign(
    request_id: int, prompt: list[int], emitted: list[int] | None = None, seed: int = 0, **params: object
) -> Assign:
    asked = SamplingParams(**{"max_tokens": 16, "ignore_eos": True, **params})  # type: ignore[arg-type]  # of any field
    return Assign(request_id, tuple(prompt), tuple(emitted or ()), asked, seed, 0)


def drain(runner: StepRunner, max_steps: int = 2000) -> dict[int, list[Token]]:
    """Run to the end; the tokens of each request, in order."""
    tokens: dict[int, list[Token]] = {}
    for step in range(max_steps):
        if not runner.has_work:
            return tokens
        for token in runner.run_step(step, schedule=True).tokens:
            tokens.setdefault(token.request_id, []).append(token)
    raise AssertionError(f"not done after {max_steps} steps")


def ids(tokens: list[Token]) -> list[int]:
    return [token.token for token in tokens]
