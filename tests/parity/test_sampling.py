"""Schedule, position ids, packing, reference pictures and the whole denoise loop against diffusers' pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, pack_2x2, unpack_2x2
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.images import fit_reference, image_to_tensor
from flux2_kit.flux2_core.latents import (
    image_ids,
    latents_to_tokens,
    reference_tokens,
    seed_noise,
    text_ids,
    tokens_to_latents,
)
from flux2_kit.flux2_core.pipeline import SamplingConfig, encode_references, sample_latents
from flux2_kit.flux2_core.schedule import empirical_mu, sigma_schedule
from flux2_kit.flux2_core.state_dict import convert
from flux2_kit.flux2_core.variants import VARIANTS, Variant
from PIL import Image
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
klein_module = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")

LIMIT = 1e-5
CONTEXT_DIM = 48
WIDTH, HEIGHT, NUM_STEPS = 96, 64, 4
# The scheduler_config.json of the released repositories.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = values / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.2 * values + (0 if name.endswith("bias") else 1)
    for name, buffer in module.named_buffers():
        if name == "bn.running_mean":
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name == "bn.running_var":
            buffer.copy_(0.05 + 0.1 * torch.rand(buffer.shape, generator=generator))


def small_variant(name: str) -> Variant:
    """The named variant, its settings untouched, with small networks."""
    variant = VARIANTS[name]
    dit = DiTConfig(
        hidden_size=64,
        num_heads=2,
        num_double_blocks=2,
        num_single_blocks=2,
        context_dim=CONTEXT_DIM,
        has_guidance_embedder=variant.dit.has_guidance_embedder,
        rope_axes=(8, 8, 8, 8),
    )
    autoencoder = AutoencoderConfig(
        encoder_widths=(8, 8, 16, 16), decoder_widths=(8, 8, 16, 16), num_res_blocks=1, num_norm_groups=4
    )
    return replace(variant, dit=dit, autoencoder=autoencoder)


class Pair:
    """Our networks, and diffusers' pipeline with the same weights."""

    def __init__(self, name: str) -> None:
        self.variant = small_variant(name)
        config, autoencoder = self.variant.dit, self.variant.autoencoder
        self.dit, self.autoencoder = Flux2DiT(config).eval(), Flux2Autoencoder(autoencoder).eval()
        randomize(self.dit, 0)
        randomize(self.autoencoder, 1)
        transformer = diffusers.Flux2Transformer2DModel(
            num_layers=config.num_double_blocks,
            num_single_layers=config.num_single_blocks,
            attention_head_dim=sum(config.rope_axes),
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            axes_dims_rope=config.rope_axes,
            guidance_embeds=config.has_guidance_embedder,
        ).eval()
        transformer.load_state_dict(convert(self.dit.state_dict(), "dit", "bfl", "diffusers"), strict=True)
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=autoencoder.encoder_widths,
            layers_per_block=autoencoder.num_res_blocks,
            norm_num_groups=autoencoder.num_norm_groups,
        ).eval()
        vae.load_state_dict(convert(self.autoencoder.state_dict(), "autoencoder", "bfl", "diffusers"), strict=True)
        parts: dict[str, Any] = {
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            "vae": vae,
            "text_encoder": None,
            "tokenizer": None,
            "transformer": transformer,
        }
        if name == "dev":
            self.pipeline = diffusers.Flux2Pipeline(**parts)
        else:
            self.pipeline = diffusers.Flux2KleinPipeline(**parts, is_distilled=self.variant.distilled)
        self.pipeline.set_progress_bar_config(disable=True)

    def run_theirs(self, **arguments: Any) -> Tensor:
        settings = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": NUM_STEPS}
        return self.pipeline(**settings, **arguments, return_dict=False)[0]


def random_text(num_images: int, seed: int) -> Tensor:
    return torch.randn(num_images, 7, CONTEXT_DIM, generator=torch.Generator().manual_seed(seed))


