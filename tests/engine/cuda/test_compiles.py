"""Every launch of real layers is compiled for Hopper, GPU or not: what the engine asks for, on tensors without memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from elastic_ep.config import EngineLimits
from elastic_ep.engine.interrupted import CountedCarrier
from elastic_ep.engine.ops_cuda.inputs import StepInputs, StepShape
from elastic_ep.engine.ops_cuda.kernels import (
    by_head,
    decode_attention,
    dense,
    dense_codes,
    expert_ffn,
    gate,
    latent_attention,
    latent_write,
    norm_rope,
    prefill_attention,
    row_codes,
)
from elastic_ep.engine.ops_cuda.kernels.coded_tiles import FP8_ROWS
from elastic_ep.engine.ops_cuda.ops import CudaOps
from elastic_ep.engine.transformer import Transformer
from elastic_ep.exchange.base import Received
from elastic_ep.models.formats import Format, Fp8, Int4
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import DTYPES, Held, Weights
from tests.engine.cuda.conftest import INTERPRETED
from tests.engine.kernels.test_compiles import SHARED_MEMORY
from tests.kit.coded_experts import scaled
from tests.kit.published import PUBLISHED, published

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter's process")

META = torch.device("meta")
RANKS = 8
LIMITS = EngineLimits(max_model_len=8192, max_num_seqs=256, max_num_batched_tokens=2048)
STEPS = {"decode": StepShape(64, decode=True), "prompts": StepShape(2048, decode=False, sequences=256)}
EACH = [(name, step) for name in PUBLISHED for step in STEPS]
CHOSEN = (
    EACH if "ELASTIC_EP_ALL_FAMILIES" in os.environ else [("MiniMax-M2", "decode"), ("gpt-oss-20b", "decode")]
)
"""All together take minutes."""
MODULES = (
    *(by_head, decode_attention, dense, dense_codes, expert_ffn, gate),
    *(latent_attention, latent_write, norm_rope, prefill_attention, row_codes),
)
LATENT = {f"_{name}_kernel" for name in ("by_head", "latent_decode", "latent_prefill", "latent_write")}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
Launch = tuple[str, tuple[tuple[str, Any], ...]]
"""The kernel, and by its arguments and options their types or values."""


class Recorder:
    """In place of a kernel: notes its launches."""

    def __init__(self, kernel: JITFunction[Any], seen: dict[Launch, JITFunction[Any]]) -> None:
        self._kernel = kernel
        self._seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            assert all(size > 0 for size in grid)
            names = self._kernel.arg_names[: len(arguments)]
            types = {name: _type_of(value) for name, value in zip(names, arguments, strict=True)}
            self._seen[self._kernel.__name__, tuple({**types, **constants}.items())] = self._kernel

        return launch


def _type_of(value: Any) -> tuple[str, bool]:
    """And whether Triton takes it as a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], value.storage_offset() * value.itemsize % 16 == 0
    return ("i32", value % 16 == 0) if isinstance(value, int) else ("fp32", False)


@contextmanager
def recorded() -> Iterator[dict[Launch, JITFunction[Any]]]:
    seen: dict[Launch, JITFunction[Any]] = {}
    with ExitStack() as stack:
        for module in MODULES:
            for name, kernel in vars(module).items():
                if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, Recorder(kernel, seen)))
        yield seen


class Nobody:
    """An exchange of `RANKS` ranks that carries nothing."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self._rows = len(x)
        packed = x.new_empty(self._slots, RANKS * LIMITS.max_num_batched_tokens, x.shape[1])
        return Received(packed, torch.empty(self._slots, RANKS, dtype=torch.int32, device=META))

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return y.new_empty(self._rows, y.shape[2])


def launches_of_a_step(spec: ModelSpec, step: StepShape) -> dict[Launch, JITFunction[Any]]:
    needs = {need.tensor: need for piece in spec.pieces() for need in piece.needs}

    def nothing(name: str) -> torch.Tensor:
        return torch.empty(needs[name].shape, dtype=DTYPES[needs[name].held], device=META)

    placement = launch_placement(RANKS, spec.moe_layers, spec.moe.experts, 0)
    slots = placement.slots_per_rank
    weights = Weights(spec, placement, 0, nothing, META, torch.bfloat16, held=Held.CODES)
    ops = CudaOps(spec, LIMITS, StepInputs(LIMITS, 16, META), RANKS, slots, torch.bfloat16, META)
    with recorded() as seen:
        Transformer(weights, ops).forward(step, CountedCarrier(Nobody(slots)))
    return seen


def compile_all(launches: dict[Launch, JITFunction[Any]]) -> list[Any]:
    results = []
    for (_, said), kernel in launches.items():
        arguments = dict(said)
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        names = kernel.arg_names
        assert arguments.keys() == set(names)
        typed = {name: value for name, value in arguments.items() if isinstance(value, tuple)}
        source = ASTSource(
            kernel,
            {name: typed[name][0] if name in typed else "constexpr" for name in names},
            {(names.index(name),): value for name, value in arguments.items() if name not in typed},
            {(names.index(name),): [["tt.divisibility", 16]] for name, (_, even) in typed.items() if even},
        )
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert result.metadata.shared <= SHARED_MEMORY, (kernel.__name__, arguments)
        results.append(result)
    return results


def uses_old_products(results: list[Any]) -> bool:
    """Those of tensor cores before Hopper's, in part at least."""
    return any("mma.sync" in result.asm["ptx"].replace("wgmma", "") for result in results)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


@pytest.mark.parametrize(("name", "step"), CHOSEN)
def test_real_layers(name: str, step: str) -> None:
    launches = launches_of_a_step(published(name), STEPS[step])
    assert {kernel for kernel, _ in launches} >= {"_experts_kernel", "_dense_kernel"}
    assert not uses_old_products(compile_all(launches))


@pytest.mark.parametrize("step", STEPS)
def test_latents(step: str) -> None:
    launches = launches_of_a_step(published("DeepSeek-V3"), STEPS[step])
    latent = {launch: kernel for launch, kernel in launches.items() if launch[0] in LATENT}
    assert len(latent) == 4, "and two products by head"
    for result in compile_all(latent):
        if result.metadata.name in ("_latent_decode_kernel", "_latent_prefill_kernel"):
            assert "warpsPerCTA = [4, 2]" in result.asm["ttgir"], "scores are computed twice"


WEIGHTS_ALONE = Fp8(128, 128, "weight_scale", weights_alone=True)
CODES = [
    (Fp8(128, 128, "weight_scale_inv"), 1, "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3"),
    (WEIGHTS_ALONE, 1000, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
    (Int4(128, zero_points=True), 1, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"),
]


@pytest.mark.parametrize(("format", "rows", "product"), CODES)
def test_experts_of_codes(format: Format, rows: int, product: str) -> None:
    """DeepSeek-V3's, and which of the tensor cores' products they are."""
    hidden, inner, slots = 7168, 2048, 32
    gate_up = scaled(format, [(inner, hidden)] * 2, slots, META)
    down = scaled(format, [(hidden, inner)], slots, META)
    packed = torch.empty(slots, RANKS * 64, hidden, dtype=torch.bfloat16, device=META)
    counts = torch.empty(slots, RANKS, dtype=torch.int32, device=META)
    with recorded() as seen:
        expert_ffn.expert_ffn(packed, counts, gate_up, down, expected_rows=rows, out=packed)
    assert len(seen) == (3 if gate_up.form == FP8_ROWS else 2)
    made = compile_all(seen)
    assert sum(product in result.asm["ptx"] for result in made) == 2
    assert not uses_old_products(made)
