"""The autoencoder's shapes and its tiling."""

from __future__ import annotations

import itertools

import pytest
import torch
from flux2_kit.flux2_core import autoencoder as autoencoder_module
from flux2_kit.flux2_core.autoencoder import (
    AutoencoderConfig,
    Flux2Autoencoder,
    blend_tiles,
    tile_starts,
)
from torch import Tensor

CONFIG = AutoencoderConfig(
    encoder_widths=(4, 4, 8, 8), decoder_widths=(4, 4, 8, 8), num_res_blocks=1, num_norm_groups=2
)


@pytest.fixture
def autoencoder() -> Flux2Autoencoder:
    torch.manual_seed(0)
    model = Flux2Autoencoder(CONFIG).eval()
    assert model.bn.running_mean is not None and model.bn.running_var is not None
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(autoencoder_module, "TILE_LATENTS", 6)
    monkeypatch.setattr(autoencoder_module, "TILE_OVERLAP_LATENTS", 2)


def random_images(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def test_sixteen_pixels_make_one_latent_position(autoencoder):
    latents = autoencoder.encode(random_images(48, 80))
    assert latents.shape == (1, 128, 3, 5)
    assert autoencoder.decode(latents).shape == (1, 3, 48, 80)


@torch.inference_mode()
def test_latents_and_pictures_are_fp32_in_a_bf16_autoencoder(autoencoder):
    autoencoder.bfloat16()
    latents = autoencoder.encode(random_images(32, 32))
    assert latents.dtype == torch.float32
    assert autoencoder.decode(latents).dtype == torch.float32


@torch.inference_mode()
def test_training_mode_neither_uses_nor_moves_the_statistics_of_the_batch(autoencoder):
    images = random_images(32, 32)
    expected, mean = autoencoder.encode(images), autoencoder.bn.running_mean.clone()
    assert torch.equal(autoencoder.train().encode(images), expected)
    assert torch.equal(autoencoder.bn.running_mean, mean)


@torch.inference_mode()
def test_denormalize_undoes_normalize(autoencoder):
    packed = torch.randn(2, 128, 3, 2)
    torch.testing.assert_close(autoencoder.denormalize(autoencoder.normalize(packed)), packed)


@pytest.mark.parametrize("encode", ["encode", "encode_tiled"])
@pytest.mark.parametrize("size", [(40, 64), (64, 1030), (1500, 64)])
@torch.inference_mode()
def test_a_side_that_is_no_multiple_of_16_is_refused(autoencoder, encode, size):
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} px; both sides must be multiples of 16"):
        getattr(autoencoder, encode)(random_images(*size))


@torch.inference_mode()
def test_one_tile_gives_exactly_the_untiled_result(autoencoder):
    images = random_images(64, 96)
    latents = autoencoder.encode(images)
    assert torch.equal(autoencoder.encode_tiled(images), latents)
    assert torch.equal(autoencoder.decode_tiled(latents), autoencoder.decode(latents))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 119, 120, 121, 176, 177, 500])
def test_tiles_cover_everything_and_overlap(length):
    starts = tile_starts(length, 64)
    assert starts[0] == 0
    assert starts[-1] + 64 == max(64, length)
    assert starts == sorted(set(starts))
    assert all(next_start <= start + 64 - 8 for start, next_start in itertools.pairwise(starts))


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (11, 23), (6, 30)])
@pytest.mark.usefixtures("small_tiles")
def test_blending_identical_tiles_gives_the_input_back(size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(blend_tiles(x, lambda tile: tile, size_in=1, size_out=1), x)


@pytest.mark.usefixtures("small_tiles")
def test_blending_keeps_places_when_tiles_grow():
    x = torch.randn(1, 2, 9, 13)
    grown = blend_tiles(x, lambda tile: tile.repeat_interleave(4, -1).repeat_interleave(4, -2), size_in=1, size_out=4)
    torch.testing.assert_close(grown, x.repeat_interleave(4, -1).repeat_interleave(4, -2))


@pytest.mark.usefixtures("small_tiles")
def test_no_tile_is_larger_than_the_limit_however_large_the_picture():
    sizes: list[torch.Size] = []
    blend_tiles(torch.zeros(1, 1, 40, 25), lambda tile: sizes.append(tile.shape) or tile, size_in=1, size_out=1)
    assert {tuple(size[-2:]) for size in sizes} == {(6, 6)}


@pytest.mark.usefixtures("small_tiles")
def test_seams_are_blended_linearly():
    tiles: list[float] = []

    def constant_per_tile(tile: Tensor) -> Tensor:
        tiles.append(len(tiles))
        return torch.full_like(tile, tiles[-1])

    row = blend_tiles(torch.zeros(1, 1, 1, 10), constant_per_tile, size_in=1, size_out=1)[0, 0, 0]
    assert tiles == [0, 1]
    assert row.tolist() == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.usefixtures("small_tiles")
@torch.inference_mode()
def test_tiled_results_have_the_shape_of_untiled_ones(autoencoder):
    images = random_images(160, 224)
    latents = autoencoder.encode_tiled(images)
    assert latents.shape == (1, 128, 10, 14)
    pictures = autoencoder.decode_tiled(latents)
    assert pictures.shape == images.shape
    assert pictures.isfinite().all()
