"""How a checkpoint may hold a matrix: as numbers, or as codes and the scales that they are multiplied by.

Plain data, standard library only. What the numbers are that codes and scales come to says weights/dequantise.py.

Sources: blocks with `weight_scale_inv`, https://huggingface.co/deepseek-ai/DeepSeek-V3 (README_WEIGHTS.md); MXFP4, the
OCP Microscaling Formats (MX) Specification 1.0 and https://github.com/openai/gpt-oss; the names and the packing of
compressed-tensors, https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FLOATS = ("BF16", "F16", "F32")
_PER_WORD = 8
"""Codes of four bits in an int32."""
MX_BLOCK = 32
"""Numbers that share a scale, in the MX formats. On a GPU all codes of four bits lie in blocks of as many."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """Where a checkpoint that stacks its experts has a tensor: expert e begins at element `offset` + e * `stride`."""

    tensor: str
    shape: tuple[int, ...]
    offset: int = 0
    stride: int = 0
    also: str = ""
    """What the tensor is called in other checkpoints."""


@dataclass(frozen=True, slots=True)
class Need:
    """A tensor that a matrix is made from. Floats are held as float32, all else as it is."""

    role: str
    tensor: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    """Any of them will do."""
    stacked: Stacked | None = None
    loose: bool = False
    """Dimensions of one may be missing, or be there in addition."""

    @property
    def held(self) -> str:
        """Its dtype in memory."""
        return "F32" if "F32" in self.dtypes else self.dtypes[0]


SCALED_DEPTH = 64
"""On a GPU products sum so many codes before they multiply by a scale: a scale's columns are a multiple of it there."""
ROW_GROUP = 128
"""The same where rows become codes too: so many numbers of a row share a scale. And of codes of four bits."""


class Format(Protocol):
    @property
    def quantised(self) -> bool: ...

    @property
    def beside(self) -> tuple[str, ...]:
        """What a module may have besides in a checkpoint, and is not needed: the ends of names."""
        ...

    def needs(self, tensor: str, shape: tuple[int, ...], stacked: Stacked | None) -> tuple[Need, ...]:
        """Tensors of a matrix that without a format would be `tensor`, of `shape` [out, in]."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers, of any shape."""

    quantised = False
    beside = ()

    def needs(self, tensor: str, shape: tuple[int, ...], stacked: Stacked | None) -> tuple[Need, ...]:
        return (Need("values", tensor, shape, FLOATS, stacked),)


PLAIN = Plain()


@dataclass(frozen=True, slots=True)
class Fp8:
    """Codes in float8 (e4m3), and a scale for each block of `rows` x `columns`; the last ones may be short.

    0 is all of them: (1, 0) is a scale a row, (0, 0) one for the matrix.
    """

    rows: int
    columns: int
    scales: str
    """What the scales are called in place of `weight`."""
    weights_alone: bool = False
    """The checkpoint says that activations are not quantised."""
    quantised = True
    beside = (".input_scale",)

    @property
    def rows_too(self) -> bool:
        """On a GPU rows become codes before they meet these."""
        return not self.weights_alone and self.columns % ROW_GROUP == 0

    def needs(self, tensor: str, shape: tuple[int, ...], stacked: Stacked | None) -> tuple[Need, ...]:
        out, inner = shape
        grid = _parts(out, self.rows), _parts(inner, self.columns)
        module = tensor.removesuffix(".weight")
        return (
            Need("codes", tensor, shape, ("F8_E4M3",)),
            Need("scales", f"{module}.{self.scales}", grid, (*FLOATS, "F8_E8M0"), loose=True),
        )


@dataclass(frozen=True, slots=True)
class Int4:
    """Codes of four bits, eight of a row in an int32, lowest bits first; a scale for each `group` of a row (0: all).

    A code stands for itself less 8, or less the group's own zero point; these are packed downwards, eight rows in one.
    """

    group: int
    zero_points: bool
    quantised = True
    beside = (".weight_shape", ".input_scale")

    def needs(self, tensor: str, shape: tuple[int, ...], stacked: Stacked | None) -> tuple[Need, ...]:
        out, inner = shape
        groups = _parts(inner, self.group)
        module = tensor.removesuffix(".weight")
        codes = Need("codes", f"{module}.weight_packed", (out, _parts(inner, _PER_WORD)), ("I32",))
        scales = Need("scales", f"{module}.weight_scale", (out, groups), loose=True)
        zeros = Need("zeros", f"{module}.weight_zero_point", (_parts(out, _PER_WORD), groups), ("I32",))
        return (codes, scales, zeros) if self.zero_points else (codes, scales)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Stacked experts: codes of four bits (e2m1), two in a byte, low bits first; 32 of a row share an exponent (e8m0).

    The tensor T is `T_blocks` [E, out, in / 32, 16] and `T_scales` [E, out, in / 32].
    """

    quantised = True
    beside = ()

    def needs(self, tensor: str, shape: tuple[int, ...], stacked: Stacked | None) -> tuple[Need, ...]:
        assert stacked is not None, "refused where the format was chosen"
        out, inner = shape
        experts, rows, _ = stacked.shape
        blocks, at = inner // MX_BLOCK, tensor.removesuffix(".weight")

        def there(ending: str, numbers: int, *last: int) -> Stacked:
            """Of bytes that each are for so many numbers."""
            whole = (experts, rows, blocks, *last)
            return Stacked(
                stacked.tensor + ending, whole, stacked.offset // numbers, stacked.stride // numbers
            )

        codes = there("_blocks", 2, MX_BLOCK // 2)
        scales = there("_scales", MX_BLOCK)
        return (
            Need("codes", at + "_blocks", (out, inner // 2), ("U8",), codes),
            Need("scales", at + "_scales", (out, blocks), ("U8",), scales),
        )


def _parts(size: int, part: int) -> int:
    return -(-size // part) if part else 1
