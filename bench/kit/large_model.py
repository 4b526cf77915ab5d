"""A model with gigabytes of experts, of which only the config exists."""

from __future__ import annotations

from pathlib import Path

from tests.kit.served import shaped_model

LAYERS, EXPERTS = 4, 96
HIDDEN, WIDTH = 1024, 512
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4


def write_model(folder: Path) -> Path:
    """A folder, made in `folder`, that is the bundled model's with a larger config and no weights."""
    shape = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return shaped_model(folder / "model", {**shape, **heads, "num_hidden_layers": LAYERS})
