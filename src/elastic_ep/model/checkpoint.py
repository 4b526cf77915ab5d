"""Where each tensor of a safetensors checkpoint lies, checked without reading one. Standard library only.

Format: eight bytes of little-endian header length, a JSON header that names every tensor's dtype, shape and byte
range, then the bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_ep.models.config_json import CheckpointError, read_json_object
from elastic_ep.models.spec import ModelSpec, Piece

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
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
    entries: dict[str, TensorEntry] = {}
    for file in _shards(path):
        entries.update(read_header(file))
    return {piece.tensor: _checked(path, piece, entries) for piece in spec.pieces()}


def _checked(path: Path, piece: Piece, entries: Mapping[str, TensorEntry]) -> TensorEntry:
    stacked = piece.stacked
    if piece.tensor in entries or stacked is None or stacked.tensor not in entries:
        return _entry_of(path, piece.tensor, piece.shape, entries)
    whole = _entry_of(path, stacked.tensor, stacked.shape, entries)
    item = ITEM_BYTES[whole.dtype]
    nbytes = math.prod(piece.shape) * item
    return TensorEntry(whole.file, whole.dtype, piece.shape, whole.offset + stacked.offset * item, nbytes)


def _entry_of(
    path: Path, name: str, shape: tuple[int, ...], entries: Mapping[str, TensorEntry]
) -> TensorEntry:
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(f"{path}: tensor {name} is missing")
    if entry.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{entry.file}: tensor {name} has dtype {entry.dtype}; supported are {', '.join(ITEM_BYTES)}"
        )
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
        )
    if entry.nbytes != math.prod(shape) * ITEM_BYTES[entry.dtype]:
        raise CheckpointError(
            f"{entry.file}: tensor {name} has {entry.nbytes} bytes, which is not its shape's"
        )
    return entry


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors that a safetensors file declares; their bytes lie within it. Raises `CheckpointError`."""
    try:
        size = file.stat().st_size
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
    return {
        name: _entry(file, name, plain, 8 + length, size)
        for name, plain in header.items()
        if name != "__metadata__"
    }


def _entry(file: Path, name: str, plain: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype, shape = str(plain["dtype"]), tuple(int(extent) for extent in plain["shape"])
        begin, end = (int(offset) for offset in plain["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: the header entry of tensor {name} is malformed") from None
    if not 0 <= begin <= end:
        raise CheckpointError(f"{file}: tensor {name} has the byte range {begin} to {end}")
    if data_start + end > size:
        raise CheckpointError(
            f"{file} is truncated: tensor {name} ends at byte {data_start + end}, the file at {size}"
        )
    return TensorEntry(file, dtype, shape, data_start + begin, end - begin)


def _shards(path: Path) -> list[Path]:
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    index = path / _INDEX
    if not index.exists():
        raise CheckpointError(f"{path} holds neither {_SINGLE} nor {_INDEX}")
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: weight_map is missing or malformed")
    shards = sorted(set(names.values()))
    if any(Path(shard).name != shard for shard in shards):
        raise CheckpointError(f"{index}: weight_map names a file outside the folder")
    return [path / shard for shard in shards]
