"""Reads checked fields of a model folder's JSON files. Standard library only."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MOST = 2**31 - 1
"""Of any integer: beyond what a model has, within what every part of the engine can count."""
UNQUANTISED = "only checkpoints in bfloat16, float16 or float32 are supported, give one that is not quantised"


class CheckpointError(ValueError):
    """A model folder cannot be used. The message is one line that names the file and the fault."""


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `CheckpointError`."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise CheckpointError(f"{file} is not a file")
        plain = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return plain


def shown(value: Any) -> str:
    """A JSON value in a message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def as_integer(value: Any) -> Any:
    """JSON does not tell 20 from 20.0, and some programs write the latter; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ConfigFields:
    """Checked fields of one JSON object; an explicit null counts as absent. Raises `CheckpointError`."""

    def __init__(self, file: Path, plain: dict[str, Any], within: str = "") -> None:
        """`within`: what stands before the names, of an object inside another."""
        self.file = file
        self._plain = plain
        self.within = within

    def with_values(self, **values: Any) -> ConfigFields:
        """The same, but for these."""
        return ConfigFields(self.file, {**self._plain, **values}, self.within)

    def inside(self, name: str) -> ConfigFields:
        """Those of the object `name`."""
        plain = self.get(name)
        if not isinstance(plain, dict):
            raise self.error(name, f"must be an object, not {shown(plain)}")
        return ConfigFields(self.file, plain, f"{self.within}{name}.")

    def error(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.within}{name} {fault}")

    def has(self, name: str) -> bool:
        return self._plain.get(name) is not None

    def get(self, name: str) -> Any:
        return self._plain.get(name)

    def allow(self, name: str, *allowed: Any) -> None:
        """Refuse every other value: what it would ask for is not done here."""
        if self.get(name) not in allowed:
            raise self.error(name, f"is {shown(self.get(name))}; only {allowed[-1]!r} is supported")

    def positive(self, name: str, default: int | None = None, most: int = MOST, least: int = 1) -> int:
        value = self._present(name, default)
        number = as_integer(value)
        if type(number) is not int or not least <= number <= most:
            raise self.error(name, f"must be an integer from {least} to {most}, not {shown(value)}")
        return number

    def number(self, name: str, default: float, low: float = 1e-30, high: float = 1e30) -> float:
        """In [low, high]; beyond these some product or power in the model has no float32."""
        value = self._present(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(name, f"must be a number from {low:g} to {high:g}, not {shown(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._present(name, default)
        if type(value) is not bool:
            raise self.error(name, f"must be true or false, not {shown(value)}")
        return value

    def _present(self, name: str, default: Any) -> Any:
        value = self._plain.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value


def eos_token_ids(fields: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    """Of `generation_config.json` beside it, if that names any."""
    file = fields.file.parent / "generation_config.json"
    if file.exists():
        generation = ConfigFields(file, read_json_object(file))
        if generation.has("eos_token_id"):
            fields = generation
    ids = fields.get("eos_token_id")
    ids = [as_integer(token) for token in (ids if isinstance(ids, list) else [] if ids is None else [ids])]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise fields.error(
                "eos_token_id",
                f"must be a token id, or a list of them, below vocab_size {vocab_size}, not {shown(token)}",
            )
    return tuple(ids)
