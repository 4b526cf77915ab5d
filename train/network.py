"""The network in training form: Qwen3-MoE (arXiv 2505.09388) with every expert computed and weighted by its gate.

Dense computing wastes seven eighths of the expert work and is still the quickest at this size. Serving uses its
own sparse implementation; `export` writes the released checkpoints' layout and `load` reads it.

In the shapes below B is the batch, L the length in tokens, H the hidden size, D the size of one head, E the number
of experts, V the vocabulary. Weights are float32; under autocast the products run in bfloat16.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The sizes of a network; all of them counts, but for `rope_theta` and `norm_eps`."""

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


@dataclass
class Past:
    """Keys and values of the tokens already seen, for decoding a batch padded on the left.

    `padding` [B], int64: how many positions of each row stand empty before its first token.
    """

    padding: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, kv_heads, new, D] and return all of that layer so far."""
        if layer in self.keys:
            k, v = torch.cat((self.keys[layer], k), 2), torch.cat((self.values[layer], v), 2)
        self.keys[layer], self.values[layer] = k, v
        return k, v

    def mask(self, new: int) -> Tensor:
        """Which keys each of the `new` next positions sees: bool [B, 1, new, length + new].

        A padding position sees itself, since a row without any key would come out as NaN.
        """
        key = torch.arange(self.length + new, device=self.padding.device)
        query = key[self.length :, None]
        seen = (key <= query) & (key >= self.padding[:, None, None])
        return (seen | (key == query)).unsqueeze(1)

    def positions(self, new: int) -> Tensor:
        """[B, new], int64: the rotary position of each of the `new` next tokens."""
        at = torch.arange(self.length, self.length + new, device=self.padding.device)
        return (at - self.padding[:, None]).clamp_min(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), halves layout; x [B, heads, L, D], cos and sin [L, D] or [B, 1, L, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), queries and keys normalised per head."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None = None) -> Tensor:
        """x [B, L, H] -> [B, L, H]; with `past`, x follows what it holds, and is added to it."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if past is None:
            out = functional.scaled_dot_product_attention(
                q, k, v.to(q.dtype), is_causal=True, enable_gqa=True
            )
        else:
            mask = past.mask(length)
            k, v = past.extend(self.layer, k, v)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        joined: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return joined


class Experts(nn.Module):
    """Gated experts (SwiGLU, arXiv 2002.05202), the best `top_k` of E per token, their gates summing to one.

    Experts whose `alive` [E] is 0 contribute nothing, the others' gates stay as they are and nobody takes their
    place: what a wrong recovery from a rank's death would look like.
    """

    alive: Tensor

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
        """x [B, L, H], real [B*L, 1] (0 for padding) -> (output [B, L, H], balance loss, choices [B*L, E] of 0 or 1).

        The balance loss is that of Switch Transformers (arXiv 2101.03961) for several choices per token: E times
        the sum over experts of (share of the choices) x (mean gate probability); 1 when all are loaded alike.
        """
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat).float().softmax(-1)
        top, index = scores.topk(self.shape.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        chosen = functional.one_hot(index, self.shape.experts).to(top.dtype)
        weights = (chosen * top.unsqueeze(-1)).sum(1) * self.alive
        gate, up = torch.matmul(flat, self.gate_up).chunk(2, dim=-1)
        each = torch.matmul(functional.silu(gate) * up * weights.t().unsqueeze(-1).to(gate.dtype), self.down)
        load = chosen.sum(1)
        share, score = (load * real).sum(0) / real.sum(), (scores * real).sum(0) / real.sum()
        balance = self.shape.experts * (share / self.shape.top_k * score).sum()
        return each.sum(0).view_as(x), balance, load


class Layer(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = Experts(shape)


class Network(nn.Module):
    """The whole network; embeddings are tied."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, layer) for layer in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        frequency = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.outer(torch.arange(shape.max_positions).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def stack(self) -> list[Layer]:
        """The layers, in order."""
        return [cast(Layer, layer) for layer in self.layers]

    def forward(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """tokens [B, L], int64 -> (logits [B, L, V], mean balance loss, choices [B*L, E] of each layer).

        Padding (everything after a last end token) does not count for the balance. With `past` the tokens
        follow those it holds, and join them.
        """
        x = self.embed_tokens(tokens)
        real = (tokens.flip(1).cumsum(1).flip(1) != 0).float().view(-1, 1)
        if past is None:
            cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        else:
            at = past.positions(tokens.shape[1])
            cos, sin = self.cos[at].unsqueeze(1), self.sin[at].unsqueeze(1)
        balances, loads = [], []
        for layer in self.stack():
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, past)
            out, balance, load = layer.mlp(layer.post_attention_layernorm(x), real)
            x = x + out
            balances.append(balance)
            loads.append(load)
        if past is not None:
            past.length += tokens.shape[1]
        return functional.linear(self.norm(x), self.embed_tokens.weight), torch.stack(balances).mean(), loads


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


def load(folder: Path) -> Network:
    """What `export` wrote, in float32 on the CPU."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate=config["moe_intermediate_size"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        max_positions=config["max_position_embeddings"],
    )
    stored = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    state = {name.removeprefix("model."): value for name, value in stored.items() if ".experts." not in name}
    for layer in range(shape.layers):
        each = [f"model.layers.{layer}.mlp.experts.{expert}" for expert in range(shape.experts)]
        state[f"layers.{layer}.mlp.gate_up"] = torch.stack(
            [torch.cat((stored[f"{e}.gate_proj.weight"], stored[f"{e}.up_proj.weight"])).t() for e in each]
        )
        state[f"layers.{layer}.mlp.down"] = torch.stack([stored[f"{e}.down_proj.weight"].t() for e in each])
    network = Network(shape)
    network.load_state_dict(state)
    return network.eval()


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
