"""Model folders as a test wants them: a tiny Qwen3-MoE checkpoint, written here, tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_ep.models.registry import load_spec
from elastic_ep.models.spec import ITEM_BYTES
from elastic_ep.run import BUNDLED_MODEL

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 640,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def write_texts(folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
    """Everything but weights: `config.json`, and the bundled model's tokenizer."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    write_json(folder / "config.json", config)


def tensors(folder: Path, dtype: str = "BF16") -> dict[str, dict[str, Any]]:
    """The header of a single file with all tensors that the configuration needs."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for need in (need for piece in load_spec(folder).pieces() for need in piece.needs):
        held = dtype if dtype in need.dtypes else need.held
        begin, end = end, end + math.prod(need.shape) * ITEM_BYTES[held]
        header[need.tensor] = {"dtype": held, "shape": list(need.shape), "data_offsets": [begin, end]}
    return header


def write_shard(file: Path, header: Mapping[str, Any], *, end: int | None = None) -> None:
    """Zeros for all of them; `end` where the data stops, by default where the last tensor does."""
    text = json.dumps(header).encode()
    if end is None:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write_checkpoint(folder: Path, dtype: str = "BF16") -> None:
    write_texts(folder)
    write_shard(folder / "model.safetensors", tensors(folder, dtype))


def write_sharded(folder: Path) -> dict[str, str]:
    """Two shards and their index; the index' weight_map."""
    write_texts(folder)
    weight_map: dict[str, str] = {}
    header = tensors(folder)
    names = list(header)
    for shard, part in enumerate((names[::2], names[1::2])):
        end, placed = 0, {}
        for name in part:
            begin, last = header[name]["data_offsets"]
            placed[name] = {**header[name], "data_offsets": [end, end + last - begin]}
            end += last - begin
        write_shard(folder / f"model-{shard}.safetensors", placed)
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return weight_map
