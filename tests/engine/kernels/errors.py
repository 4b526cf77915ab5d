"""How far a result may be from the exact one.

The error of a tensor is the norm of the difference over the norm of the exact (float64) result. A bfloat16 has 8
significant bits: rounding a result to it alone costs about 2 ** -9.2 = 0.0017 in this measure, a float32 6e-8 or less.
Triton's interpreter cuts off where the GPU rounds, which costs twice as much.
"""

from __future__ import annotations

import os

import torch

TOLERANCE: dict[tuple[str, torch.dtype], float] = {
    ("gate", torch.bfloat16): 1e-6,  # the inputs are exact, all arithmetic and the weights float32
    ("gate", torch.float32): 1e-6,
    ("expert_ffn", torch.bfloat16): 4e-3,  # two roundings: between the products, and of the result
    ("expert_ffn", torch.float32): 2e-6,
    ("attention", torch.bfloat16): 4e-3,  # two roundings: of the probabilities, and of the result
    ("attention", torch.float32): 2e-6,
    ("add_rms_norm", torch.bfloat16): 4e-3,  # two roundings: of the sum, and of the result
    ("add_rms_norm", torch.float32): 1e-6,
    ("norm_rope", torch.bfloat16): 2.5e-3,  # one rounding
    ("norm_rope", torch.float32): 1e-6,
}


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    assert exact.dtype == torch.float64
    assert got.shape == exact.shape
    difference = (got.double() - exact).norm()
    return float(difference / exact.norm().clamp(min=1e-300))


def check(name: str, got: torch.Tensor, exact: torch.Tensor) -> None:
    error = relative_error(got, exact)
    allowed = TOLERANCE[name, got.dtype] if name != "gate" else TOLERANCE["gate", torch.float32]
    if os.environ.get("TRITON_INTERPRET") == "1" and got.dtype == torch.bfloat16:
        allowed *= 2
    assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"