def random_picture(width: int, height: int, seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def references(number: int) -> list[Image.Image]:
    """Pictures of different sizes; the second is no multiple of 16."""
    return [random_picture(*size, seed) for seed, size in enumerate([(80, 64), (91, 77), (64, 96)][:number])]


@pytest.mark.parametrize("num_steps", [1, 4, 20, 28, 50])
@pytest.mark.parametrize("num_tokens", [16, 1024, 3600, 4096, 4300, 4301, 8160, 16384])
def test_sigmas_equal_the_scheduler_of_diffusers(num_tokens, num_steps):
    mu = klein_module.compute_empirical_mu(image_seq_len=num_tokens, num_steps=num_steps)
    assert empirical_mu(num_tokens, num_steps) == pytest.approx(mu, rel=1e-12)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    klein_module.retrieve_timesteps(
        scheduler, num_steps, "cpu", sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu
    )
    ours = sigma_schedule(num_steps, num_tokens)
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(1000 * ours[:-1], scheduler.timesteps.double(), rtol=1e-6, atol=1e-4)


def test_position_ids_of_picture_and_text_equal_diffusers():
    theirs = diffusers.Flux2KleinPipeline
    assert torch.equal(image_ids(5, 9), theirs._prepare_latent_ids(torch.zeros(1, 128, 5, 9))[0])
    assert torch.equal(text_ids(512), theirs._prepare_text_ids(torch.zeros(1, 512, 3))[0])


def test_tokens_and_position_ids_of_references_equal_diffusers():
    theirs = diffusers.Flux2KleinPipeline
    latents = [torch.randn(1, 128, *size) for size in [(4, 6), (7, 3), (2, 5)]]
    tokens, ids = reference_tokens(latents)
    assert torch.equal(ids, theirs._prepare_image_ids(latents)[0])
    assert torch.equal(tokens, torch.cat([theirs._pack_latents(item) for item in latents], dim=1))


def test_packing_equals_diffusers():
    theirs = diffusers.Flux2KleinPipeline
    z = torch.randn(2, 32, 6, 10)
    packed = pack_2x2(z)
    assert torch.equal(packed, theirs._patchify_latents(z))
    assert torch.equal(unpack_2x2(packed), theirs._unpatchify_latents(packed))
    tokens = latents_to_tokens(packed)
    assert torch.equal(tokens, theirs._pack_latents(packed))
    ids = image_ids(3, 5).expand(2, -1, -1)
    assert torch.equal(tokens_to_latents(tokens, 3, 5), theirs._unpack_latents_with_ids(tokens, ids, 3, 5))


def test_noise_of_a_seed_equals_diffusers():
    theirs = klein_module.randn_tensor((3, 128, 4, 6), generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    assert torch.equal(seed_noise(7, 3, 64, 96), theirs)


@pytest.mark.parametrize("size", [(1500, 900), (900, 1501), (1024, 1024), (333, 257), (64, 64)])
def test_reference_pictures_equal_diffusers(size):
    # diffusers scales to 1024 x 1024 px whatever the number of references, as the kit does from two on.
    picture, processor = random_picture(*size, 0), diffusers.pipelines.flux2.image_processor.Flux2ImageProcessor()
    resized = processor._resize_if_exceeds_area(picture, 1024 * 1024)
    width, height = resized.width // 16 * 16, resized.height // 16 * 16
    theirs = processor.preprocess(resized, height=height, width=width, resize_mode="crop")
    ours = image_to_tensor(fit_reference(picture, 1024 * 1024))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_references", [0, 1, 3])
@torch.inference_mode()
def test_distilled_denoise_equals_diffusers(num_references):
    pair, text, noise = Pair("klein-4b"), random_text(2, 3), seed_noise(5, 2, HEIGHT, WIDTH)
    pictures = references(num_references)
    theirs = pair.run_theirs(
        prompt_embeds=text, latents=noise, image=pictures or None, guidance_scale=1.0, output_type="latent"
    )
    ours = sample_latents(
        pair.dit,
        pair.variant,
        SamplingConfig(width=WIDTH, height=HEIGHT, seed=5, num_images=2),
        text,
        references=encode_references(pair.autoencoder, pictures),
    )
    assert relative_l2(unpack_2x2(pair.autoencoder.denormalize(ours)), theirs) <= LIMIT


@pytest.mark.parametrize("num_references", [0, 2])
@torch.inference_mode()
def test_classifier_free_guidance_equals_diffusers(num_references):
    pair, noise = Pair("klein-base-4b"), seed_noise(6, 1, HEIGHT, WIDTH)
    text, negative_text, pictures = random_text(1, 3), random_text(1, 4), references(num_references)
    theirs = pair.run_theirs(
        prompt_embeds=text,
        negative_prompt_embeds=negative_text,
        latents=noise,
        image=pictures or None,
        guidance_scale=4.0,
        output_type="latent",
    )
    ours = sample_latents(
        pair.dit,
        pair.variant,
        SamplingConfig(width=WIDTH, height=HEIGHT, num_steps=NUM_STEPS, seed=6),
        text,
        negative_text=negative_text,
        references=encode_references(pair.autoencoder, pictures),
    )
    assert relative_l2(unpack_2x2(pair.autoencoder.denormalize(ours)), theirs) <= LIMIT


@pytest.mark.parametrize("num_references", [0, 2])
@torch.inference_mode()
def test_embedded_guidance_equals_diffusers(num_references):
    pair, text, noise = Pair("dev"), random_text(1, 3), seed_noise(8, 1, HEIGHT, WIDTH)
    pictures = references(num_references)
    theirs = pair.run_theirs(
        prompt_embeds=text, latents=noise, image=pictures or None, guidance_scale=4.0, output_type="latent"
    )
    ours = sample_latents(
        pair.dit,
        pair.variant,
        SamplingConfig(width=WIDTH, height=HEIGHT, num_steps=NUM_STEPS, seed=8),
        text,
        references=encode_references(pair.autoencoder, pictures),
    )
    assert relative_l2(latents_to_tokens(ours), theirs) <= LIMIT


@torch.inference_mode()
def test_decoded_picture_equals_diffusers():
    pair, text, noise = Pair("klein-4b"), random_text(1, 3), seed_noise(9, 1, HEIGHT, WIDTH)
    theirs = pair.run_theirs(
        prompt_embeds=text, latents=noise, image=references(1), guidance_scale=1.0, output_type="pt"
    )
    sampling = SamplingConfig(width=WIDTH, height=HEIGHT, seed=9)
    encoded = encode_references(pair.autoencoder, references(1))
    latents = sample_latents(pair.dit, pair.variant, sampling, text, references=encoded)
    ours = (pair.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert relative_l2(ours, theirs) <= LIMIT


@torch.inference_mode()
def test_references_in_another_order_would_show():
    pair, text, noise = Pair("klein-4b"), random_text(1, 3), seed_noise(5, 1, HEIGHT, WIDTH)
    theirs = pair.run_theirs(
        prompt_embeds=text, latents=noise, image=references(2), guidance_scale=1.0, output_type="latent"
    )
    sampling = SamplingConfig(width=WIDTH, height=HEIGHT, seed=5)
    encoded = encode_references(pair.autoencoder, references(2)[::-1])
    ours = sample_latents(pair.dit, pair.variant, sampling, text, references=encoded)
    assert relative_l2(unpack_2x2(pair.autoencoder.denormalize(ours)), theirs) > 1e-3
