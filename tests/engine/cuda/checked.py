"""Kernels that are compared, call by call, with plain torch in float64 on what the engine gives them.

So an error is that of one kernel: a token that goes to another expert in another precision does not hide it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from elastic_ep.engine.ops_cuda import ops
from elastic_ep.engine.ops_cuda.inputs import StepInputs
from elastic_ep.engine.ops_cuda.kernels.dense_codes import DenseCodes
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled
from elastic_ep.models.formats import ROW_GROUP, Fp8
from elastic_ep.models.spec import Clamped, Moe, Window
from tests.engine.kernels.errors import check, relative_error
from tests.kit import plain_kernels
from tests.kit.coded_experts import matrix

Kernel = Callable[..., Any]
_DENSE = {torch.bfloat16: 8e-3, torch.float32: 3e-6}


class Checked:
    """What stands in place of the kernels in ops.py; padding is not compared. `calls` counts by name."""

    def __init__(self, inputs: StepInputs) -> None:
        self._count = inputs.count
        self.calls: Counter[str] = Counter()

    def _real(self, rows: int) -> int:
        return min(rows, int(self._count))

    def dense(
        self, kernel: Kernel, x: torch.Tensor, w: torch.Tensor, **options: torch.dtype | torch.Tensor | None
    ) -> torch.Tensor:
        y: torch.Tensor = kernel(x, w, **options)
        real = self._real(len(x))
        error = relative_error(y[:real], x[:real].double() @ w.double())
        assert error < _DENSE[y.dtype], f"dense {tuple(x.shape)} @ {tuple(w.shape)}: {error:.1e}"
        return y

    def dense_codes(self, kernel: Kernel, x: torch.Tensor, w: DenseCodes) -> torch.Tensor:
        y: torch.Tensor = kernel(x, w)
        real = self._real(len(x))
        scales = w.scales.double().t().repeat_interleave(ROW_GROUP, dim=1)[:, : x.shape[1]]
        numbers = (w.codes.double() * scales).t()
        exact = plain_kernels.coded_rows(x[:real].cpu().double()).to(x.device) @ numbers
        assert relative_error(y[:real], exact) < 3e-2, "see check_coded"
        return y

    def add_rms_norm(
        self,
        kernel: Kernel,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        real = self._real(len(x))
        added = None if residual is None else residual[:real].double()
        exact = plain_kernels.add_rms_norm(x[:real].double(), added, weight.double(), eps)
        made: tuple[torch.Tensor, torch.Tensor] = kernel(x, residual, weight, eps)
        for got, expected in zip(made, exact, strict=True):
            check("add_rms_norm", got[:real], expected)
        return made

    def norm_rope_write(
        self,
        kernel: Kernel,
        qkv: torch.Tensor,
        norm: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        eps: float,
        **others: Any,
    ) -> torch.Tensor:
        real, sides = self._real(len(qkv)), (keys.double(), values.double())
        exact = plain_kernels.norm_rope_write(
            qkv[:real].double(),
            None if norm is None else norm.double(),
            cos.double(),
            sin.double(),
            positions[:real],
            slots[:real],
            *sides,
            eps,
            **others,
        )
        q: torch.Tensor = kernel(qkv, norm, cos, sin, positions, slots, keys, values, eps, **others)
        check("norm_rope", q[:real], exact)
        page, within = slots[:real].long() // keys.shape[2], slots[:real].long() % keys.shape[2]
        for got, expected in zip((keys, values), sides, strict=True):
            check("norm_rope", got[page, :, within], expected[page, :, within])
        return q

    def decode_attention(
        self, kernel: Kernel, q: torch.Tensor, *places: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        keys, values, tables, lengths = places
        bounds = torch.arange(len(q) + 1)
        out: torch.Tensor = kernel(q, *places, **others)
        self._attended(out, q, keys, values, tables, bounds, lengths, **others)
        return out

    def prefill_attention(
        self, kernel: Kernel, q: torch.Tensor, *places: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        out: torch.Tensor = kernel(q, *places, **others)
        self._attended(out, q, *places, **others)
        return out

    def _attended(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *rest: torch.Tensor,
        scale: float,
        window: Window | None,
        sinks: torch.Tensor | None,
    ) -> None:
        wide = q.double() * (scale * q.shape[-1] ** 0.5)
        exact = plain_kernels.paged_attention(
            wide, keys.double(), values.double(), *rest, window=window, sinks=sinks
        )
        real = self._real(len(q))
        check("attention", out[:real], exact[:real])

    def by_head(
        self, kernel: Kernel, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = kernel(x, w, out)
        real = self._real(len(x))
        error = relative_error(y[:real], plain_kernels.by_head(x[:real].double(), w.double()))
        assert error < _DENSE[y.dtype], f"by_head {tuple(x.shape)} @ {tuple(w.shape)}: {error:.1e}"
        return y

    def latent_write(
        self,
        kernel: Kernel,
        made: torch.Tensor,
        norm: torch.Tensor,
        q: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        latents: torch.Tensor,
        seen: torch.Tensor,
        eps: float,
        **others: Any,
    ) -> None:
        real, rank = self._real(len(made)), len(norm)
        exact = latents.double(), seen[:real].double()
        plain_kernels.latent_write(
            made[:real].double(),
            norm.double(),
            q[:real].double(),
            cos.double(),
            sin.double(),
            positions[:real],
            slots[:real],
            *exact,
            eps,
            **others,
        )
        kernel(made, norm, q, cos, sin, positions, slots, latents, seen, eps, **others)
        check("norm_rope", seen[:real, :, rank:], exact[1][..., rank:])
        page, within = slots[:real].long() // latents.shape[1], slots[:real].long() % latents.shape[1]
        check("norm_rope", latents[page, within], exact[0][page, within])

    def latent_decode(
        self,
        kernel: Kernel,
        q: torch.Tensor,
        latents: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        **others: Any,
    ) -> torch.Tensor:
        out: torch.Tensor = kernel(q, latents, tables, lengths, **others)
        bounds = torch.arange(len(q) + 1)
        self._attended_latents(out, q, latents, tables, bounds, lengths, **others)
        return out

    def latent_prefill(
        self, kernel: Kernel, q: torch.Tensor, *places: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        out: torch.Tensor = kernel(q, *places, **others)
        self._attended_latents(out, q, *places, **others)
        return out

    def _attended_latents(
        self, out: torch.Tensor, q: torch.Tensor, latents: torch.Tensor, *rest: torch.Tensor, **others: Any
    ) -> None:
        exact = plain_kernels.latent_attention(q.double(), latents.double(), *rest, **others)
        real = self._real(len(q))
        check("attention", out[:real], exact[:real])

    def gate(
        self, kernel: Kernel, logits: torch.Tensor, physical: torch.Tensor, top_k: int, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = plain_kernels.gate(logits.double(), physical, top_k, **others)[1]
        chosen, weights = kernel(logits, physical, top_k, **others)
        real = self._real(len(logits))
        check("gate", weights[:real], exact[:real])
        assert (chosen[real:] == -1).all()
        return chosen, weights

    def choose(
        self, kernel: Kernel, logits: torch.Tensor, ffn: Moe, correction: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        made: tuple[torch.Tensor, torch.Tensor] = kernel(logits, ffn, correction)
        real = self._real(len(logits))
        there = None if correction is None else correction.cpu()
        weights, _ = kernel(logits[:real].cpu(), ffn, there)
        ordered = made[0][:real].cpu().sort(dim=-1).values
        torch.testing.assert_close(ordered, weights.sort(dim=-1).values, rtol=1e-5, atol=1e-7)
        return made

    def expert_ffn(
        self,
        kernel: Kernel,
        packed: torch.Tensor,
        counts: torch.Tensor,
        gate_up: torch.Tensor | Scaled,
        down: torch.Tensor | Scaled,
        *,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        activation: Clamped | None,
        **others: Any,
    ) -> torch.Tensor:
        given = packed.clone()
        more = {"biases": biases, "activation": activation, **others}
        y: torch.Tensor = kernel(packed, counts, gate_up, down, **more)
        got, exact = [], []
        for slot, count in enumerate(counts.tolist()):
            got.append(y[slot, :count])
            exact.append(exact_expert(given[slot, :count], slot, gate_up, down, biases, activation))
        check_experts(torch.cat(got), torch.cat(exact), gate_up)
        return y


def check_experts(got: torch.Tensor, exact: torch.Tensor, gate_up: torch.Tensor | Scaled) -> None:
    """Of rows that become codes a few fall to a code's other neighbour, each an eighth away at most."""
    if not rows_too(gate_up):
        check("expert_ffn", got, exact)
    elif len(got):
        error = relative_error(got, exact)
        assert error < ROWS_TOO, f"expert_ffn with rows that become codes: {error:.2e}"


