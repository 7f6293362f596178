"""Noise levels: every density against its defining formula, strata, weights, and what may not be asked for."""

from __future__ import annotations

import math

import pytest
import torch
from flux2_kit.flux2_core.schedule import empirical_mu, shift_sigmas, sigma_schedule
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.training.timesteps import (
    MAX_MODE_SCALE,
    TimestepConfig,
    loss_weights,
    noise_generator,
    schedule_steps,
    sigmas_from_uniform,
    uniform_numbers,
)
from torch import Tensor

NUM_DRAWS = 400_000
KOLMOGOROV_LIMIT = 2.0 / math.sqrt(NUM_DRAWS)
"""Of NUM_DRAWS right draws one set in 1500 has a larger distance."""
FIRST_NUMBERS = [0.6036957934847901, 0.26478283516575984, 0.7384528324350358]
FIRST_STRATA = [0, 2, 1, 3]
"""Of seed 42: other numbers would make a resumed run differ from the one before."""
GRID = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)


def sigmas(u: Tensor, num_tokens: Tensor | int = 1024, num_steps: int = 50, **settings) -> Tensor:
    return sigmas_from_uniform(u, num_tokens, TimestepConfig(**settings), num_steps)


def normal(seed: int = 0) -> Tensor:
    return torch.randn(NUM_DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int = 0) -> Tensor:
    return torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_quantiles_of(draws: Tensor, quantiles: Tensor, u: Tensor = GRID) -> None:
    """Kolmogorov-Smirnov: the share of draws below quantile(u) is u."""
    shares = torch.searchsorted(draws.sort().values, quantiles.double()) / len(draws)
    distance = (shares - u).abs().max().item()
    assert distance < KOLMOGOROV_LIMIT * math.sqrt(NUM_DRAWS / len(draws))


