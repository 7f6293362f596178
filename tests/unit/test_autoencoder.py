"""The autoencoder's shapes; its strips have tests of their own."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
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
