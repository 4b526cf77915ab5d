"""The weights of one rank: everything dense, and the experts that the placement puts here.

Matrices are stored [in, out], ready for `x @ w`. Experts are stacked by slot, so that a slot can be overwritten.

Experts of a quantised checkpoint are kept as the codes and scales that they are there: these are the expert's bytes,
which peers pull and checksums are of. On a processor the matrices that they come to are there beside them, for to
compute from codes would take several times as long; they follow the codes, and no peer's bytes get there. Everything
dense is numbers from the start.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from elastic_ep.models.formats import FLOATS, Fp8, Need
from elastic_ep.models.spec import Layer, ModelSpec, Moe, Parameter, Piece
from elastic_ep.placement import EMPTY, Placement
from elastic_ep.weights.arranged import arranged, dense_scales
from elastic_ep.weights.checkpoint import TensorEntry, validate_checkpoint
from elastic_ep.weights.dequantise import dequantised

TensorSource = Callable[[str], torch.Tensor]
"""From a checkpoint's tensor name to its value, in the checkpoint's layout [out, in]: float32, or codes as they are."""

_DUMMY_SCALE = 0.05
_DUMMY_EXPONENT = 127 - 6
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I32": torch.int32,
}
_WIDENED = (*FLOATS, "F8_E8M0")
ROUNDINGS = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Held(Enum):
    """What of quantised experts is in memory."""

    BOTH = "both"
    CODES = "codes"
    """Those of four bits as a GPU takes them in: see arranged.py."""
    NUMBERS = "numbers"
    """These are the expert's bytes then."""


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
        *,
        held: Held = Held.BOTH,
        rounding: str = "",
    ) -> None:
        """`rounding`: to what all numbers are rounded, whatever `dtype` they are in; a key of `ROUNDINGS`."""
        self.spec = spec
        self._dtype = dtype
        self._rounding = ROUNDINGS[rounding]
        self._held = held
        self.source = source
        self._device = device
        self.from_peers = 0
        """Experts that did not come from `source`."""
        self._derived: dict[tuple[int, int], int] = {}
        """By layer and slot: the checksum of the numbers that its codes came to."""
        self.outside: Parts = {part.name: self._dense(part) for part in spec.dense}
        self.embed, self.final_norm, self.lm_head = (
            self.outside[name] for name in ("embed", "final_norm", "lm_head")
        )
        slots = placement.slots_per_rank
        self._dense_layers: list[Parts] = [dict(self._of_layer(layer)) for layer in spec.layers]
        self.layers: list[Parts] = [
            dense
            | {name: tensor for part in expert_parts(layer) for name, tensor in self._slots(part, slots)}
            for dense, layer in zip(self._dense_layers, spec.layers, strict=True)
        ]
        self._mixtures = spec.mixtures
        for layer in range(spec.moe_layers):
            for slot, logical in enumerate(placement.on_rank(layer, rank)):
                self.load_expert(layer, slot, logical)

    def expert_parts(self, layer: int) -> list[str]:
        """Names of what an expert's bytes are, in the order in which checksums run over them."""
        ffn = self.spec.moe_of(layer)
        if self._held is Held.NUMBERS:
            return [part.name for part in ffn.parts]
        return [kept.name for kept in ffn.kept]

    def slot(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The expert in a slot, by `expert_parts`."""
        return [self.mixture(layer)[name][slot] for name in self.expert_parts(layer)]

    def mixture(self, layer: int) -> Parts:
        """All parts of a layer that mixes experts."""
        return self.layers[self._mixtures[layer]]

    def load_expert(self, layer: int, slot: int, logical: int) -> None:
        """Overwrite `slot` with logical expert `logical`, or with zeros for `EMPTY`. No step may be using it."""
        if logical == EMPTY:
            self._derived.pop((layer, slot), None)
            for name in {*self.expert_parts(layer), *(part.name for part in self._followers(layer))}:
                self.mixture(layer)[name][slot].zero_()
            return
        for part in self.spec.moe_of(layer).parts:
            self._load(layer, slot, part.of_expert(logical))
        self.derive(layer, slot)

    def derive(self, layer: int, slot: int) -> None:
        """Have the numbers follow the codes, for whoever has written these. No step may be using the slot."""
        followers = self._followers(layer)
        for part in followers:
            rows = [self.mixture(layer)[kept.name][slot].split(kept.rows) for kept in part.kept]
            values = (
                dequantised(
                    piece.format,
                    {need.role: codes for need, codes in zip(piece.needs, of_piece, strict=True)},
                    piece.shape,
                )
                for piece, of_piece in zip(part.pieces, zip(*rows, strict=True), strict=True)
            )
            self._write(layer, slot, part, values)
        if followers:
            self._derived[layer, slot] = self._derived_sum(layer, slot)

    def checksum(self, layer: int, slot: int) -> int:
        """CRC-32 of the slot's bytes as they lie in memory: the same for every copy of an expert.

        Another one if numbers are beside the codes and are not what the codes came to.
        """
        value = 0
        for part in self.slot(layer, slot):
            value = crc32(_bytes(part), value)
        expected = self._derived.get((layer, slot))
        if expected is not None and (found := self._derived_sum(layer, slot)) != expected:
            value ^= found ^ expected
        return value

    def dense(self) -> Parts:
        """Everything but the experts, by name: contiguous, and always in the same order."""
        tensors = dict(self.outside)
        for index, parts in enumerate(self._dense_layers):
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in parts.items()}
        return tensors

    def dense_checksum(self) -> int:
        """CRC-32 of the bytes of `dense`, one tensor after the other: the same on every rank."""
        value = 0
        for tensor in self.dense().values():
            value = crc32(_bytes(tensor), value)
        return value

    def _of_layer(self, layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
        """What is dense, by name; of a matrix that stays codes these, [out, in], scales as `dense_scales` has them."""
        for part in layer.dense:
            if self._held is not Held.CODES or not part.coded_dense:
                yield part.name, self._dense(part)
                continue
            codes, scales = zip(*(self._coded(piece) for piece in part.pieces), strict=True)
            yield f"{part.name}.codes", torch.cat(codes).view(torch.float8_e4m3fn)
            yield f"{part.name}.scales", torch.cat(scales, dim=1).contiguous()

    def _coded(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as bytes, for float8 knows no cat; scales."""
        assert isinstance(piece.format, Fp8)
        parts = {need.role: self.source(need.tensor).to(self._device) for need in piece.needs}
        return parts["codes"].view(torch.uint8), dense_scales(piece.format, parts["scales"], piece.shape)

    def _dense(self, part: Parameter) -> torch.Tensor:
        pieces = [self._piece(piece, part) for piece in part.pieces]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return whole.contiguous().view(-1).view(part.shape)  # a lone column keeps odd strides otherwise

    def _piece(self, piece: Piece, part: Parameter) -> torch.Tensor:
        value = self._value(piece)
        if not part.exact:
            value = self._rounded(value).to(self._dtype)
        return _arranged(value.to(self._device), piece, part)

    def _value(self, piece: Piece) -> torch.Tensor:
        parts = {need.role: self.source(need.tensor) for need in piece.needs}
        return dequantised(piece.format, parts, piece.shape)

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        return value if self._rounding is None else value.to(self._rounding)

    def _slots(self, part: Parameter, slots: int) -> Iterator[tuple[str, torch.Tensor]]:
        """What is in memory of a part of experts: zeros."""
        if not part.quantised or self._held is not Held.CODES:
            yield part.name, self._zeros(slots, *part.shape)
        if part.quantised and self._held is not Held.NUMBERS:
            for kept in part.kept:
                dtype = DTYPES[kept.dtype] if kept.dtype else self._dtype
                yield kept.name, torch.zeros((slots, *kept.shape), dtype=dtype, device=self._device)

    def _load(self, layer: int, slot: int, part: Parameter) -> None:
        if not part.quantised or self._held is Held.NUMBERS:
            self._write(layer, slot, part, (self._value(piece) for piece in part.pieces))
            return
        for index, kept in enumerate(part.kept):
            rows = self.mixture(layer)[kept.name][slot].split(kept.rows)
            for piece, target in zip(part.pieces, rows, strict=True):
                need = piece.needs[index]
                value = self.source(need.tensor)
                if self._held is Held.CODES:
                    value = arranged(
                        piece.format, need.role, value.to(self._device), alternating=piece.alternating
                    )
                target.copy_(value)

    def _write(self, layer: int, slot: int, part: Parameter, values: Iterable[torch.Tensor]) -> None:
        """The pieces' numbers, each in its columns."""
        target, start = self.mixture(layer)[part.name][slot], 0
        for piece, value in zip(part.pieces, values, strict=True):
            arranged = _arranged(self._rounded(value), piece, part)
            target[..., start : start + arranged.shape[-1]].copy_(arranged)
            start += arranged.shape[-1]

    def _followers(self, layer: int) -> list[Parameter]:
        """Parts of experts whose numbers follow their codes."""
        if self._held is not Held.BOTH:
            return []
        return [part for part in self.spec.moe_of(layer).parts if part.quantised]

    def _derived_sum(self, layer: int, slot: int) -> int:
        value = 0
        for part in self._followers(layer):
            value = crc32(_bytes(self.mixture(layer)[part.name][slot]), value)
        return value

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
    rounding: str = "",
) -> Weights:
    """Weights of the right shapes, all zero, for peers to fill. Nothing is read; `load_expert` will use `source`."""
    needs = _needs(spec)

    def nothing(name: str) -> torch.Tensor:
        return torch.zeros(needs[name].shape, dtype=DTYPES[needs[name].held])

    row = (EMPTY,) * num_slots
    placement = Placement(0, 1, num_slots, spec.moe.experts, (row,) * spec.moe_layers)
    weights = Weights(spec, placement, 0, nothing, torch.device(device), dtype, rounding=rounding)
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
    held: Held = Held.BOTH,
    rounding: str = "",
) -> Weights:
    """Weights of the checkpoint in `path`; with `load_format` "dummy" random ones that need no checkpoint.

    Raises `CheckpointError` for a checkpoint that is not whole, ValueError for an unknown format.
    """
    source = weight_source(path, spec, load_format, seed, device)
    return Weights(spec, placement, rank, source, torch.device(device), dtype, held=held, rounding=rounding)


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
        dtype = DTYPES[entry.dtype]
        count = entry.nbytes // dtype.itemsize
        flat = torch.frombuffer(maps[entry.file], dtype=dtype, count=count, offset=entry.offset)
        return flat.to(torch.float32 if entry.dtype in _WIDENED else dtype, copy=True).view(entry.shape)

    return read


