"""Configuration: frozen dataclasses, validated once, at the edge. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of one rank's engine, all per rank. `num_pages` pages of `page_size` tokens of KV cache."""

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    page_size: int = 16
    num_pages: int = 1024


@dataclass(frozen=True, slots=True)
class RankConfig:
    """All that one launch of a rank needs to know; travels through the fork server as JSON."""

    rank: int
    incarnation: int
    num_ranks: int
    num_redundant_experts: int
    directory: str
    """Where the control plane's sockets are."""
    model: str
    load_format: str
    device: str
    seed: int
    limits: EngineLimits
    heartbeat_ms: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankConfig:
        plain: dict[str, Any] = json.loads(text)
        return cls(**{**plain, "limits": EngineLimits(**plain["limits"])})
