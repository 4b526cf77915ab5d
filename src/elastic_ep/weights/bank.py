"""The weights of one rank: everything dense, and the experts that the placement puts here.

Matrices are stored [in, out], ready for `x @ w`. Experts are stacked by slot, so that a slot can be overwritten.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from elastic_ep.models.spec import Layer, ModelSpec, Moe, Parameter, Piece
from elastic_ep.placement import EMPTY, Placement
from elastic_ep.weights.checkpoint import TensorEntry, validate_checkpoint

TensorSource = Callable[[str], torch.Tensor]
"""From a checkpoint's tensor name to its float32 value, in the checkpoint's layout [out, in]."""

_DUMMY_SCALE = 0.05
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


Parts = dict[str, torch.Tensor]
"""By the names that the spec gives them."""


class Weights:
    """`embed` [V, H], `final_norm` [H], `lm_head` [H, V]; `layers[i]` the dense parts of a layer and those of its
    experts, these stacked by slot. Where slots are named, layers are counted among those that mix experts.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        rank: int,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = spec
        self._dtype = dtype
        self.source = source
        self._device = device
        self.from_peers = 0
        """Experts that did not come from `source`."""
        self.outside: Parts = {part.name: self._dense(part) for part in spec.dense}
        self.embed, self.final_norm, self.lm_head = (
            self.outside[name] for name in ("embed", "final_norm", "lm_head")
        )
        slots = placement.slots_per_rank
        self.layers: list[Parts] = [
            {part.name: self._dense(part) for part in layer.dense}
            | {part.name: self._zeros(slots, *part.shape) for part in expert_parts(layer)}
            for layer in spec.layers
        ]
        self._mixtures = spec.mixtures
        for layer in range(spec.moe_layers):
            for slot, logical in enumerate(placement.on_rank(layer, rank)):
                self.load_expert(layer, slot, logical)

    def slot(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The parts of the expert in a slot, in the order in which checksums run over them."""
        parts = self.spec.moe_of(layer).parts
        return [self.mixture(layer)[part.name][slot] for part in parts]

    def mixture(self, layer: int) -> Parts:
        """All parts of a layer that mixes experts."""
        return self.layers[self._mixtures[layer]]

    def load_expert(self, layer: int, slot: int, logical: int) -> None:
        """Overwrite `slot` with logical expert `logical`, or with zeros for `EMPTY`. No step may be using it."""
        for part, target in zip(self.spec.moe_of(layer).parts, self.slot(layer, slot), strict=True):
            if logical == EMPTY:
                target.zero_()
                continue
            start = 0
            for piece in part.of_expert(logical).pieces:
                value = _arranged(self.source(piece.tensor), piece, part)
                target[..., start : start + value.shape[-1]].copy_(value)
                start += value.shape[-1]

    def checksum(self, layer: int, slot: int) -> int:
        """CRC-32 of the slot's bytes as they lie in memory: the same for every copy of an expert."""
        value = 0
        for part in self.slot(layer, slot):
            value = crc32(_bytes(part), value)
        return value

    def dense(self) -> Parts:
        """Everything but the experts, by name: contiguous, and always in the same order."""
        tensors = dict(self.outside)
        for index, (layer, parts) in enumerate(zip(self.spec.layers, self.layers, strict=True)):
            tensors |= {f"layers.{index}.{part.name}": parts[part.name] for part in layer.dense}
        return tensors

    def dense_checksum(self) -> int:
        """CRC-32 of the bytes of `dense`, one tensor after the other: the same on every rank."""
        value = 0
        for tensor in self.dense().values():
            value = crc32(_bytes(tensor), value)
        return value

    def _dense(self, part: Parameter) -> torch.Tensor:
        pieces = [self._piece(piece, part) for piece in part.pieces]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return whole.contiguous().view(part.shape)

    def _piece(self, piece: Piece, part: Parameter) -> torch.Tensor:
        dtype = torch.float32 if part.exact else self._dtype
        return _arranged(self.source(piece.tensor).to(dtype).to(self._device), piece, part)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


def expert_parts(layer: Layer) -> tuple[Parameter, ...]:
    """Of one expert; none in a layer without experts."""
    return layer.ffn.parts if isinstance(layer.ffn, Moe) else ()


def _arranged(value: torch.Tensor, piece: Piece, part: Parameter) -> torch.Tensor:
    """A tensor of the checkpoint as it lies in the parameter."""
    if value.dim() == 1:
        value = value.repeat(piece.repeat)
    elif part.turned:
        value = value.t()
    return torch.cat((value[..., ::2], value[..., 1::2]), dim=-1) if piece.alternating else value


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).cpu().numpy().data


def blank_weights(
    spec: ModelSpec,
    num_slots: int,
    source: TensorSource,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Weights of the right shapes, all zero, for peers to fill. Nothing is read; `load_expert` will use `source`."""
    shapes = _shapes(spec)
    row = (EMPTY,) * num_slots
    placement = Placement(0, 1, num_slots, spec.moe.experts, (row,) * spec.moe_layers)
    weights = Weights(spec, placement, 0, lambda name: torch.zeros(shapes[name]), torch.device(device), dtype)
    weights.source = source
    return weights


def load_weights(
    path: Path,
    spec: ModelSpec,
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
    source = weight_source(path, spec, load_format, seed, device)
    return Weights(spec, placement, rank, source, torch.device(device), dtype)


def weight_source(
    path: Path, spec: ModelSpec, load_format: str, seed: int, device: torch.device | str = "cpu"
) -> TensorSource:
    """Where the tensors come from. Raises as `load_weights`."""
    if load_format == "dummy":
        return dummy_source(spec, seed, device)
    if load_format == "auto":
        return checkpoint_source(validate_checkpoint(path, spec))
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


def dummy_source(spec: ModelSpec, seed: int, device: torch.device | str = "cpu") -> TensorSource:
    """Random weights, a function of (`seed`, tensor name, kind of device): every rank and replica makes the same ones.

    Made on `device`: a processor would take minutes for the billions that a GPU makes in a second.
    """
    shapes = _shapes(spec)

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1 and "norm" in name:
            return torch.ones(shape, device=device)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randn(shape, generator=generator, device=device) * _DUMMY_SCALE

    return make


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Of every tensor that is read."""
    return {piece.tensor: piece.shape for piece in spec.pieces()}