ROWS_TOO = 3e-2


def rows_too(gate_up: torch.Tensor | Scaled) -> bool:
    return isinstance(gate_up, Scaled) and isinstance(gate_up.format, Fp8) and gate_up.format.rows_too


def exact_expert(
    rows: torch.Tensor,
    slot: int,
    gate_up: torch.Tensor | Scaled,
    down: torch.Tensor | Scaled,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: Clamped | None = None,
) -> torch.Tensor:
    """In float64; what is between the two products, too."""
    if not len(rows):
        return rows.double()
    hidden = rows.shape[1]
    inner = gate_up.codes.shape[1] // 2 if isinstance(gate_up, Scaled) else gate_up.shape[2] // 2
    coded = plain_kernels.coded_rows if rows_too(gate_up) else torch.Tensor.double
    both = coded(rows.double()) @ _matrix(gate_up, slot, [(inner, hidden)] * 2)
    of_both, of_down = (one[slot].double() for one in biases) if biases else (0.0, 0.0)
    between = plain_kernels.activated(both + of_both, activation)
    return coded(between) @ _matrix(down, slot, [(hidden, inner)]) + of_down


def _matrix(of: torch.Tensor | Scaled, slot: int, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """[in, out]"""
    return of[slot].double() if isinstance(of, torch.Tensor) else matrix(of, slot, pieces)


@contextmanager
def checked(inputs: StepInputs) -> Iterator[Counter[str]]:
    """Of a runner whose step inputs these are; gives the calls, by name."""
    stands = Checked(inputs)
    names = [name for name, of in vars(Checked).items() if callable(of) and not name.startswith("_")]

    def replaced(name: str) -> Kernel:
        kernel, compare = getattr(ops, name), getattr(stands, name)

        def call(*arguments: Any, **others: Any) -> Any:
            stands.calls[name] += 1
            return compare(kernel, *arguments, **others)

        return call

    stand_ins: dict[str, Any] = {name: replaced(name) for name in names}
    with mock.patch.multiple(ops, **stand_ins):
        yield stands.calls
