"""klein-9b-kv's cache of references against diffusers' transformer and pipeline with theirs: fp32, whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, unpack_2x2
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.key_values import BlockKeyValues
from flux2_kit.flux2_core.latents import image_ids, latents_to_tokens, reference_tokens, seed_noise, text_ids
from flux2_kit.flux2_core.pipeline import SamplingConfig, encode_references, sample_latents
from flux2_kit.flux2_core.reference_cache import ReferenceCaches
from flux2_kit.flux2_core.state_dict import convert
from flux2_kit.flux2_core.variants import VARIANTS
from PIL import Image
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
kv_module = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein_kv")
transformer_module = pytest.importorskip("diffusers.models.transformers.transformer_flux2")

LIMIT = 1e-5
CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=3,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
AUTOENCODER = AutoencoderConfig(
    encoder_widths=(8, 8, 16, 16), decoder_widths=(8, 8, 16, 16), num_res_blocks=1, num_norm_groups=4
)
VARIANT = replace(VARIANTS["klein-9b-kv"], dit=CONFIG, autoencoder=AUTOENCODER)
WIDTH, HEIGHT = 96, 64


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values


def build_pair(config: DiTConfig = CONFIG) -> tuple[Flux2DiT, nn.Module]:
    """Our DiT, and diffusers' transformer as their KV pipeline uses it."""
    ours = Flux2DiT(config).eval().requires_grad_(False)
    randomize(ours, 0)
    theirs = diffusers.Flux2Transformer2DModel(
        num_layers=config.num_double_blocks,
        num_single_layers=config.num_single_blocks,
        attention_head_dim=sum(config.rope_axes),
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim,
        axes_dims_rope=config.rope_axes,
        guidance_embeds=config.has_guidance_embedder,
    ).eval()
    theirs.load_state_dict(convert(ours.state_dict(), "dit", "bfl", "diffusers"), strict=True)
    set_kv_processors(theirs)
    return ours, theirs