def mode(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


DEFINITIONS = {
    "uniform": ({}, uniform),
    "sigmoid": ({"sigmoid_scale": 1.7}, lambda: (1.7 * normal()).sigmoid()),
    "shift": (
        {"sigmoid_scale": 0.8, "discrete_flow_shift": 3.1},
        lambda: shift_sigmas((0.8 * normal()).sigmoid(), 3.1),
    ),
    "flux2_shift": (
        {"sigmoid_scale": 1.2},
        lambda: shift_sigmas((1.2 * normal()).sigmoid(), math.exp(0.63)),  # 1024 tokens: 0.5 + 768 / 3840 * 0.65
    ),
    "flux2": ({}, lambda: shift_sigmas(uniform(), math.exp(empirical_mu(1024, 50)))),
    "logit_normal": ({"logit_mean": -0.6, "logit_std": 1.4}, lambda: (1.4 * normal() - 0.6).sigmoid()),
    "logsnr": ({"logit_mean": 1.1, "logit_std": 2.0}, lambda: (-(1.1 + 2 * normal()) / 2).sigmoid()),
    "mode": ({"mode_scale": 0.9}, lambda: mode(uniform(), 0.9)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_density_is_that_of_its_formula(name):
    settings, draw = DEFINITIONS[name]
    assert_quantiles_of(draw(), sigmas(GRID, timestep_sampling=name, **settings))


SIGMA_DEFINITIONS = {
    "none": ({}, uniform),
    "cosmap": ({}, uniform),
    "logit_normal": ({"logit_mean": 0.7, "logit_std": 0.9}, lambda: (0.9 * normal() + 0.7).sigmoid()),
    "mode": ({"mode_scale": 0.9}, lambda: mode(uniform(), 0.9)),
}


@pytest.mark.parametrize("weighting", SIGMA_DEFINITIONS)
def test_sigma_looks_up_a_shifted_schedule_as_musubi_does(weighting):
    settings, draw = SIGMA_DEFINITIONS[weighting]
    schedule = sigma_schedule(1000, 1, flow_shift=2.5)[:-1]
    draws = schedule[(draw() * 1000).long()]
    found = sigmas(
        GRID, timestep_sampling="sigma", weighting_scheme=weighting, discrete_flow_shift=2.5, **settings
    ).double()
    # Levels of the schedule lie within 1/1000 of u from the continuous ones.
    shares = torch.searchsorted(draws.sort().values, found) / NUM_DRAWS
    assert (shares - GRID).abs().max() < KOLMOGOROV_LIMIT + 2.5e-3


@pytest.mark.parametrize("num_tokens", [16, 1024, 4096, 4300, 4301, 9216])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_flux2_has_the_samplers_own_schedule_as_quantiles(num_tokens, num_steps):
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[1:-1]
    expected = sigma_schedule(num_steps, num_tokens)[1:-1]
    found = sigmas(u, num_tokens, num_steps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=0)


def test_every_sample_has_the_density_of_its_own_size():
    u = torch.full((3,), 0.5, dtype=torch.float64)
    for sampling in ("flux2", "flux2_shift"):
        together = sigmas(u, torch.tensor([256, 1024, 4096]), timestep_sampling=sampling)
        alone = [sigmas(u[:1], tokens, timestep_sampling=sampling).item() for tokens in (256, 1024, 4096)]
        assert together.tolist() == alone
        assert alone[0] < alone[1] < alone[2]
    assert alone[0] == pytest.approx(1 / (1 + math.exp(-0.5))) and alone[2] == pytest.approx(1 / (1 + math.exp(-1.15)))


@pytest.mark.parametrize("name", [*DEFINITIONS, "sigma"])
@pytest.mark.parametrize("bounds", [{}, {"min_sigma": 0.3, "max_sigma": 0.8}])
def test_sigmas_rise_with_u_and_stay_within_the_bounds(name, bounds):
    u = torch.cat((torch.tensor([2**-53], dtype=torch.float64), GRID, torch.tensor([1 - 2**-53], dtype=torch.float64)))
    for shape in {False, bool(bounds)}:
        found = sigmas(u, timestep_sampling=name, preserve_distribution_shape=shape, **bounds)
        assert found.dtype == torch.float32 and found.shape == u.shape
        assert bool((found.diff() >= 0).all()) and bool((found[1:-1].diff() > 0).all())
        assert found[0] >= bounds.get("min_sigma", 0) - 1e-7 and found[-1] <= bounds.get("max_sigma", 1) + 1e-7


@pytest.mark.parametrize("name", DEFINITIONS)
def test_bounds_squeeze_the_density_or_cut_it(name):
    settings, draw = DEFINITIONS[name]
    bounds = {"min_sigma": 0.35, "max_sigma": 0.9}
    whole = draw()
    squeezed = sigmas(GRID, timestep_sampling=name, **settings, **bounds)
    assert_quantiles_of(0.35 + 0.55 * whole, squeezed)
    cut = sigmas(GRID, timestep_sampling=name, preserve_distribution_shape=True, **settings, **bounds)
    assert_quantiles_of(whole[(whole >= 0.35) & (whole <= 0.9)], cut)


def test_one_bound_alone_cuts():
    found = sigmas(GRID, timestep_sampling="uniform", min_sigma=0.5, preserve_distribution_shape=True)
    torch.testing.assert_close(found.double(), 0.5 + 0.5 * GRID, rtol=1e-7, atol=0)


def test_bounds_where_the_density_has_nothing_are_refused():
    with pytest.raises(ValueError, match="practically no noise levels between"):
        sigmas(
            GRID,
            timestep_sampling="logit_normal",
            logit_mean=-5.0,
            logit_std=0.2,
            min_sigma=0.99,
            preserve_distribution_shape=True,
        )


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_weights_belong_to_each_sample_whatever_the_batch(batch):
    levels = torch.tensor([0.1, 0.5, 0.9, 0.25])
    expected = {
        "none": [1.0, 1.0, 1.0, 1.0],
        "sigma_sqrt": [100.0, 4.0, 1 / 0.81, 16.0],
        "cosmap": [2 / (math.pi * value) for value in (0.82, 0.5, 0.82, 0.625)],
    }
    for scheme, values in expected.items():
        config = TimestepConfig(weighting_scheme=scheme)  # type: ignore[arg-type]
        found = torch.cat([loss_weights(part, config) for part in levels.split(batch)])
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-6, atol=0)


def test_the_weight_of_low_noise_is_bounded():
    weights = loss_weights(torch.tensor([0.0, 1e-6, 0.05]), TimestepConfig(weighting_scheme="sigma_sqrt"))
    torch.testing.assert_close(weights, torch.full((3,), 400.0))


def test_a_density_of_the_sigma_sampling_is_no_weight():
    config = TimestepConfig(timestep_sampling="sigma", weighting_scheme="mode")
    assert loss_weights(torch.tensor([0.1, 0.9]), config).tolist() == [1, 1]


@pytest.mark.parametrize("num_strata", [2, 7, 64])
def test_each_stratum_is_hit_exactly_once_in_a_window(num_strata):
    u = uniform_numbers(range(5 * num_strata), seed=3, num_strata=num_strata)
    strata = (u * num_strata).long().view(5, num_strata)
    assert torch.equal(strata.sort(dim=1).values, torch.arange(num_strata).expand(5, num_strata))
    if num_strata == 64:
        assert len({tuple(window.tolist()) for window in strata}) == 5
        assert bool((strata.diff(dim=1).abs().float().mean(dim=1) > 10).all())


@pytest.mark.parametrize("num_strata", [None, 8])
def test_numbers_do_not_depend_on_how_draws_are_shared_out(num_strata):
    together = uniform_numbers(range(100, 164), seed=1, num_strata=num_strata)
    two_processes = [uniform_numbers(range(100 + rank, 164, 2), seed=1, num_strata=num_strata) for rank in (0, 1)]
    assert torch.equal(together[0::2], two_processes[0]) and torch.equal(together[1::2], two_processes[1])
    assert not bool((together == uniform_numbers(range(100, 164), seed=2, num_strata=num_strata)).any())


@pytest.mark.parametrize("num_strata", [None, 16])
def test_numbers_are_uniform_and_independent_of_their_neighbours(num_strata):
    u = uniform_numbers(range(20_000), seed=0, num_strata=num_strata)
    grid = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert_quantiles_of(u, grid, grid)
    pairs = torch.corrcoef(torch.stack((u[:-16], u[16:])))[0, 1]
    assert abs(pairs) < 0.03
    assert bool((u > 0).all()) and bool((u < 1).all())


def test_the_largest_number_stays_below_one(monkeypatch):
    from flux2_kit.training import timesteps

    for bits in (0, 2**64 - 1):
        monkeypatch.setattr(timesteps, "_mix", lambda *_, bits=bits: bits)
        for num_strata in (None, 2):
            u = uniform_numbers([0, 1], seed=0, num_strata=num_strata)
            assert bool((u > 0).all()) and bool((u < 1).all())


def test_numbers_stay_the_same_from_version_to_version():
    assert uniform_numbers([0, 1, 10**12], seed=42).tolist() == FIRST_NUMBERS
    assert uniform_numbers(range(4), seed=42, num_strata=4).mul(4).long().tolist() == FIRST_STRATA


def test_noise_is_of_one_seed_step_and_slot():
    def noise(*numbers: int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=noise_generator(*numbers)).tolist())

    assert noise(0, 1, 2) == noise(0, 1, 2)
    many = {noise(seed, step, slot) for seed in range(4) for step in range(10) for slot in range(10)}
    assert len(many) == 400
    assert noise(1, 23, 4) != noise(12, 3, 4)


def test_the_schedule_of_a_distilled_variant_is_that_of_its_base():
    assert [schedule_steps(VARIANTS[name]) for name in ("klein-4b", "klein-base-4b", "dev", "tiny")] == [50, 50, 50, 20]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"timestep_sampling": "flux_shift"}, "'flux_shift'; it must be one of flux2, flux2_shift"),
        ({"weighting_scheme": "cosine"}, "must be one of none, sigma_sqrt, cosmap"),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 0.0}, "discrete_flow_shift is 0.0; it must be a number"),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": float("nan")}, "sigmoid_scale is nan"),
        ({"timestep_sampling": "logsnr", "logit_std": -1.0}, "logit_std is -1.0"),
        ({"timestep_sampling": "logsnr", "logit_mean": float("inf")}, "logit_mean is inf"),
        ({"timestep_sampling": "mode", "mode_scale": 1.8}, "between -1 and 1.75194"),
        ({"min_sigma": 0.5, "max_sigma": 0.5}, "go from 0.5 to 0.5"),
        ({"max_sigma": 800.0}, "go from 0.0 to 800.0"),
        ({"num_timestep_buckets": 1}, "give 2 to 65536"),
        ({"discrete_flow_shift": 3.0}, "discrete_flow_shift is 3.0, which has no effect with timestep_sampling flux2"),
        ({"timestep_sampling": "uniform", "sigmoid_scale": 2.0}, "sigmoid_scale is 2.0, which has no effect"),
        ({"timestep_sampling": "sigma", "logit_mean": 1.0}, "logit_mean is 1.0, which has no effect"),
        ({"timestep_sampling": "logsnr", "mode_scale": 1.0}, "mode_scale is 1.0, which has no effect"),
        ({"preserve_distribution_shape": True}, "preserve_distribution_shape is True, which has no effect"),
        ({"weighting_scheme": "logit_normal"}, 'give timestep_sampling "logit_normal" or "sigma"'),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        TimestepConfig(**settings)


def test_the_ends_of_the_mode_scale_are_still_densities():
    for scale in (-1.0, MAX_MODE_SCALE):
        assert bool((sigmas(GRID, timestep_sampling="mode", mode_scale=scale).diff() >= 0).all())
    assert (mode(GRID, MAX_MODE_SCALE + 0.05).diff() > 0).any()
