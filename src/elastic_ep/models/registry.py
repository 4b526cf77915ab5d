"""All families, by what a checkpoint's `config.json` calls itself."""

from __future__ import annotations

from pathlib import Path

from elastic_ep.models import (
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama4,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from elastic_ep.models.config_json import ConfigFields, read_json_object, shown
from elastic_ep.models.decoder import Reader
from elastic_ep.models.quantisation import quantised
from elastic_ep.models.spec import ModelSpec

FAMILIES = (
    qwen3_moe,
    qwen2_moe,
    mixtral,
    olmoe,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    glm4_moe,
    phimoe,
    granitemoe,
    ernie4_5_moe,
    minimax_m2,
    llama4,
)
ARCHITECTURES: dict[str, Reader] = {family.ARCHITECTURE: family.read for family in FAMILIES}
ARCHITECTURES[llama4.CONDITIONAL] = llama4.read_conditional
ARCHITECTURE_TYPES = {family.ARCHITECTURE: family.MODEL_TYPE for family in FAMILIES}
ARCHITECTURE_TYPES[llama4.CONDITIONAL] = llama4.CONDITIONAL_TYPE
_ALIASES = {deepseek_v3.ARCHITECTURE: ("kimi_k2",)}
"""Other types that name an architecture of ours."""
_MODEL_TYPES = {kind: architecture for architecture, kind in ARCHITECTURE_TYPES.items()}


def load_spec(folder: Path) -> ModelSpec:
    """From `config.json` and, for the end-of-sequence ids, `generation_config.json`. Raises `CheckpointError`."""
    file = folder / "config.json"
    fields = ConfigFields(file, read_json_object(file))
    architecture = _architecture(fields)
    fields.allow("dtype", *_DTYPES)
    fields.allow("torch_dtype", *_DTYPES)
    return quantised(ARCHITECTURES[architecture](fields), fields)


_DTYPES = (None, "auto", "float32", "float16", "bfloat16")
"""What `config.json` says that the weights are. How they are read is each tensor's own affair."""


def _architecture(fields: ConfigFields) -> str:
    named = fields.get("architectures")
    if not named:
        named = [_MODEL_TYPES.get(str(fields.get("model_type")), fields.get("model_type"))]
    for name in named if isinstance(named, list) else ():
        if isinstance(name, str) and name in ARCHITECTURES:
            fields.allow("model_type", None, *_ALIASES.get(name, ()), ARCHITECTURE_TYPES[name])
            return name
    raise fields.error("architectures", f"is {shown(named)}; supported are {', '.join(ARCHITECTURES)}")