def dummy_source(spec: ModelSpec, seed: int, device: torch.device | str = "cpu") -> TensorSource:
    """Random weights, a function of (`seed`, tensor name, kind of device): every rank and replica makes the same ones.

    Made on `device`: a processor would take minutes for the billions that a GPU makes in a second.
    """
    needs = _needs(spec)

    def make(name: str) -> torch.Tensor:
        need = needs[name]
        if len(need.shape) == 1 and "norm" in name:
            return torch.ones(need.shape, device=device)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        if need.role == "values":
            return torch.randn(need.shape, generator=generator, device=device) * _DUMMY_SCALE
        return _dummy_codes(need, generator, torch.device(device))

    return make


def _dummy_codes(need: Need, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Any codes, and scales with which they come to numbers as small as those of other random weights."""
    if need.held == "F8_E4M3":
        return torch.randn(need.shape, generator=generator, device=device).to(torch.float8_e4m3fn)
    if need.role == "scales":
        if need.held == "U8":
            return torch.full(need.shape, _DUMMY_EXPONENT, dtype=torch.uint8, device=device)
        low = _DUMMY_SCALE if need.loose and "F8_E8M0" in need.dtypes else _DUMMY_SCALE / 4
        return low * (0.5 + torch.rand(need.shape, generator=generator, device=device))
    size = DTYPES[need.held].itemsize
    shape = *need.shape[:-1], need.shape[-1] * size
    codes = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)
    return codes.view(DTYPES[need.held])


def _needs(spec: ModelSpec) -> dict[str, Need]:
    """All that is read, by its name."""
    return {need.tensor: need for piece in spec.pieces() for need in piece.needs}
