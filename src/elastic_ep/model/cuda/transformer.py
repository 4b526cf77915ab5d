"""Qwen3-MoE in kernels: a forward pass that reads everything it depends on from device memory, and never waits.

So it may be captured as it is, and whatever it is called for (one sequence, many, none) is a matter of its inputs.
"""

from __future__ import annotations

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.exchange.base import Exchange
from elastic_ep.model.cuda.inputs import StepInputs, StepShape
from elastic_ep.model.cuda.linear import linear, wide_linear
from elastic_ep.model.kernels.decode_attention import decode_attention
from elastic_ep.model.kernels.expert_ffn import expert_ffn
from elastic_ep.model.kernels.gate import gate
from elastic_ep.model.kernels.norm_rope import add_rms_norm, norm_rope_write
from elastic_ep.model.kernels.prefill_attention import prefill_attention
from elastic_ep.model.layers import rotary_angles
from elastic_ep.model.routing_table import RoutingTable
from elastic_ep.model.weights import LayerWeights, Weights


class CudaQwen3Moe:
    """Every call of `forward` performs two exchange operations a layer. `load` [layers, slots] int32 counts rows."""

    def __init__(
        self,
        weights: Weights,
        limits: EngineLimits,
        inputs: StepInputs,
        exchange: Exchange,
        num_ranks: int,
        tile: int,
        device: torch.device,
    ) -> None:
        config = weights.config
        self.config = config
        self.routing = RoutingTable(config, device)
        self._weights = weights
        self._inputs = inputs
        self._exchange = exchange
        self._tile = tile
        self._rows_per_expert = num_ranks * config.num_experts_per_tok / config.num_experts
        dtype = weights.embed.dtype
        size = (limits.num_pages + 1, config.num_key_value_heads, limits.page_size, config.head_dim)
        self._caches = torch.zeros(config.num_hidden_layers, 2, *size, dtype=dtype, device=device)
        angles = rotary_angles(config.head_dim, config.rope_theta, limits.max_model_len)
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)
        slots = weights.layers[0].gate_up.shape[0]
        self.load = torch.zeros(config.num_hidden_layers, slots, dtype=torch.int32, device=device)

    def forward(self, shape: StepShape) -> torch.Tensor:
        """Logits [S, V] float32, row i of the last token of sequence i; rows of no sequence are undefined."""
        inputs, config, layers = self._inputs, self.config, self._weights.layers
        x = self._weights.embed.index_select(0, inputs.tokens[: shape.rows])
        h, x = add_rms_norm(x, None, layers[0].input_norm, config.rms_norm_eps)
        counts = []
        for index, layer in enumerate(layers):
            h, x = add_rms_norm(self._attend(h, index, layer, shape), x, layer.post_norm, config.rms_norm_eps)
            mixture, count = self._mix(h, index, layer, shape)
            counts.append(count)
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self._weights.final_norm
            h, x = add_rms_norm(mixture, x, following, config.rms_norm_eps)
        self.load += torch.stack(counts)
        last = h if shape.decode else h.index_select(0, inputs.last_rows)
        return wide_linear(last, self._weights.lm_head, self._tile)

    def _attend(self, h: torch.Tensor, index: int, layer: LayerWeights, shape: StepShape) -> torch.Tensor:
        inputs, rows = self._inputs, shape.rows
        keys, values = self._caches[index]
        q = norm_rope_write(
            linear(h, layer.qkv, self._tile),
            layer.qk_norm,
            self._cos,
            self._sin,
            inputs.positions[:rows],
            inputs.slots[:rows],
            keys,
            values,
            self.config.rms_norm_eps,
        )
        if shape.decode:
            out = decode_attention(q, keys, values, inputs.tables[:rows], inputs.lengths[:rows])
        else:
            out = prefill_attention(q, keys, values, inputs.tables, inputs.bounds, inputs.lengths)
        return linear(out.view(rows, -1), layer.out, self._tile)

    def _mix(
        self, h: torch.Tensor, index: int, layer: LayerWeights, shape: StepShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' mixture [R, H], and the rows [slots] that this rank's experts had."""
        config = self.config
        chosen, weights = gate(
            wide_linear(h, layer.gate, self._tile),
            self.routing.physical[index],
            config.num_experts_per_tok,
            renormalise=config.norm_topk_prob,
            num_tokens=self._inputs.count,
        )
        received = self._exchange.dispatch(h, chosen)
        expected = max(1, round(shape.rows * self._rows_per_expert))
        y = expert_ffn(received.packed, received.counts, layer.gate_up, layer.down, expected_rows=expected)
        return self._exchange.combine(y, weights), received.counts
