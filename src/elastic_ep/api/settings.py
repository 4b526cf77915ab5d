"""What the HTTP layer is told at start."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that does not say. OpenAI's values unless the model's generation_config differs."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_folder(cls, folder: Path) -> SamplingDefaults:
        """Read `generation_config.json`; a missing file or field leaves the default. Raises ValueError."""
        try:
            config = json.loads((folder / "generation_config.json").read_text())
        except FileNotFoundError:
            return cls()
        if not isinstance(config, dict):
            raise ValueError(f"{folder / 'generation_config.json'} does not hold a JSON object")
        known: dict[str, Any] = {}
        for entry in fields(cls):
            value = config.get(entry.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                known[entry.name] = value
        defaults = cls(**known)
        # Hugging Face writes do_sample=false for greedy models and may leave a temperature beside it.
        if config.get("do_sample") is False:
            return cls(temperature=0.0, repetition_penalty=defaults.repetition_penalty)
        return defaults


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """`vocab_size` bounds token ids that clients send; `max_model_len` is prompt plus generated tokens.

    `api_keys` empty: no key is needed. `max_choices` bounds prompts times `n` of one HTTP request.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    version: str
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 1024 * 1024
    max_choices: int = 256
    max_logprobs: int = 20
