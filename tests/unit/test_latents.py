"""Tokens, position ids and noise."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import pack_2x2, unpack_2x2
from flux2_kit.flux2_core.latents import (
    MAX_SEED,
    image_ids,
    latents_to_tokens,
    reference_tokens,
    seed_noise,
    text_ids,
    tokens_to_latents,
)


def test_tokens_run_row_by_row():
    latents = torch.arange(2 * 3 * 4).view(1, 2, 3, 4)
    tokens = latents_to_tokens(latents)
    assert tokens.shape == (1, 12, 2)
    assert torch.equal(tokens[0, 5], latents[0, :, 1, 1])


def test_tokens_come_back_as_latents():
    latents = torch.randn(2, 128, 3, 5)
    assert torch.equal(tokens_to_latents(latents_to_tokens(latents), 3, 5), latents)


def test_packed_channels_are_ordered_channel_row_column():
    z = torch.randn(1, 32, 4, 6)
    packed = pack_2x2(z)
    assert packed.shape == (1, 128, 2, 3)
    assert torch.equal(packed[0, 4 * 7 + 2 * 1 + 0, 1, 2], z[0, 7, 2 * 1 + 1, 2 * 2 + 0])
    assert torch.equal(unpack_2x2(packed), z)


def test_image_positions_are_time_row_column():
    assert image_ids(2, 3, time=20).tolist() == [
        [20, 0, 0, 0],
        [20, 0, 1, 0],
        [20, 0, 2, 0],
        [20, 1, 0, 0],
        [20, 1, 1, 0],
        [20, 1, 2, 0],
    ]


def test_text_positions_count_on_the_last_axis():
    assert text_ids(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


def test_references_sit_at_ten_twenty_thirty():
    tokens, ids = reference_tokens([torch.randn(2, 128, 1, 2), torch.randn(2, 128, 3, 1), torch.randn(2, 128, 1, 1)])
    assert tokens.shape == (2, 6, 128)
    assert ids[:, 0].tolist() == [10, 10, 20, 20, 20, 30]
    assert ids[2:5].tolist() == image_ids(3, 1, time=20).tolist()


def test_noise_of_a_batch_starts_with_the_noise_of_a_single_picture():
    batch = seed_noise(11, 3, 64, 80)
    assert batch.shape == (3, 128, 4, 5)
    assert batch.dtype == torch.float32
    assert torch.equal(seed_noise(11, 1, 64, 80), batch[:1])
    assert torch.equal(seed_noise(11, 2, 64, 80), batch[:2])


def test_noise_is_the_documented_draw():
    drawn = torch.randn([2, 128, 4, 4], generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(seed_noise(3, 2, 64, 64), drawn)


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    seed_noise(3, 1, 64, 64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, MAX_SEED])
def test_the_whole_range_of_seeds_gives_noise_of_its_own(seed):
    assert not torch.equal(seed_noise(seed, 1, 64, 64), seed_noise(seed - 1, 1, 64, 64))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"the seed is {seed}; it must lie in 0..{MAX_SEED}"):
        seed_noise(seed, 1, 64, 64)
