"""Reads checked fields of a model folder's JSON files. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A model folder cannot be used. The message is one line that names the file and the fault."""


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


class ConfigFields:
    """Checked fields of one JSON object; an explicit null counts as absent. Raises `CheckpointError`."""

    def __init__(self, file: Path, plain: dict[str, Any]) -> None:
        self.file = file
        self._plain = plain

    def error(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} {fault}")

    def has(self, name: str) -> bool:
        return self._plain.get(name) is not None

    def get(self, name: str) -> Any:
        return self._plain.get(name)

    def allow(self, name: str, *allowed: Any) -> None:
        """Refuse every other value: what it would ask for is not done here."""
        if self.get(name) not in allowed:
            raise self.error(name, f"is {self.get(name)!r}; only {allowed[-1]!r} is supported")

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


def rope_theta(fields: ConfigFields, default: float) -> float:
    """From the top level, or from `rope_parameters`, where transformers 5 writes it."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.error(name, "must be an object")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in (None, "default"):
            raise fields.error(name, f"asks for {kind!r}; only plain rotary embeddings are supported")
        if rope.get("rope_theta") is not None:
            return ConfigFields(fields.file, rope).number("rope_theta", default)
    return fields.number("rope_theta", default)


def eos_token_ids(fields: ConfigFields) -> tuple[int, ...]:
    """Of `generation_config.json` beside it, if that names any."""
    file = fields.file.parent / "generation_config.json"
    if file.exists():
        generation = ConfigFields(file, read_json_object(file))
        if generation.has("eos_token_id"):
            fields = generation
    ids = fields.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(token) is not int or token < 0 for token in ids):
        raise fields.error("eos_token_id", "must be a token id or a list of them")
    return tuple(ids)
