"""transformers' Qwen3-MoE with the very weights that our engine has, decoding as fast as transformers offers it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from elastic_ep.models.decoder_config import DecoderConfig
from elastic_ep.weights.bank import TensorSource

_PAGE = 256
_BATCH_TOKENS = 1024
Stamped = tuple[list[list[float]], list[list[int]]]
"""By request, when each of its tokens came, and the tokens."""


@torch.no_grad()
def build(config: DecoderConfig, source: TensorSource, device: torch.device) -> Any:
    """In bfloat16, on `device` from the start."""
    import transformers

    library: Any = transformers
    plain = library.Qwen3MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 3,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        tie_word_embeddings=config.tie_word_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
    )
    with torch.device(device):
        model = library.Qwen3MoeForCausalLM._from_config(
            plain, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            _fill_experts(parameter, name, source)
        else:
            parameter.copy_(source(name))
    if device.type == "cuda":
        torch.cuda.synchronize()  # continuous batching runs on streams of its own
    return model.eval()


def _fill_experts(parameter: torch.Tensor, name: str, source: TensorSource) -> None:
    """[E, 2 I, H] or [E, H, I]."""
    layer = int(name.split(".")[2])
    for expert in range(len(parameter)):
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        gate, up, down = (f"{prefix}{name}_proj.weight" for name in ("gate", "up", "down"))
        if name.endswith("gate_up_proj"):
            inner = parameter.shape[1] // 2
            parameter[expert, :inner].copy_(source(gate))
            parameter[expert, inner:].copy_(source(up))
        else:
            parameter[expert].copy_(source(down))


def continuous(
    model: Any, prompts: Sequence[list[int]], new: int, experts: str, graphs: bool | None
) -> Stamped:
    """Continuous batching; `graphs` None leaves it to transformers whether it captures CUDA graphs."""
    import transformers

    library: Any = transformers
    model.set_experts_implementation(experts)
    # A cache and a batch no larger than this load needs: the masks of its attention are as large as both allow.
    length = max(map(len, prompts)) + new
    blocks = len(prompts) * (-(-length // _PAGE) + 1)
    config = library.ContinuousBatchingConfig
    page = "page_size" if hasattr(config, "page_size") else "block_size"  # as it was before 5.17
    outputs = model.generate_batch(
        inputs=[list(prompt) for prompt in prompts],
        generation_config=library.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
        continuous_batching_config=config(
            **{page: _PAGE}, num_blocks=blocks, max_batch_tokens=_BATCH_TOKENS, use_cuda_graph=graphs
        ),
        record_timestamps=True,
    )
    found = list(outputs.values())
    errors = [output.error for output in found if output.error]
    if errors or len(found) < len(prompts):
        raise RuntimeError(f"{len(found)} of {len(prompts)} requests ended, errors: {errors[:1]}")
    return [output.timestamps for output in found], [list(output.generated_tokens) for output in found]


class _Stamps:
    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **fields: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def static(model: Any, prompts: Sequence[list[int]], new: int, experts: str) -> Stamped:
    """`generate` with one batch of prompts, which have the same length."""
    import transformers

    library: Any = transformers
    model.set_experts_implementation(experts)
    ids = torch.tensor(prompts, device=model.device)
    stamps = _Stamps()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=library.StoppingCriteriaList([stamps]),
    )
    tokens = out[:, ids.shape[1] :].tolist()
    return [stamps.times for _ in prompts], tokens
