"""What a forward pass is given belongs together row by row, and its loss counts what it is to count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.variants import get_variant
from flux2_kit.training.batches import Draw
from flux2_kit.training.cache import Sample
from flux2_kit.training.config import TrainConfig
from flux2_kit.training.flow_matching import velocity_losses
from flux2_kit.training.loader import by_shape
from flux2_kit.training.timesteps import TimestepConfig, loss_weights, sigmas_from_uniform, uniform_numbers
from flux2_kit.training.train_batch import BatchMaker, TrainBatch

TINY = get_variant("tiny")
HEIGHT, WIDTH = 2, 3
REFERENCE_SIZES = ((2, 2), (3, 1))


def make_sample(number: int, num_references: int = 2) -> Sample:
    """A sample whose every tensor tells its number, and whose references tell their place."""
    return Sample(
        latents=torch.full((128, HEIGHT, WIDTH), float(number)),
        references=tuple(
            torch.full((128, *size), number + place / 10)
            for place, size in enumerate(REFERENCE_SIZES[:num_references], start=1)
        ),
        text=torch.full((5, 48), float(number)),
        mask=None,
    )


def make_batch(draws: Sequence[tuple[int, Sample]], seed: int = 3, **timesteps) -> TrainBatch:
    config = TrainConfig(seed=seed, timesteps=TimestepConfig(**timesteps))
    return BatchMaker(config, TINY, pinned=False)([(Draw(item=0, index=index), sample) for index, sample in draws])


def test_row_by_row_everything_is_of_one_sample_and_references_keep_their_order():
    batch = make_batch([(index, make_sample(index)) for index in (4, 7, 5)])
    for row, number in enumerate((4, 7, 5)):
        for tensor in (batch.latents, batch.text):
            assert (tensor[row] == number).all()
        assert [reference[row].unique().item() for reference in batch.references] == pytest.approx(
            [number + 0.1, number + 0.2]
        )
    assert [reference.shape[2:] for reference in batch.references] == [*REFERENCE_SIZES]


def test_noise_and_its_level_follow_from_the_seed_and_the_number_of_the_draw_alone():
    several = make_batch([(index, make_sample(1)) for index in (4, 7, 5)])
    alone = make_batch([(7, make_sample(2))])
    assert torch.equal(several.noise[1], alone.noise[0]) and several.sigma[1] == alone.sigma[0]
    assert len({row.sum().item() for row in several.noise}) == 3 and len(set(several.sigma.tolist())) == 3
    assert not torch.equal(make_batch([(7, make_sample(2))], seed=4).noise, alone.noise)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_sampling": "uniform"},
        {"timestep_sampling": "shift", "discrete_flow_shift": 3.0, "num_timestep_buckets": 4},
        {"weighting_scheme": "cosmap"},
        {"weighting_scheme": "sigma_sqrt"},
    ],
    ids=str,
)
def test_noise_levels_and_weights_are_those_of_the_settings(settings):
    config = TimestepConfig(**settings)
    batch = make_batch([(index, make_sample(index)) for index in (4, 7, 5)], **settings)
    uniform = uniform_numbers([4, 7, 5], seed=3, num_strata=config.num_timestep_buckets)
    assert torch.equal(batch.sigma, sigmas_from_uniform(uniform, HEIGHT * WIDTH, config, TINY.num_steps))
    assert torch.equal(batch.weights, loss_weights(batch.sigma, config))
    assert len(set(batch.weights.tolist())) == (3 if "weighting_scheme" in settings else 1)


def test_samples_without_a_mask_beside_ones_with_it_count_whole():
    mask = torch.rand(HEIGHT, WIDTH)
    batch = make_batch([(0, make_sample(0)), (1, replace(make_sample(1), mask=mask))])
    assert batch.mask is not None
    assert torch.equal(batch.mask, torch.stack((torch.ones(HEIGHT, WIDTH), mask)))
    assert make_batch([(0, make_sample(0))]).mask is None


def test_samples_are_parted_by_their_references():
    samples = [make_sample(number, num_references) for number, num_references in enumerate((2, 0, 2, 1, 0))]
    groups = by_shape([(Draw(item=index, index=index), sample) for index, sample in enumerate(samples)])
    assert [[draw.index for draw, _ in group] for group in groups] == [[0, 2], [1, 4], [3]]
    assert all(samples[draw.index] is sample for group in groups for draw, sample in group)


# The loss


def make_dit() -> Flux2DiT:
    generator = torch.Generator().manual_seed(0)
    dit = Flux2DiT(
        DiTConfig(
            hidden_size=32,
            num_heads=1,
            num_double_blocks=1,
            num_single_blocks=1,
            context_dim=48,
            has_guidance_embedder=False,
            rope_axes=(8, 8, 8, 8),
        )
    )
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return dit.requires_grad_(False)


def losses(mask: torch.Tensor | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(2, 128, HEIGHT, WIDTH, generator=generator) for _ in range(2))
    text = torch.randn(2, 5, 48, generator=generator)
    return velocity_losses(make_dit(), latents, text, noise, torch.tensor([0.3, 0.8]), mask=mask)


def test_a_mask_weighs_the_error_of_each_place():
    places = HEIGHT * WIDTH
    alone = torch.stack(
        [losses(torch.eye(places)[place].view(1, HEIGHT, WIDTH).expand(2, -1, -1)) for place in range(places)], dim=1
    )
    assert (alone.std(dim=1) > 0.01).all(), "places differ, or this would show nothing"
    mask = torch.rand(2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    weights = mask.flatten(1)
    torch.testing.assert_close(losses(mask), (alone * weights).sum(dim=1) / weights.sum(dim=1))
    torch.testing.assert_close(losses(None), alone.mean(dim=1))
    torch.testing.assert_close(losses(0.01 * mask), losses(mask), msg="a faint mask trains as fast")
    assert torch.equal(losses(torch.zeros_like(mask)), torch.zeros(2))
