"""A mixture of experts as a decode step runs it."""

from __future__ import annotations

import pytest
import torch

from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import MoE, Routing
from tokenspeed.layers.norm import RMSNorm

HIDDEN, EXPERTS = 64, 4


@pytest.fixture
def moe() -> MoE:
    """Token i of the identity is at home with expert i mod 4; experts 2 and 3 and what they would give are NaN."""
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=8, block_size=16)
    made = MoE(ctx, HIDDEN, 64, Routing(num_experts=EXPERTS, top_k=1, num_shared=1))
    with torch.no_grad():
        made.gate.weight.copy_(10 * torch.eye(EXPERTS).repeat(1, HIDDEN // EXPERTS))
        for weight in (made.experts.gate_up, made.experts.down):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 8)
            weight[2:4] = torch.nan
    return made


def norm() -> RMSNorm:
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=8, block_size=16)
    made = RMSNorm(ctx, HIDDEN, 1e-6)
    with torch.no_grad():
        made.weight.fill_(1)
    return made


def test_padding_rows_of_a_decode_step_read_no_expert(moe: MoE) -> None:
    x = torch.eye(EXPERTS, HIDDEN)
    with torch.inference_mode():
        whole, _ = moe.decode(x, norm(), None, None)
        padded, residual = moe.decode(x, norm(), None, torch.tensor([2], dtype=torch.int32))
    assert whole[2:].isnan().all()
    torch.testing.assert_close(padded[:2], whole[:2])
    assert padded[:2].isfinite().all() and not padded[2:].any()
    assert residual is not None and torch.equal(residual, x)


def test_a_decode_step_gives_what_any_other_gives(moe: MoE) -> None:
    x, before = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for weight in (moe.experts.gate_up, moe.experts.down):
            weight.nan_to_num_(0.1)
    with torch.inference_mode():
        gives, residual = moe.decode(x, norm(), before, None)
        normed, total = norm()(x, before)
        torch.testing.assert_close(gives, moe(normed))
        torch.testing.assert_close(residual, total)
