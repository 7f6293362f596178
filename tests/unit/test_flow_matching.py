"""The flow matching formulas, among themselves and against the inference schedule."""

from __future__ import annotations

import torch
from flux2_kit.flux2_core.schedule import shift_sigmas, sigma_schedule
from flux2_kit.training.flow_matching import add_noise, velocity_target

LATENTS, NOISE = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)


def test_sigma_zero_is_clean_and_sigma_one_is_noise():
    assert torch.equal(add_noise(LATENTS, NOISE, torch.zeros(3)), LATENTS)
    assert torch.equal(add_noise(LATENTS, NOISE, torch.ones(3)), NOISE)


def test_every_row_has_a_sigma_of_its_own():
    noisy = add_noise(LATENTS, NOISE, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(noisy[0], LATENTS[0])
    torch.testing.assert_close(noisy[1], 0.75 * LATENTS[1] + 0.25 * NOISE[1])
    assert torch.equal(noisy[2], NOISE[2])


def test_tokens_are_noised_like_latents():
    sigma = torch.tensor([0.3, 0.6, 0.9])
    noisy = add_noise(LATENTS.flatten(2), NOISE.flatten(2), sigma)
    assert torch.equal(noisy, add_noise(LATENTS, NOISE, sigma).flatten(2))


def test_target_is_the_derivative_by_sigma():
    low, high = (add_noise(LATENTS.double(), NOISE.double(), torch.full((3,), sigma)) for sigma in (0.25, 0.5))
    torch.testing.assert_close((high - low) / 0.25, velocity_target(LATENTS, NOISE).double())


def test_a_perfect_prediction_leads_back_to_the_clean_latents():
    noisy = add_noise(LATENTS, NOISE, torch.full((3,), 0.7))
    torch.testing.assert_close(noisy - 0.7 * velocity_target(LATENTS, NOISE), LATENTS, rtol=1e-4, atol=1e-5)


def test_shifted_sigmas_follow_the_inference_schedule():
    uniform = torch.linspace(1, 0, 9, dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(uniform, 5.0), sigma_schedule(8, 1024, flow_shift=5.0))
    torch.testing.assert_close(shift_sigmas(uniform, 5.0), 5 * uniform / (1 + 4 * uniform))
