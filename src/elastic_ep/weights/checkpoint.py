"""Where each tensor of a safetensors checkpoint lies, checked without reading one. Standard library only.

Format: eight bytes of little-endian header length, a JSON header that names every tensor's dtype, shape and byte
range, then the bytes. The package `safetensors` tells neither where a tensor's bytes lie nor which entry is wrong.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic_ep.models.config_json import UNQUANTISED, CheckpointError, read_json_object, shown
from elastic_ep.models.formats import Need
from elastic_ep.models.spec import ITEM_BYTES, ModelSpec, Piece

_MAX_HEADER_BYTES = 100_000_000
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's bytes are `file`[`offset` : `offset + nbytes`], row-major, little-endian."""

    file: Path
    dtype: str
    """One of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def validate_checkpoint(path: Path, spec: ModelSpec) -> dict[str, TensorEntry]:
    """The needed tensors of the folder `path`, by the names in `spec`: present, of the right shape, none cut off.

    Experts may lie one by one or stacked. Raises `CheckpointError`.
    """
    entries = _entries(path)
    pieces = [(piece, piece.needs) for piece in spec.pieces()]
    _refuse_others(entries, pieces)
    return {need.tensor: _checked(path, need, entries) for _, needs in pieces for need in needs}


def _checked(path: Path, need: Need, entries: Mapping[str, TensorEntry]) -> TensorEntry:
    stacked = need.stacked
    if stacked is not None and stacked.also in entries:
        stacked = replace(stacked, tensor=stacked.also)
    alone = need.role == "values" and (
        need.tensor in entries or stacked is None or stacked.tensor not in entries
    )
    if alone or stacked is None:
        return _entry_of(path, need.tensor, need.shape, need, entries)
    whole = _entry_of(path, stacked.tensor, stacked.shape, need, entries)
    item = ITEM_BYTES[whole.dtype]
    nbytes = math.prod(need.shape) * item
    return TensorEntry(whole.file, whole.dtype, need.shape, whole.offset + stacked.offset * item, nbytes)


def _entry_of(
    path: Path, name: str, shape: tuple[int, ...], need: Need, entries: Mapping[str, TensorEntry]
) -> TensorEntry:
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(f"{path}: tensor {name} is missing")
    if entry.dtype not in need.dtypes:
        raise CheckpointError(
            f"{entry.file}: tensor {name} has dtype {shown(entry.dtype)}, config.json asks for "
            f"{' or '.join(need.dtypes)}"
        )
    if entry.shape != shape and not (need.loose and _without_ones(entry.shape) == _without_ones(shape)):
        raise CheckpointError(
            f"{entry.file}: tensor {name} has shape {shown(list(entry.shape))}, config.json asks for {list(shape)}"
        )
    if entry.nbytes != math.prod(shape) * ITEM_BYTES[entry.dtype]:
        raise CheckpointError(
            f"{entry.file}: tensor {name} has {entry.nbytes} bytes, which is not its shape's"
        )
    return replace(entry, shape=shape)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors that a safetensors file declares; their bytes lie within it. Raises `CheckpointError`."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is not a file")
        size = status.st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file} is truncated or not a safetensors file")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object")
    entries = {
        name: _entry(file, name, plain, 8 + length, size)
        for name, plain in header.items()
        if name != "__metadata__"
    }
    _check_layout(file, entries, 8 + length, size)
    return entries


def _check_layout(file: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """As the format has it: tensors lie one behind the other and fill the file."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            fault = (
                "overlaps the one before" if entry.offset < end else f"begins {entry.offset - end} bytes late"
            )
            raise CheckpointError(f"{file} is damaged: tensor {name} {fault}")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{file} is damaged: {size - end} bytes at its end belong to no tensor")


def _entry(file: Path, name: str, plain: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = plain["dtype"], tuple(plain["shape"]), plain["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: the header entry of tensor {name} is malformed") from None
    numbers = (*shape, begin, end)
    if type(dtype) is not str or any(type(one) is not int or one < 0 for one in numbers) or begin > end:
        raise CheckpointError(f"{file}: the header entry of tensor {name} is malformed")
    if data_start + end > size:
        raise CheckpointError(
            f"{file} is truncated: tensor {name} ends at byte {data_start + end}, the file at {size}"
        )
    return TensorEntry(file, dtype, shape, data_start + begin, end - begin)


def _entries(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the folder, each from the file that the index names for it."""
    if (path / _SINGLE).exists():
        return read_header(path / _SINGLE)
    index = path / _INDEX
    if not index.exists():
        raise CheckpointError(f"{path} holds neither {_SINGLE} nor {_INDEX}")
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{index}: weight_map is missing or malformed")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".."):
            raise CheckpointError(f"{index}: weight_map names {shard!r}, which is not a file of this folder")
    headers = {shard: read_header(path / shard) for shard in shards}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index}: tensor {name} is not in {shard}, which weight_map names for it")
    return {name: headers[shard][name] for name, shard in shard_of.items()}


_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_g_idx|weight_shape|weight_zero_point|\w*absmax|SCB|"
    r"\w*_scale(_inv|_2)?|weight\.\w+)$|_blocks$|_scales$"
)
"""How quantised checkpoints call what they store beside or in place of a `weight`, or of experts' stacked tensors."""


def _refuse_others(
    entries: Mapping[str, TensorEntry], pieces: Sequence[tuple[Piece, tuple[Need, ...]]]
) -> None:
    """What is in the checkpoint and would be left out, though the model's output depends on it."""
    needed, modules = set[str](), dict[str, tuple[str, ...]]()
    for piece, needs in pieces:
        needed.update(need.tensor for need in needs)
        needed.update(name for need in needs if (at := need.stacked) for name in (at.tensor, at.also))
        modules[piece.tensor.removesuffix(".weight")] = piece.format.beside
        if piece.stacked:
            modules[piece.stacked.tensor.removesuffix(".weight")] = piece.format.beside
    for name, entry in entries.items():
        if name in needed:
            continue
        if ending := _QUANTISED.search(name):
            module = name[: ending.start()]
            if module in modules and ending.group() not in modules[module]:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is of weights quantised in a way that config.json does not say, or "
                    f"that is not known here: {UNQUANTISED}"
                )
        elif name.endswith("_proj.bias") and name.removesuffix(".bias") in modules:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is a bias, which config.json does not ask for"
            )
