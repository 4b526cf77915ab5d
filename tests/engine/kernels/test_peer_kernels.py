"""The kernels of the exchange through peers' memory: several ranks of one process, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from elastic_ep.exchange.peer_kernels import Ends, Layout

SLOTS, TOKENS, HIDDEN, TOP_K, LAYERS = 4, 5, 40, 3, 2
LIMIT_NS = 10**9


class Block:
    """A rank's memory."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        held = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        self.address = held.data_ptr()
        self.rows = held[: layout.words_at].view(torch.bfloat16)
        self.rows = self.rows.view(layout.slots, layout.ranks, layout.tokens, layout.hidden)
        self.words = held[layout.words_at : layout.ready_at].view(torch.int64)
        self.words = self.words.view(layout.slots, layout.ranks)
        self.ready = held[layout.ready_at :].view(torch.int64)


@dataclass
class Tokens:
    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, ranks: int, count: int, device: torch.device) -> Tokens:
        """Of whole numbers, so that products and sums are exact."""
        chosen = torch.rand(count, SLOTS * ranks).topk(TOP_K).indices
        chosen[torch.rand(count, TOP_K) < 0.1] = -1
        x = torch.randint(-4, 5, (count, HIDDEN)).bfloat16()
        return cls(x.to(device), chosen.to(device), torch.randint(0, 3, (count, TOP_K)).float().to(device))

    def expected(self, dead: frozenset[int]) -> torch.Tensor:
        total = torch.zeros(self.x.shape, device=self.x.device)
        for k in range(TOP_K):
            expert = self.chosen[:, k]
            gone = torch.zeros_like(expert, dtype=torch.bool)
            for rank in dead:
                gone |= expert // SLOTS == rank
            weight = torch.where((expert >= 0) & ~gone, self.weights[:, k], 0.0)
            total += weight[:, None] * (self.x.float() * (1 + expert[:, None]))
        return total.bfloat16()


@dataclass
class Group:
    ranks: int
    device: torch.device
    dead: frozenset[int] = frozenset()
    blocks: list[Block] = field(init=False)
    ends: dict[int, Ends] = field(init=False)

    def __post_init__(self) -> None:
        layout = Layout(SLOTS, self.ranks, TOKENS, HIDDEN)
        self.blocks = [Block(layout, self.device) for _ in range(self.ranks)]
        self.ends = {}
        for rank, block in enumerate(self.blocks):
            if rank in self.dead:
                continue
            end = Ends(layout, rank, TOP_K, LAYERS, block.rows, block.words, block.ready)
            for other, theirs in enumerate(self.blocks):
                if other not in self.dead:
                    end.admit(other, theirs.address - block.address)
            self.ends[rank] = end

    def layer(self, step: int, operation: int, tokens: list[Tokens]) -> dict[int, torch.Tensor]:
        """Every expert multiplies by its number and one; all ranks do each part of it before any does the next."""
        for rank, end in self.ends.items():
            end.begin_step(step)
            end.send(tokens[rank].x, tokens[rank].chosen, operation)
        counts = {rank: end.arrive(operation, LIMIT_NS) for rank, end in self.ends.items()}
        for rank, end in self.ends.items():
            factor = 1 + rank * SLOTS + torch.arange(SLOTS, device=self.device)
            here = torch.arange(TOKENS, device=self.device) < counts[rank][:, :, None]
            rows = self.blocks[rank].rows
            rows.copy_(torch.where(here[..., None], rows * factor[:, None, None, None], float("nan")))
            end.say_ready(operation)
        return {
            rank: end.fetch(tokens[rank].chosen, tokens[rank].weights, operation, LIMIT_NS)
            for rank, end in self.ends.items()
        }


@pytest.mark.parametrize(("ranks", "dead"), [(1, ()), (3, ()), (3, (1,))])
def test_rows_come_back_from_the_experts_that_they_went_to(
    device: torch.device, ranks: int, dead: tuple[int, ...]
) -> None:
    """Step by step, with more rows and fewer, and some that go nowhere or to a rank that is masked."""
    group = Group(ranks, device, frozenset(dead))
    for step, count in enumerate((TOKENS, 1, 0, TOKENS)):
        for operation in range(LAYERS):
            tokens = [Tokens.random(ranks, count, device) for _ in range(ranks)]
            for rank, y in group.layer(step, operation, tokens).items():
                assert torch.equal(y, tokens[rank].expected(group.dead)), (step, operation, rank)


def test_who_does_not_come_in_time_is_masked(device: torch.device) -> None:
    """By the kernel that waits, which then goes on: the host reads the mask."""
    group = Group(2, device)
    tokens = Tokens.random(2, TOKENS, device)
    end = group.ends[0]
    end.begin_step(0)
    end.send(tokens.x, tokens.chosen, 0)
    counts = end.arrive(0, -1)
    assert end.masks.tolist() == [0, 1]
    assert not counts[:, 1].any()


def test_what_the_host_masks_in_mid_step_is_not_waited_for(device: torch.device) -> None:
    group = Group(2, device)
    tokens = Tokens.random(2, TOKENS, device)
    end = group.ends[0]
    end.begin_step(0)
    end.send(tokens.x, tokens.chosen, 0)
    end.mask(1)
    end.arrive(0, 10**12)
    assert end.masks.tolist() == [0, 1]