def set_kv_processors(transformer: nn.Module) -> None:
    for block in transformer.transformer_blocks:
        block.attn.set_processor(transformer_module.Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(transformer_module.Flux2KVParallelSelfAttnProcessor())


def random_text(num_rows: int, seed: int) -> Tensor:
    return torch.randn(num_rows, 7, CONFIG.context_dim, generator=torch.Generator().manual_seed(seed))


def random_pictures(number: int) -> list[Image.Image]:
    levels = np.random.default_rng(0)
    return [
        Image.fromarray(levels.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in [(80, 64), (91, 77), (64, 96)][:number]
    ]


def latents_of_references(number: int) -> list[Tensor]:
    return [seed_noise(20 + i, 1, 16 * h, 16 * w) for i, (h, w) in enumerate([(4, 6), (7, 3), (2, 5)][:number])]


def their_key_values(cache) -> list[tuple[Tensor, Tensor]]:
    return [layer.get() for layer in (*cache.double_block_caches, *cache.single_block_caches)]


def ours_as_theirs(blocks: Sequence[BlockKeyValues]) -> list[tuple[Tensor, Tensor]]:
    return [(block.keys.transpose(1, 2), block.values.transpose(1, 2)) for block in blocks]


@pytest.mark.parametrize("has_guidance", [False, True])
@pytest.mark.parametrize("num_references", [1, 3])
@torch.inference_mode()
def test_keys_values_and_velocities_equal_diffusers(num_references, has_guidance):
    ours, theirs = build_pair(replace(CONFIG, has_guidance_embedder=has_guidance))
    references = latents_of_references(num_references)
    extra_tokens, extra_ids = reference_tokens(references)
    tokens, ids = latents_to_tokens(seed_noise(1, 2, 64, 96)), image_ids(4, 6)
    text, ids_of_text = random_text(2, 3), text_ids(7)
    guidance = torch.full((2,), 3.0) if has_guidance else None
    extracted = theirs(
        hidden_states=torch.cat((extra_tokens.expand(2, -1, -1), tokens), dim=1),
        encoder_hidden_states=text,
        timestep=torch.tensor([0.9, 0.7]),
        img_ids=torch.cat((extra_ids, ids)),
        txt_ids=ids_of_text,
        guidance=guidance,
        kv_cache_mode="extract",
        num_ref_tokens=extra_tokens.shape[1],
    )
    blocks = ReferenceCaches().exact(ours, references, 3.0 if has_guidance else None)
    pairs = zip(ours_as_theirs(blocks), their_key_values(extracted.kv_cache), strict=True)
    for (keys, values), (their_keys, their_values) in pairs:
        for row in range(2):  # theirs are the same for every prompt and sigma
            assert relative_l2(keys, their_keys[row : row + 1]) <= LIMIT
            assert relative_l2(values, their_values[row : row + 1]) <= LIMIT
    prepared = ours.prepare(ids, text, ids_of_text, guidance)
    first = ours.velocity(tokens, torch.tensor([0.9, 0.7]), prepared, blocks)
    assert relative_l2(first, extracted.sample) <= LIMIT
    later = theirs(
        hidden_states=tokens,
        encoder_hidden_states=text,
        timestep=torch.tensor([0.5, 0.2]),
        img_ids=ids,
        txt_ids=ids_of_text,
        guidance=guidance,
        kv_cache=extracted.kv_cache,
        kv_cache_mode="cached",
    )
    assert relative_l2(ours.velocity(tokens, torch.tensor([0.5, 0.2]), prepared, blocks), later.sample) <= LIMIT


def build_pipelines() -> tuple[Flux2DiT, Flux2Autoencoder, object]:
    dit, transformer = build_pair()
    autoencoder = Flux2Autoencoder(AUTOENCODER).eval()
    randomize(autoencoder, 1)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=AUTOENCODER.encoder_widths,
        layers_per_block=AUTOENCODER.num_res_blocks,
        norm_num_groups=AUTOENCODER.num_norm_groups,
    ).eval()
    vae.load_state_dict(convert(autoencoder.state_dict(), "autoencoder", "bfl", "diffusers"), strict=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )
    pipeline = diffusers.Flux2KleinKVPipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return dit, autoencoder, pipeline


@torch.inference_mode()
def test_the_whole_loop_equals_diffusers_and_so_does_the_next_with_the_same_references():
    dit, autoencoder, pipeline = build_pipelines()
    pictures = random_pictures(3)
    latents = encode_references(autoencoder, pictures)
    for seed, num_images in ((5, 2), (6, 1)):
        text = random_text(num_images, seed)
        theirs = pipeline(
            prompt_embeds=text,
            latents=seed_noise(seed, num_images, HEIGHT, WIDTH),
            image=pictures,
            width=WIDTH,
            height=HEIGHT,
            num_inference_steps=4,
            output_type="latent",
            return_dict=False,
        )[0]
        sampling = SamplingConfig(width=WIDTH, height=HEIGHT, seed=seed, num_images=num_images)
        ours = sample_latents(dit, VARIANT, sampling, text, references=latents)
        assert relative_l2(unpack_2x2(autoencoder.denormalize(ours)), theirs) <= LIMIT
        plain = sample_latents(dit, VARIANT, replace(sampling, reference_cache="off"), text, references=latents)
        assert relative_l2(plain, ours) > 1e-2, "references that see text and picture would show"


@torch.inference_mode()
def test_without_references_it_is_klein():
    dit, _, pipeline = build_pipelines()
    text, noise = random_text(1, 3), seed_noise(5, 1, HEIGHT, WIDTH)
    size = {"width": WIDTH, "height": HEIGHT}
    theirs = pipeline(prompt_embeds=text, latents=noise, **size, num_inference_steps=4, output_type="latent")
    ours = sample_latents(dit, VARIANT, SamplingConfig(**size, seed=5), text)
    klein = sample_latents(dit, replace(VARIANTS["klein-9b"], dit=CONFIG), SamplingConfig(**size, seed=5), text)
    assert torch.equal(ours, klein)
    vae = pipeline.vae
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    scaled = ours * (variance + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    assert relative_l2(unpack_2x2(scaled), theirs.images) <= LIMIT
