"""What the HTTP layer is told at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ep.gateway.cors import Cors
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import Boolean, Integer, Kind, Number
from elastic_ep.models.config_json import CheckpointError, read_json_object, shown

SAMPLING_KINDS: Mapping[str, Kind] = {
    "temperature": Number(0.0, 2.0),
    "top_p": Number(0.0, 1.0, above_low=True),
    "top_k": Integer(-1, 2**31 - 1),
    "min_p": Number(0.0, 1.0),
    "repetition_penalty": Number(0.01, 100.0),
}
"""What a request may say, and a model's `generation_config.json` for requests that do not."""
_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that does not say. OpenAI's values unless the model's generation_config differs.

    `max_tokens` None: as the endpoint has it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> SamplingDefaults:
        """Read `generation_config.json`, by the table that requests are read by.

        A missing file or field, and null, leave the default. Raises `CheckpointError` with file, field and value.
        """
        file = folder / _GENERATION_CONFIG
        if not file.exists():
            return cls()
        config = read_json_object(file)

        def read(name: str, kind: Kind, default: Any) -> Any:
            value = config.get(name)
            try:
                return default if value is None else kind.read(value, name)
            except ApiError as error:
                raise CheckpointError(f"{file}: {error.message[:-1]}; it is {shown(value)}") from None

        known = {name: read(name, kind, getattr(cls(), name)) for name, kind in SAMPLING_KINDS.items()}
        known["max_tokens"] = read("max_new_tokens", Integer(1, 2**31 - 1), None)
        # Hugging Face writes do_sample=false for greedy models and may leave a temperature beside it.
        if read("do_sample", Boolean(), True) is False:
            known = {name: known[name] for name in ("repetition_penalty", "max_tokens")} | {
                "temperature": 0.0
            }
        return cls(**known)


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "length_penalty": (1,),
    "early_stopping": (False,), "penalty_alpha": (0,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "top_h": (), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (), "bad_words_ids": ([],), "force_words_ids": ([],), "sequence_bias": ({}, []),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "min_length": (0,), "min_new_tokens": (0,), "max_length": (20,), "max_time": (), "stop_strings": ("", []),
    "guidance_scale": (1,), "watermarking_config": ({},), "dola_layers": (), "token_healing": (False,),
}  # fmt: skip
"""What a generation configuration can ask for that no request gets here (nor in vLLM), with what asks for nothing."""


def unhonoured(folder: Path) -> tuple[str, ...]:
    """A line for each field of `generation_config.json` that changes nothing here. Raises `CheckpointError`."""
    file = folder / _GENERATION_CONFIG
    config = read_json_object(file) if file.exists() else {}
    return tuple(
        f"{_GENERATION_CONFIG}: {name} is {shown(config[name])}, which is not done here"
        for name, neutral in _NEUTRAL.items()
        if config.get(name) is not None and config[name] not in neutral
    )


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """`vocab_size` bounds token ids that clients send; `max_model_len` is prompt plus generated tokens.

    `api_keys` empty: no key is needed. `max_choices` bounds prompts times `n` of one HTTP request. `eos_token_ids`
    end a sequence beside those that the ranks know of: the tokenizer's own.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    version: str
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    api_keys: tuple[str, ...] = ()
    cors: Cors = field(default_factory=Cors)
    eos_token_ids: tuple[int, ...] = ()
    trust_request_chat_template: bool = False
    max_body_bytes: int = 4 * 1024 * 1024
    max_choices: int = 256
    max_logprobs: int = 20
