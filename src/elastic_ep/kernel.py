"""What several kernels need: Triton's decorator with types, and a product that the interpreter gets right.

Masks are never made of scalars alone: Triton 3.9's interpreter refuses to widen a scalar comparison to a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import triton
import triton.language as tl


class Kernel(Protocol):
    """A function for the GPU: `kernel[grid](...)` launches it; kernels call it directly."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


jit: Callable[[Callable[..., Any]], Kernel] = triton.jit


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """a @ b + acc, the products exact, the sum in float32. float32 operands stay float32: no TF32.

    The interpreter multiplies the bit patterns of bfloat16, so there they are widened first.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def to_float8(x: tl.tensor) -> tl.tensor:
    """The nearest e4m3, to even, of float32 of at most 448 in size.

    The interpreter cuts off or rounds wrongly, so there the numbers are rounded before.
    """
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (x + 24576.0) - 24576.0  # whose last bit is that of the smallest e4m3
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


COUNTERS = 1 << 16


@cache
def counters(device: torch.device) -> torch.Tensor:
    """[COUNTERS] int32 of zeros, for programs that share work: whoever counts last sets its counter to zero again.

    HAZARD: of one device there is one, so launches that use it must follow one another.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def processors(device: torch.device) -> int:
    """Multiprocessors to share the work; the interpreter makes do with three."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`, which is positive."""
    return 1 << (value - 1).bit_length()
