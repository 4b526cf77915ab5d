"""Other families and quantised checkpoints on a GPU: a kill costs no token, and a wrong bit in a scale is mended."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.host.mps import PROGRAM
from elastic_ep.models import deepseek_v3, gpt_oss, qwen3_moe
from elastic_ep.models.registry import ARCHITECTURE_TYPES
from tests.e2e.test_families import SHAPES, undisturbed_and_disturbed
from tests.e2e.test_quantised import RANKS, killed_and_spoiled
from tests.e2e.test_wrong_bytes import MODULE
from tests.kit.served import server, shaped_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

FLAGS = ["--ranks", str(RANKS), "--device", "cuda", "--num-gpu-blocks-override", "512"]
FLAGS += ["--mps"] if shutil.which(PROGRAM) else []
_SIZES = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 3}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
QUANTISED: dict[str, dict[str, Any]] = {
    deepseek_v3.ARCHITECTURE: {"quant_method": "fp8", "weight_block_size": [128, 128]},
    gpt_oss.ARCHITECTURE: {"quant_method": "mxfp4"},
    qwen3_moe.ARCHITECTURE: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
    },
}
NUMBERS = ("DeepseekV2ForCausalLM", "Glm4MoeForCausalLM")


def folder(tmp_path: Path, architecture: str, **more: Any) -> Path:
    named = {"architectures": [architecture], "model_type": ARCHITECTURE_TYPES[architecture]}
    latent = {"kv_lora_rank": 64} if "kv_lora_rank" in SHAPES[architecture] else {}
    return shaped_model(tmp_path / "model", {**named, **SHAPES[architecture], **_SIZES, **latent, **more})


@pytest.mark.parametrize("architecture", QUANTISED)
def test_a_kill_and_a_wrong_scale_cost_no_token(tmp_path: Path, architecture: str) -> None:
    model = folder(tmp_path, architecture, quantization_config=QUANTISED[architecture])
    flags = [*FLAGS, "--model", str(model), "--load-format", "dummy"]
    with server(flags, tmp_path / "runs", MODULE) as serving:
        asyncio.run(killed_and_spoiled(serving))


@pytest.mark.parametrize("architecture", NUMBERS)
def test_a_kill_costs_no_token(tmp_path: Path, architecture: str) -> None:
    flags = [*FLAGS, "--model", str(folder(tmp_path, architecture)), "--load-format", "dummy"]
    with server(flags, tmp_path / "runs") as serving:
        asyncio.run(undisturbed_and_disturbed(serving))
