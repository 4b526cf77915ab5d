"""What the engine needs to know of a Qwen3-MoE checkpoint's `config.json`. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = "Qwen3MoeForCausalLM"


class CheckpointError(ValueError):
    """A model folder cannot be used. The message is one line that names the file and the fault."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Names and meanings as in Hugging Face's Qwen3-MoE configuration.

    `head_dim` elements a head; `num_key_value_heads` divides `num_attention_heads`. `norm_topk_prob`: the chosen
    experts' weights are scaled to sum to one. `eos_token_ids` end a sequence.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    eos_token_ids: tuple[int, ...]


def load_model_config(path: Path) -> ModelConfig:
    """Reads `config.json` and, for the end-of-sequence ids, `generation_config.json` in the folder `path`.

    Raises `CheckpointError`.
    """
    reader = _Fields(path / "config.json", read_json_object(path / "config.json"))
    _refuse_unsupported(reader)
    heads = reader.positive("num_attention_heads")
    hidden = reader.positive("hidden_size")
    config = ModelConfig(
        vocab_size=reader.positive("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=reader.positive("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.positive("num_key_value_heads", heads),
        head_dim=reader.positive("head_dim", max(hidden // heads, 1)),
        num_experts=reader.positive(
            "num_local_experts" if reader.has("num_local_experts") else "num_experts"
        ),
        num_experts_per_tok=reader.positive("num_experts_per_tok"),
        moe_intermediate_size=reader.positive("moe_intermediate_size"),
        max_position_embeddings=reader.positive("max_position_embeddings"),
        norm_topk_prob=reader.boolean("norm_topk_prob", False),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(reader),
        eos_token_ids=_eos_token_ids(path, reader),
    )
    if heads % config.num_key_value_heads:
        raise reader.error("num_key_value_heads", "does not divide num_attention_heads")
    if config.head_dim % 2:
        raise reader.error("head_dim", "is odd; rotary embeddings need an even one")
    if config.num_experts_per_tok > config.num_experts:
        raise reader.error("num_experts_per_tok", "is more than there are experts")
    return config


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `CheckpointError`."""
    try:
        plain = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return plain


class _Fields:
    """Reads checked fields of one JSON object; an explicit null counts as absent."""

    def __init__(self, file: Path, plain: dict[str, Any]) -> None:
        self._file = file
        self._plain = plain

    def error(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {name} {fault}")

    def has(self, name: str) -> bool:
        return self._plain.get(name) is not None

    def get(self, name: str) -> Any:
        return self._plain.get(name)

    def positive(self, name: str, default: int | None = None) -> int:
        value = self._present(name, default)
        if type(value) is not int or value <= 0:
            raise self.error(name, f"must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._present(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.error(name, f"must be a positive number, not {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._present(name, default)
        if type(value) is not bool:
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def _present(self, name: str, default: Any) -> Any:
        value = self._plain.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value


def _refuse_unsupported(reader: _Fields) -> None:
    architectures = reader.get("architectures") or []
    if architectures:
        supported = isinstance(architectures, list) and ARCHITECTURE in architectures
    else:
        supported = reader.get("model_type") == "qwen3_moe"
    if not supported:
        named = architectures or reader.get("model_type")
        raise reader.error("architectures", f"is {named!r}; only {ARCHITECTURE} is supported")
    only: dict[str, tuple[Any, ...]] = {
        "decoder_sparse_step": (None, 1),
        "mlp_only_layers": (None, []),
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "use_sliding_window": (None, False),
    }
    for name, allowed in only.items():
        if reader.get(name) not in allowed:
            raise reader.error(name, f"is {reader.get(name)!r}; only {allowed[-1]!r} is supported")


def _rope_theta(reader: _Fields) -> float:
    """From the top level, or from `rope_parameters`, where transformers 5 writes it."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = reader.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise reader.error(name, "must be an object")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in (None, "default"):
            raise reader.error(name, f"asks for {kind!r}; only plain rotary embeddings are supported")
        if rope.get("rope_theta") is not None:
            return _Fields(reader._file, rope).number("rope_theta", 10000.0)
    return reader.number("rope_theta", 10000.0)


def _eos_token_ids(path: Path, reader: _Fields) -> tuple[int, ...]:
    file = path / "generation_config.json"
    if file.exists():
        generation = _Fields(file, read_json_object(file))
        if generation.has("eos_token_id"):
            reader = generation
    ids = reader.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(token) is not int or token < 0 for token in ids):
        raise reader.error("eos_token_id", "must be a token id or a list of them")
    return tuple(ids)
