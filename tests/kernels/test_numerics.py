"""Every implementation of every op that runs here gives what the reference gives in float64."""

from __future__ import annotations

import pytest
import torch

from tokenspeed.kernels.numerics.case import poisoned, worst_error
from tokenspeed.kernels.numerics.suite import CASES, TOLERANCE, Trial, devices, trials
from tokenspeed.kernels.registry import OPS
from tokenspeed.kernels.selection import default


@pytest.mark.parametrize("trial", list(trials(default(), devices())), ids=str)
def test_agrees_with_the_reference_in_float64(trial: Trial) -> None:
    error = trial.error()
    assert error < trial.tolerance, f"relative error {error:.2e}, allowed {trial.tolerance:.0e}"


def test_every_op_has_cases() -> None:
    assert set(CASES) == set(OPS)


def test_poison_is_seen() -> None:
    with poisoned():
        assert worst_error(torch.empty(2, 3), torch.ones(2, 3)) == float("inf")


def test_one_wrong_token_among_many_is_seen() -> None:
    right = torch.randn(500, 64)
    wrong = right.clone()
    wrong[499, 3] += 0.01
    assert worst_error(wrong, right) > TOLERANCE[torch.float32]
