"""The weights of one rank: everything dense, and the experts that the placement puts here.

Matrices are stored [in, out], ready for `x @ w`. Experts are stacked by slot, so that a slot can be overwritten.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from elastic_ep.model.checkpoint import TensorEntry, expected_tensors, expert_tensors, validate_checkpoint
from elastic_ep.model.config import ModelConfig
from elastic_ep.placement import EMPTY, Placement

TensorSource = Callable[[str], torch.Tensor]
"""From a checkpoint's tensor name to its float32 value, in the checkpoint's layout [out, in]."""

_DUMMY_SCALE = 0.05
_DENSE_OF_LAYER = ("input_norm", "qkv", "qk_norm", "out", "post_norm", "gate")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """H hidden, Hq query heads, Hk key-value heads, D head dim, E experts, S slots, I expert width."""

    input_norm: torch.Tensor
    """[H]"""
    qkv: torch.Tensor
    """[H, (Hq + 2 Hk) D]: queries, keys, values."""
    qk_norm: torch.Tensor
    """[Hq + Hk, D]: one row a head, so that queries and keys are normed in one go."""
    out: torch.Tensor
    """[Hq D, H]"""
    post_norm: torch.Tensor
    """[H]"""
    gate: torch.Tensor
    """[H, E]"""
    gate_up: torch.Tensor
    """[S, H, 2 I]"""
    down: torch.Tensor
    """[S, I, H]"""


class Weights:
    """`embed` [V, H], `final_norm` [H], `lm_head` [H, V], `layers`."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        rank: int,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self._dtype = dtype
        self.source = source
        self._device = device
        self.from_peers = 0
        """Experts that did not come from `source`."""
        self.embed = self._get("model.embed_tokens.weight")
        self.final_norm = self._get("model.norm.weight")
        self.lm_head = (
            self.embed.t().contiguous() if config.tie_word_embeddings else self._matrix("lm_head.weight")
        )
        self.layers = [
            self._layer(layer, placement.slots_per_rank) for layer in range(config.num_hidden_layers)
        ]
        for layer in range(config.num_hidden_layers):
            for slot, logical in enumerate(placement.on_rank(layer, rank)):
                self.load_expert(layer, slot, logical)

    def load_expert(self, layer: int, slot: int, logical: int) -> None:
        """Overwrite `slot` with logical expert `logical`, or with zeros for `EMPTY`. No step may be using it."""
        weights = self.layers[layer]
        if logical == EMPTY:
            weights.gate_up[slot].zero_()
            weights.down[slot].zero_()
            return
        gate, up, down = (self.source(name) for name in expert_tensors(layer, logical))
        inner = self.config.moe_intermediate_size
        weights.gate_up[slot, :, :inner].copy_(gate.t())
        weights.gate_up[slot, :, inner:].copy_(up.t())
        weights.down[slot].copy_(down.t())

    def checksum(self, layer: int, slot: int) -> int:
        """CRC-32 of the slot's bytes as they lie in memory: the same for every copy of an expert."""
        weights = self.layers[layer]
        return crc32(_bytes(weights.down[slot]), crc32(_bytes(weights.gate_up[slot])))

    def dense(self) -> dict[str, torch.Tensor]:
        """Everything but the experts, by name: contiguous, and always in the same order."""
        tensors = {"embed": self.embed, "final_norm": self.final_norm, "lm_head": self.lm_head}
        for index, layer in enumerate(self.layers):
            for name in _DENSE_OF_LAYER:
                tensors[f"layers.{index}.{name}"] = getattr(layer, name)
        return tensors

    def dense_checksum(self) -> int:
        """CRC-32 of the bytes of `dense`, one tensor after the other: the same on every rank."""
        value = 0
        for tensor in self.dense().values():
            value = crc32(_bytes(tensor), value)
        return value

    def _layer(self, layer: int, slots: int) -> LayerWeights:
        config, prefix = self.config, f"model.layers.{layer}."
        attention = prefix + "self_attn."
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        projections = [self._matrix(f"{attention}{name}_proj.weight") for name in "qkv"]
        norms = [
            self._get(attention + "q_norm.weight").expand(config.num_attention_heads, -1),
            self._get(attention + "k_norm.weight").expand(config.num_key_value_heads, -1),
        ]
        return LayerWeights(
            input_norm=self._get(prefix + "input_layernorm.weight"),
            qkv=torch.cat(projections, dim=1),
            qk_norm=torch.cat(norms),
            out=self._matrix(attention + "o_proj.weight"),
            post_norm=self._get(prefix + "post_attention_layernorm.weight"),
            gate=self._matrix(prefix + "mlp.gate.weight"),
            gate_up=torch.zeros(slots, hidden, 2 * inner, dtype=self._dtype, device=self._device),
            down=torch.zeros(slots, inner, hidden, dtype=self._dtype, device=self._device),
        )

    def _get(self, name: str) -> torch.Tensor:
        return self.source(name).to(self._dtype).to(self._device)

    def _matrix(self, name: str) -> torch.Tensor:
        return self._get(name).t().contiguous()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).cpu().numpy().data


def blank_weights(
    config: ModelConfig,
    num_slots: int,
    source: TensorSource,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Weights of the right shapes, all zero, for peers to fill. Nothing is read; `load_expert` will use `source`."""
    shapes = dict(expected_tensors(config))
    row = (EMPTY,) * num_slots
    placement = Placement(0, 1, num_slots, config.num_experts, (row,) * config.num_hidden_layers)
    weights = Weights(
        config, placement, 0, lambda name: torch.zeros(shapes[name]), torch.device(device), dtype
    )
    weights.source = source
    return weights


def load_weights(
    path: Path,
    config: ModelConfig,
    placement: Placement,
    rank: int,
    *,
    load_format: str = "auto",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Weights of the checkpoint in `path`; with `load_format` "dummy" random ones that need no checkpoint.

    Raises `CheckpointError` for a checkpoint that is not whole, ValueError for an unknown format.
    """
    source = weight_source(path, config, load_format, seed, device)
    return Weights(config, placement, rank, source, torch.device(device), dtype)


def weight_source(
    path: Path, config: ModelConfig, load_format: str, seed: int, device: torch.device | str = "cpu"
) -> TensorSource:
    """Where the tensors come from. Raises as `load_weights`."""
    if load_format == "dummy":
        return dummy_source(config, seed, device)
    if load_format == "auto":
        return checkpoint_source(validate_checkpoint(path, config))
    raise ValueError(f"unknown load format {load_format!r}: auto or dummy")


def checkpoint_source(entries: dict[str, TensorEntry]) -> TensorSource:
    """Reads tensors out of memory-mapped files; the maps live as long as the source does."""
    maps: dict[Path, mmap.mmap] = {}

    def read(name: str) -> torch.Tensor:
        entry = entries[name]
        if entry.file not in maps:
            with entry.file.open("rb") as stream:
                # Copy-on-write: torch wants writable memory, the file must stay as it is.
                maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = _DTYPES[entry.dtype]
        count = entry.nbytes // dtype.itemsize
        flat = torch.frombuffer(maps[entry.file], dtype=dtype, count=count, offset=entry.offset)
        return flat.to(torch.float32, copy=True).view(entry.shape)

    return read


def dummy_source(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> TensorSource:
    """Random weights, a function of (`seed`, tensor name, kind of device): every rank and replica makes the same ones.

    Made on `device`: a processor would take minutes for the billions that a GPU makes in a second.
    """
    shapes = dict(expected_tensors(config))

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=device)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randn(shape, generator=generator, device=device) * _DUMMY_SCALE

    return make
