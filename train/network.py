"""The network in training form: Qwen3-MoE with every expert computed densely and weighted by its gate.

Dense computing wastes seven eighths of the expert work and is still the quickest at this size. Serving uses its
own sparse implementation; `export` writes the released checkpoints' layout.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    top_k: int = 2
    intermediate: int = 160
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    max_positions: int = 1024


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves layout; x [B, heads, L, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """`masked` experts contribute nothing and nobody takes their place (what a wrong recovery would look like)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(shape.experts, shape.hidden, 2 * shape.intermediate))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.intermediate, shape.hidden))
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)
        self.register_buffer("alive", torch.ones(shape.experts), persistent=False)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H], real [B*L, 1] (0 for padding) -> (output, balance loss, choices [B*L, experts])."""
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat).float().softmax(-1)
        top, index = scores.topk(self.shape.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        chosen = F.one_hot(index, self.shape.experts).to(top.dtype)
        weights = (chosen * top.unsqueeze(-1)).sum(1) * self.alive
        gate, up = torch.matmul(flat, self.gate_up).chunk(2, dim=-1)
        each = torch.matmul(F.silu(gate) * up * weights.t().unsqueeze(-1).to(gate.dtype), self.down)
        load = chosen.sum(1)
        share, score = (load * real).sum(0) / real.sum(), (scores * real).sum(0) / real.sum()
        balance = self.shape.experts * (share / self.shape.top_k * score).sum()
        return each.sum(0).view_as(x), balance, load


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = Experts(shape)


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        frequency = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.outer(torch.arange(shape.max_positions).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """tokens [B, L] -> (logits [B, L, vocab], mean balance loss, choices of each layer).

        Padding (everything after a last end token) does not count for the balance.
        """
        x = self.embed_tokens(tokens)
        real = (tokens.flip(1).cumsum(1).flip(1) != 0).float().view(-1, 1)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        balances, loads = [], []
        for layer in self.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin)
            out, balance, load = layer.mlp(layer.post_attention_layernorm(x), real)
            x = x + out
            balances.append(balance)
            loads.append(load)
        return F.linear(self.norm(x), self.embed_tokens.weight), torch.stack(balances).mean(), loads


def export(network: Network, folder: Path) -> None:
    """Write `model.safetensors` (bfloat16), `config.json` and `generation_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if name.endswith("mlp.gate_up"):
            for expert, weight in enumerate(value):
                base = f"model.{name.removesuffix('.gate_up')}.experts.{expert}"
                gate, up = weight.t().chunk(2)
                tensors[f"{base}.gate_proj.weight"], tensors[f"{base}.up_proj.weight"] = gate, up
        elif name.endswith("mlp.down"):
            for expert, weight in enumerate(value):
                tensors[f"model.{name.removesuffix('.down')}.experts.{expert}.down_proj.weight"] = weight.t()
        else:
            tensors[f"model.{name}"] = value
    stored = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(network.shape), indent=2) + "\n")
    generation = {"eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def rounded(network: Network) -> Network:
    """A float32 copy whose weights went through bfloat16: what serving computes with."""
    copy = Network(Shape(**asdict(network.shape)))
    copy.load_state_dict(
        {name: value.to(torch.bfloat16).float() for name, value in network.state_dict().items()}
    )
    return copy.to(next(network.parameters()).device).eval()
