"""What the HTTP layer is told at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from elastic_ep.gateway.cors import Cors
from elastic_ep.gateway.fields import Body, Integer, refusal
from elastic_ep.models.config_json import CheckpointError, read_json_object, shown

_GENERATION_CONFIG = "generation_config.json"


class Sampling(Body):
    """What a request may say, and a model's `generation_config.json` for requests that do not."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Integer(-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0


class _GenerationConfig(Sampling):
    max_new_tokens: Annotated[int | None, Integer(1)] = None
    do_sample: bool = True


class SamplingDefaults(Sampling):
    """What a request gets that does not say. OpenAI's values unless the model's generation_config differs.

    `max_tokens` None: as the endpoint has it.
    """

    max_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> SamplingDefaults:
        """Read `generation_config.json`, by the model that requests are read by.

        A missing file or field, and null, leave the default. Raises `CheckpointError` with file, field and value.
        """
        file = folder / _GENERATION_CONFIG
        if not file.exists():
            return cls()
        try:
            config = _GenerationConfig.model_validate(read_json_object(file))
        except ValidationError as error:
            value = error.errors()[0]["input"]
            raise CheckpointError(f"{file}: {refusal(error).message[:-1]}; it is {shown(value)}") from None
        known = config.model_dump(include={*Sampling.model_fields})
        # Hugging Face writes do_sample=false for greedy models and may leave a temperature beside it.
        if not config.do_sample:
            known = {"temperature": 0.0, "repetition_penalty": config.repetition_penalty}
        return cls(**known, max_tokens=config.max_new_tokens)


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

    `other_names`: the model is known by these, too.

    `api_keys` empty: no key is needed. `admin_key`, if there is one, is needed for what changes the group.
    `max_choices` bounds prompts times `n` of one HTTP request. `eos_token_ids` end a sequence beside
    `model_eos_token_ids`, which the ranks know of: the tokenizer's own. Prompts that begin alike share pages of
    `shared_page_size` tokens; 0: none.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    version: str
    other_names: tuple[str, ...] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults, hash=False)
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    cors: Cors = field(default_factory=Cors)
    root_path: str = ""
    """Below which a proxy shows this server, without a slash at its end; see root_path.py."""
    eos_token_ids: tuple[int, ...] = ()
    model_eos_token_ids: tuple[int, ...] = ()
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None
    """How calls are read from what the model writes where the client leaves it the choice; None: they are not."""
    reasoning_parser: str | None = None
    responses_store_bytes: int = 64 << 20
    """Of what /v1/responses keeps; 0: nothing."""
    max_body_bytes: int = 4 * 1024 * 1024
    max_choices: int = 256
    max_logprobs: int = 20
    shared_page_size: int = 0

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a sequence unless a request says otherwise."""
        return (*self.model_eos_token_ids, *self.eos_token_ids)

    def knows(self, name: str) -> bool:
        """Whether the model is served by this name."""
        return name == self.model_name or name in self.other_names
