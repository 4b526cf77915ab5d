"""What weights are in memory: as --dtype and --quantization ask, the checkpoint has them and the device computes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.models.formats import MX_BLOCK, ROW_GROUP, SCALED_DEPTH, Fp8, Int4, Mxfp4
from elastic_ep.models.spec import ModelSpec, Parameter

_SAME = {"half": "float16", "float": "float32"}
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Precision:
    """As in `RankConfig`, but for `notices`: a line each for an operator."""

    rounding: str = ""
    halves: bool = False
    widened: bool = False
    notices: tuple[str, ...] = ()


def precision(
    config: ServeConfig, model: ModelSpec, dtypes: Collection[str], device: str, *, fused: bool
) -> Precision:
    """`dtypes`: of all tensors of the checkpoint, if it is read. `fused`: ranks compute in C++. Raises `ConfigError`."""
    _check_quantisation(config.quantization, model.quantisation or "none")
    dtype = _SAME.get(config.dtype, config.dtype)
    stored = {_NAMES.get(name, name) for name in dtypes}
    if device == "cuda":
        return _on_gpu(model, dtype, stored)
    rounding = "" if dtype in ("auto", "float32") or stored == {dtype} else dtype
    halves = dtype == "bfloat16" or (dtype == "auto" and stored == {"bfloat16"})
    return Precision(rounding, fused and halves)


def _check_quantisation(asked: str, has: str) -> None:
    if asked not in ("auto", has):
        is_so = "is not quantised" if has == "none" else f"is quantised by {has}"
        raise ConfigError(
            f"--quantization {asked}: the checkpoint {is_so}, and weights are served as they are: leave the flag out"
        )


def _on_gpu(model: ModelSpec, dtype: str, stored: set[str]) -> Precision:
    if dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: ranks on a GPU compute in bfloat16: leave it out")
    notices = tuple(
        f"weights in {name} are rounded to bfloat16, which ranks on a GPU compute in"
        for name in sorted({"float16", "float32"} & stored)
        if not model.quantisation
    )
    widened = not all(computed_on_gpu(part) for part in model.moe.parts if part.quantised)
    if widened and dtype == "auto":
        more = model.moe.experts * model.moe_layers * (2 * model.expert_elements - model.expert_bytes(2))
        raise ConfigError(
            f"--model: ranks on a GPU do not compute with these quantised weights ({model.quantisation}) as they are: "
            f"give --dtype bfloat16, which widens them as they are loaded, by {more / 2**30:.1f} GiB for one copy of each"
        )
    return Precision(widened=widened, notices=notices)


def computed_on_gpu(part: Parameter) -> bool:
    """Do kernels compute from the codes of such a part of experts?"""
    made = part.pieces[0].format
    if isinstance(made, Mxfp4):
        return True
    whole = part.turned and not part.pieces[0].alternating
    if isinstance(made, Int4):
        return whole and made.group % ROW_GROUP == 0 and part.pieces[0].shape[1] % MX_BLOCK == 0
    return whole and isinstance(made, Fp8) and made.columns % SCALED_DEPTH == 0
