"""The autoencoder against diffusers' AutoencoderKLFlux2, packed by diffusers' own pipeline."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core import autoencoder as autoencoder_module
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.state_dict import convert
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-5
CONFIGS = {
    "standard": AutoencoderConfig(encoder_widths=(16, 24, 32, 32), decoder_widths=(16, 24, 32, 32), num_norm_groups=8),
    "small decoder": AutoencoderConfig(
        encoder_widths=(16, 24, 32, 32), decoder_widths=(8, 16, 24, 24), num_norm_groups=8
    ),
    "one block a level": AutoencoderConfig(
        encoder_widths=(8, 16, 24, 32), decoder_widths=(8, 16, 24, 32), num_res_blocks=1, num_norm_groups=4
    ),
}


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def randomize(module: nn.Module) -> None:
    """Random weights, biases, norms and statistics; small variances, so that the eps of the BatchNorm counts."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = values / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0)
    for name, buffer in module.named_buffers():
        if name == "bn.running_mean":
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name == "bn.running_var":
            buffer.copy_(0.002 + 0.02 * torch.rand(buffer.shape, generator=generator))


def build_pair(config: AutoencoderConfig) -> tuple[Flux2Autoencoder, diffusers.Flux2KleinPipeline]:
    """Our autoencoder, and a pipeline of diffusers around theirs with the same weights."""
    ours = Flux2Autoencoder(config).eval()
    randomize(ours)
    theirs = diffusers.AutoencoderKLFlux2(
        block_out_channels=config.encoder_widths,
        decoder_block_out_channels=None if config.decoder_widths == config.encoder_widths else config.decoder_widths,
        layers_per_block=config.num_res_blocks,
        norm_num_groups=config.num_norm_groups,
    ).eval()
    theirs.load_state_dict(convert(ours.state_dict(), "autoencoder", "bfl", "diffusers"), strict=True)
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=theirs,
        text_encoder=None,
        tokenizer=None,
        transformer=None,
    )
    return ours, pipeline


def decode_theirs(pipeline: diffusers.Flux2KleinPipeline, latents: Tensor) -> Tensor:
    vae = pipeline.vae
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return vae.decode(pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]


@pytest.mark.parametrize("size", [(48, 80), (64, 32)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_latents_of_a_picture_equal_diffusers(name, size):
    ours, pipeline = build_pair(CONFIGS[name])
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert relative_l2(ours.encode(images), pipeline._encode_vae_image(images, generator=None)) <= LIMIT


@pytest.mark.parametrize("size", [(3, 5), (4, 2)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_picture_of_latents_equals_diffusers(name, size):
    ours, pipeline = build_pair(CONFIGS[name])
    latents = torch.randn(2, 128, *size, generator=torch.Generator().manual_seed(2))
    assert relative_l2(ours.decode(latents), decode_theirs(pipeline, latents)) <= LIMIT


@torch.inference_mode()
def test_another_eps_of_the_batch_norm_would_show(monkeypatch):
    ours, pipeline = build_pair(CONFIGS["standard"])
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    monkeypatch.setattr(autoencoder_module, "BATCH_NORM_EPS", 1e-5)
    assert relative_l2(ours.encode(images), pipeline._encode_vae_image(images, generator=None)) > 1e-3


@torch.inference_mode()
def test_another_order_of_packed_channels_would_show(monkeypatch):
    ours, pipeline = build_pair(CONFIGS["standard"])
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pack = autoencoder_module.pack_2x2
    monkeypatch.setattr(autoencoder_module, "pack_2x2", lambda z: pack(z.mT).mT)  # (c, pj, pi)
    assert relative_l2(ours.encode(images), pipeline._encode_vae_image(images, generator=None)) > 0.1
