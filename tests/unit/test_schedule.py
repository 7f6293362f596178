"""Sigma schedules against figures published for the reference implementation."""

from __future__ import annotations

import math

import pytest
import torch
from flux2_kit.flux2_core.schedule import MAX_INTERPOLATED_TOKENS, empirical_mu, sigma_schedule


@pytest.mark.parametrize(
    ("num_steps", "num_tokens", "mu"),
    [
        (4, 1024, 2.0307),
        (4, 4096, 2.2912),
        (28, 4096, 2.1514),
        (50, 4096, 2.0234),
        (4, 8160, 1.8379),
        (50, 8160, 1.8379),
    ],
)
def test_empirical_mu(num_steps, num_tokens, mu):
    assert empirical_mu(num_tokens, num_steps) == pytest.approx(mu, abs=5e-5)


def test_mu_jumps_above_4300_tokens():
    assert MAX_INTERPOLATED_TOKENS == 4300
    assert empirical_mu(4300, 4) == pytest.approx(2.3085, abs=5e-5)
    assert empirical_mu(4301, 4) == pytest.approx(1.1847, abs=5e-5)
    assert empirical_mu(4300, 50) == pytest.approx(2.0447, abs=5e-5)
    assert empirical_mu(4301, 50) == pytest.approx(1.1847, abs=5e-5)


@pytest.mark.parametrize(
    ("num_tokens", "sigmas"),
    [(1024, [1, 0.9581, 0.8840, 0.7175, 0]), (4096, [1, 0.9674, 0.9081, 0.7672, 0])],
)
def test_sigmas_of_four_steps(num_tokens, sigmas):
    assert sigma_schedule(4, num_tokens).tolist() == pytest.approx(sigmas, abs=5e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 50, 1000])
@pytest.mark.parametrize("num_tokens", [16, 4096, 65536])
def test_sigmas_fall_from_exactly_one_to_exactly_zero(num_tokens, num_steps):
    sigmas = sigma_schedule(num_steps, num_tokens)
    assert sigmas.shape == (num_steps + 1,)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


def test_flow_shift_replaces_the_empirical_shift():
    assert sigma_schedule(2, 1024, flow_shift=3.0).tolist() == pytest.approx([1, 0.75, 0])
    same = sigma_schedule(8, 1024, flow_shift=math.exp(empirical_mu(1024, 8)))
    assert torch.equal(same, sigma_schedule(8, 1024))


def test_flow_shift_one_leaves_sigmas_linear():
    assert sigma_schedule(4, 1024, flow_shift=1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("num_steps", [0, -3])
def test_fewer_than_one_step_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"number of steps is {num_steps}; it must be at least 1"):
        sigma_schedule(num_steps, 1024)


@pytest.mark.parametrize("flow_shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_flow_shift_that_is_no_positive_number_is_refused(flow_shift):
    with pytest.raises(ValueError, match=r"flow_shift is .*; it must be a number above 0"):
        sigma_schedule(4, 1024, flow_shift=flow_shift)


@pytest.mark.parametrize(
    ("num_steps", "strength", "num_all"), [(10, 0.5, 20), (20, 0.6, 33), (4, 1.0, 4), (3, 0.01, 300)]
)
def test_strength_takes_the_last_steps_of_a_longer_schedule_of_the_same_shift(num_steps, strength, num_all):
    shift = math.exp(empirical_mu(1024, num_steps))
    whole = sigma_schedule(num_all, 1024, flow_shift=shift)
    last = sigma_schedule(num_steps, 1024, strength=strength)
    torch.testing.assert_close(last, whole[-num_steps - 1 :], rtol=1e-12, atol=0)
    assert len(last) == num_steps + 1 and last[-1] == 0 and (last[0] == 1) == (strength == 1)


@pytest.mark.parametrize("strength", [0.0, 0.009, 1.1, float("nan")])
def test_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"must lie in 0\.01\.\.1"):
        sigma_schedule(4, 1024, strength=strength)
