from __future__ import annotations

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels.gate import gate
from elastic_ep.models.spec import Gate, GroupScores, Scores
from tests.engine.kernels.errors import check
from tests.kit import plain_kernels

DTYPES = [torch.bfloat16, torch.float32]


def table(experts: int, device: torch.device) -> torch.Tensor:
    """Each expert's copy lies somewhere else; every seventh has none."""
    physical = torch.randperm(2 * experts, device=device)[:experts]
    physical[::7] = -1
    return physical


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 1, 1), (5, 6, 2), (3, 37, 3), (9, 128, 8), (2, 256, 5)]
)
def test_is_the_reference(
    device: torch.device, dtype: torch.dtype, renormalise: bool, tokens: int, experts: int, top_k: int
) -> None:
    # Distinct in bfloat16 too: among equals any choice would be right, and the reference's is not the kernel's.
    logits = torch.stack([torch.randperm(experts, device=device) for _ in range(tokens)]).to(dtype) / 32
    physical_of = table(experts, device)
    physical, weights = gate(logits, physical_of, top_k, renormalise=renormalise)
    expected, exact = plain_kernels.gate(logits.double(), physical_of, top_k, renormalise=renormalise)
    assert torch.equal(physical, expected)
    assert weights.dtype == torch.float32
    check("gate", weights, exact)


KINDS = [
    Gate(Scores.SOFTMAX_OF_CHOSEN),
    Gate(Scores.SIGMOID, correction=True, added_to_sum=1e-20, factor=2.5),
    Gate(Scores.SIGMOID, correction=True, groups=8, top_groups=4, added_to_sum=1e-20, factor=2.5),
    Gate(groups=8, top_groups=3, group_scores=GroupScores.HIGHEST, factor=16.0),
    Gate(correction=True, groups=8, top_groups=1, group_scores=GroupScores.HIGHEST),
    Gate(correction=True, least_sum=0.9),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("experts", "top_k", "renormalise"), [(40, 6, True), (160, 8, False), (384, 8, True)]
)
def test_other_kinds_are_the_reference(
    device: torch.device, kind: Gate, experts: int, top_k: int, renormalise: bool
) -> None:
    logits, physical_of = torch.randn(5, experts, device=device) * 2, table(experts, device)
    correction = torch.randn(experts, device=device) / 4 if kind.correction else None
    wide = None if correction is None else correction.double()
    physical, weights = gate(
        logits, physical_of, top_k, renormalise=renormalise, kind=kind, correction=correction
    )
    expected, exact = plain_kernels.gate(
        logits.double(), physical_of, top_k, renormalise=renormalise, kind=kind, correction=wide
    )
    assert torch.equal(physical, expected)
    check("gate", weights, exact)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_garbage_in_groups_still_names_experts(device: torch.device, kind: Gate, garbage: float) -> None:
    logits, correction = torch.full((2, 64), garbage, device=device), torch.randn(64, device=device)
    logits[1, ::2] = 0
    said = correction if kind.correction else None
    physical, weights = gate(
        logits, torch.arange(64, device=device), 8, renormalise=True, kind=kind, correction=said
    )
    assert all(len(set(row)) == 8 for row in physical.tolist())
    assert (physical >= 0).all()
    assert weights.isfinite().all()


def test_rows_from_num_tokens_on_are_padding(device: torch.device) -> None:
    logits, physical_of = torch.randn(6, 20, device=device), torch.arange(20, device=device)
    whole, _ = gate(logits, physical_of, 4, renormalise=True)
    for real in (0, 1, 6):
        limit = torch.tensor([real], dtype=torch.int32, device=device)
        physical, weights = gate(logits, physical_of, 4, renormalise=True, num_tokens=limit)
        assert torch.equal(physical[:real], whole[:real])
        assert (physical[real:] == -1).all()
        assert (weights[real:] == 0).all()


def test_of_equals_the_lower_expert(device: torch.device) -> None:
    physical, weights = gate(
        torch.zeros(2, 48, device=device), torch.arange(48, device=device), 3, renormalise=True
    )
    assert physical.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("experts", [12, 64])
def test_a_row_of_garbage_still_names_experts(device: torch.device, experts: int, garbage: float) -> None:
    logits = torch.full((1, experts), garbage, device=device)
    physical, weights = gate(logits, torch.arange(experts, device=device), 8, renormalise=True)
    assert set(physical[0].tolist()) == set(range(8))
    assert torch.allclose(weights, torch.full_like(weights, 1 / 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_know_its_batch(device: torch.device, dtype: torch.dtype) -> None:
    logits, physical_of = torch.randn(12, 100, device=device).to(dtype), torch.arange(100, device=device)
    physical, weights = gate(logits, physical_of, 8, renormalise=True)
    for part in (slice(0, 1), slice(5, 8)):
        alone, its_weights = gate(logits[part], physical_of, 8, renormalise=True)
        assert torch.equal(alone, physical[part])
        assert torch.equal(its_weights, weights[part])


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide, physical_of = torch.randn(4, 40, device=device), torch.arange(24, device=device)
    got = gate(wide[:, :24], physical_of, 2, renormalise=False)
    expected = gate(wide[:, :24].contiguous(), physical_of, 2, renormalise=False)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(("experts", "top_k"), [(513, 2), (16, 9), (4, 5), (8, 0)])
def test_refuses_what_it_has_no_kernel_for(device: torch.device, experts: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="no kernel"):
        gate(
            torch.zeros(1, experts, device=device),
            torch.zeros(experts, dtype=torch.int64),
            top_k,
            renormalise=True,
        )
