"""All families, by what a checkpoint's `config.json` calls itself."""

from __future__ import annotations

from pathlib import Path

from elastic_ep.models import mixtral, olmoe, qwen3_moe
from elastic_ep.models.config_json import ConfigFields, read_json_object
from elastic_ep.models.decoder import Reader
from elastic_ep.models.spec import ModelSpec

FAMILIES = (qwen3_moe, mixtral, olmoe)
ARCHITECTURES: dict[str, Reader] = {family.ARCHITECTURE: family.read for family in FAMILIES}
_MODEL_TYPES = {family.MODEL_TYPE: family.ARCHITECTURE for family in FAMILIES}


def load_spec(folder: Path) -> ModelSpec:
    """From `config.json` and, for the end-of-sequence ids, `generation_config.json`. Raises `CheckpointError`."""
    file = folder / "config.json"
    fields = ConfigFields(file, read_json_object(file))
    return ARCHITECTURES[_architecture(fields)](fields)


def _architecture(fields: ConfigFields) -> str:
    named = fields.get("architectures")
    if not named:
        named = [_MODEL_TYPES.get(str(fields.get("model_type")), fields.get("model_type"))]
    for name in named if isinstance(named, list) else ():
        if isinstance(name, str) and name in ARCHITECTURES:
            return name
    raise fields.error("architectures", f"is {named!r}; supported are {', '.join(ARCHITECTURES)}")
