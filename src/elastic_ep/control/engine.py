"""Builds a rank's engine: exchange, weights, runner. Runs on the forward thread."""

from __future__ import annotations

from pathlib import Path

import torch

from elastic_ep.config import RankConfig
from elastic_ep.exchange.base import Exchange, ExchangeShape
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.messages import Member
from elastic_ep.model.config import load_model_config
from elastic_ep.model.runner import ModelRunner
from elastic_ep.model.weights import load_weights


def build_engine(config: RankConfig, windows_fd: int) -> tuple[ModelRunner, Exchange]:
    torch.set_num_threads(1)
    model = load_model_config(Path(config.model))
    placement = config.placement
    shape = ExchangeShape(
        num_ranks=config.num_ranks,
        max_tokens=config.limits.max_num_batched_tokens,
        hidden=model.hidden_size,
        top_k=model.num_experts_per_tok,
        slots_per_rank=placement.slots_per_rank,
        operations_per_step=2 * model.num_hidden_layers,
    )
    exchange = ShmExchange(windows_fd, shape, Member(config.rank, config.incarnation))
    weights = load_weights(
        Path(config.model), model, placement, config.rank, load_format=config.load_format, seed=config.seed
    )
    runner = ModelRunner(model, config.limits, weights, placement, config.rank, exchange)
    return runner, exchange
