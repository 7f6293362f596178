"""Previews: a linear map from latents to small pictures, fitted on the autoencoder itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, pack_2x2
from flux2_kit.flux2_core.images import tensor_to_images
from flux2_kit.flux2_core.preview import PreviewFactors, fit_preview, preview_images
from torch import Tensor


@pytest.fixture(scope="module")
def autoencoder() -> Flux2Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        encoder_widths=(8, 8, 16, 16), decoder_widths=(8, 8, 16, 16), num_res_blocks=1, num_norm_groups=4
    )
    return Flux2Autoencoder(config).eval()


@pytest.fixture(scope="module")
def factors(autoencoder) -> PreviewFactors:
    return fit_preview(autoencoder)


def test_factors_map_32_channels_to_rgb(factors):
    assert factors.weight.shape == (32, 3)
    assert factors.bias.shape == (3,)
    assert factors.weight.isfinite().all() and factors.bias.isfinite().all()


def test_fitting_again_gives_the_same_factors(autoencoder, factors):
    again = fit_preview(autoencoder)
    assert torch.equal(again.weight, factors.weight)
    assert torch.equal(again.bias, factors.bias)


def test_fitting_leaves_the_global_generator_alone(autoencoder):
    before = torch.get_rng_state()
    fit_preview(autoencoder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_latent_position_becomes_two_by_two_pixels(autoencoder, factors):
    images = preview_images(torch.randn(2, 128, 3, 5), autoencoder, factors)
    assert [(image.mode, image.size) for image in images] == [("RGB", (10, 6)), ("RGB", (10, 6))]


@torch.inference_mode()
def test_colours_that_latents_hold_linearly_come_back(autoencoder, monkeypatch):
    mix = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))

    def encode(images: Tensor) -> Tensor:
        z = torch.einsum("zc,bchw->bzhw", mix, F.avg_pool2d(images, 8)) + 0.3
        return autoencoder.normalize(pack_2x2(z))

    monkeypatch.setattr(autoencoder, "encode", encode)
    picture = torch.zeros(1, 3, 32, 48)
    picture[:, 0, :16], picture[:, 1, :, 16:], picture[:, 2, 8:] = 0.8, -0.6, 0.4
    (preview,) = preview_images(encode(picture), autoencoder, fit_preview(autoencoder))
    expected = tensor_to_images(F.avg_pool2d(picture, 8))[0]
    assert np.abs(np.asarray(preview, dtype=int) - np.asarray(expected, dtype=int)).max() <= 3


def test_bf16_latents_are_taken(autoencoder, factors):
    (image,) = preview_images(torch.zeros(1, 128, 2, 2, dtype=torch.bfloat16), autoencoder, factors)
    assert image.size == (4, 4)
