"""Ranks on a processor use nothing of torch that the fork server has put off: each would import it for itself."""

from __future__ import annotations

import sys

from tests.kit.bound import run


def test_what_is_put_off_comes_when_it_is_used() -> None:
    script = """
from elastic_ep import lean_torch
import torch
off = lean_torch.put_off()
assert set(off) == set(lean_torch.PUT_OFF), off
x = torch.softmax(torch.randn(3, 4) @ torch.randn(4, 5).to(torch.bfloat16).float(), -1)
with torch.inference_mode():
    torch.topk(torch.sort(x).values, 2)[0].sum().item()
assert lean_torch.put_off() == off, "no tensor needs any of it"
assert torch.distributions.Normal(0.0, 1.0).sample().shape == ()
assert "torch.distributions" not in lean_torch.put_off()
torch.rand(2, generator=torch.Generator().manual_seed(1))
import elastic_ep.whole_torch
assert lean_torch.put_off() == []
assert torch.optim.SGD([torch.nn.Parameter(x)], lr=0.1)
"""
    done = run([sys.executable, "-c", script], 60)
    assert done.returncode == 0, done.stderr
