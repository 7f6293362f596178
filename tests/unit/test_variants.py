"""The table of variants against the published facts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.variants import DIT_4B, DIT_9B, DIT_32B, VARIANTS, get_variant

REAL = [name for name in VARIANTS if name != "tiny"]
KLEIN = [name for name in REAL if name.startswith("klein")]


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_variants_are_those_that_exist():
    assert list(VARIANTS) == ["dev", "klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b", "klein-9b-kv", "tiny"]


@pytest.mark.parametrize(
    ("config", "billions", "hidden_size", "num_heads", "num_double_blocks", "num_single_blocks", "context_dim"),
    [
        pytest.param(DIT_32B, 32.223, 6144, 48, 8, 48, 15360, id="32B"),
        pytest.param(DIT_9B, 9.079, 4096, 32, 8, 24, 12288, id="9B"),
        pytest.param(DIT_4B, 3.876, 3072, 24, 5, 20, 7680, id="4B"),
    ],
)
def test_released_networks_have_the_published_shapes(
    config, billions, hidden_size, num_heads, num_double_blocks, num_single_blocks, context_dim
):
    assert (config.hidden_size, config.num_heads) == (hidden_size, num_heads)
    assert (config.num_double_blocks, config.num_single_blocks) == (num_double_blocks, num_single_blocks)
    assert config.context_dim == context_dim
    with torch.device("meta"):
        assert round(count_parameters(Flux2DiT(config)) / 1e9, 3) == billions


@pytest.mark.parametrize("name", REAL)
def test_released_networks_share_heads_of_128_in_four_axes(name):
    dit = VARIANTS[name].dit
    assert dit.rope_axes == (32, 32, 32, 32)
    assert dit.hidden_size // dit.num_heads == 128
    assert (dit.rope_theta, dit.mlp_ratio, dit.in_channels) == (2000, 3, 128)


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_of_a_variant_fit_together(name):
    variant = VARIANTS[name]
    assert variant.dit.context_dim == variant.text_encoder.context_dim
    assert variant.dit.in_channels == variant.autoencoder.packed_channels == 128
    assert variant.dit.has_guidance_embedder == (variant.guidance is not None)
    assert variant.default_size % 16 == 0


@pytest.mark.parametrize(
    ("name", "distilled", "num_steps", "cfg_scale", "guidance"),
    [
        ("dev", False, 50, 1.0, 4.0),
        ("klein-4b", True, 4, 1.0, None),
        ("klein-9b", True, 4, 1.0, None),
        ("klein-9b-kv", True, 4, 1.0, None),
        ("klein-base-4b", False, 50, 4.0, None),
        ("klein-base-9b", False, 50, 4.0, None),
        ("tiny", False, 20, 4.0, None),
    ],
)
def test_default_steps_and_guidance(name, distilled, num_steps, cfg_scale, guidance):
    variant = VARIANTS[name]
    assert variant.distilled is distilled
    assert (variant.num_steps, variant.cfg_scale, variant.guidance) == (num_steps, cfg_scale, guidance)


def test_dev_reads_mistral_and_klein_reads_qwen3():
    assert VARIANTS["dev"].text_encoder.family == "mistral"
    assert VARIANTS["dev"].text_encoder.layers == (10, 20, 30)
    for name in KLEIN:
        assert VARIANTS[name].text_encoder.family == "qwen3"
        assert VARIANTS[name].text_encoder.layers == (9, 18, 27)


@pytest.mark.parametrize("name", REAL)
def test_released_variants_read_512_text_tokens_and_say_where_their_weights_are(name):
    variant = VARIANTS[name]
    assert variant.text_encoder.max_tokens == 512
    assert variant.dit_file and variant.autoencoder_file and variant.text_encoder_files
    assert variant.dit_file.filename.endswith(".safetensors")


def test_only_klein_4b_is_free_of_the_non_commercial_licence():
    free = [name for name, variant in VARIANTS.items() if variant.license == "Apache-2.0"]
    assert free == ["klein-4b", "klein-base-4b", "tiny"]
    assert [name for name, variant in VARIANTS.items() if not variant.gated] == free


def test_the_public_autoencoder_has_32_channels_and_its_decoder_50_million_parameters():
    with torch.device("meta"):
        standard = Flux2Autoencoder(AutoencoderConfig())
        small = Flux2Autoencoder(AutoencoderConfig(decoder_widths=(96, 192, 384, 384)))
    assert standard.config.latent_channels == 32
    assert count_parameters(standard.decoder) / 1e6 == pytest.approx(50, abs=0.5)
    assert count_parameters(small.decoder) / 1e6 == pytest.approx(28, abs=0.5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_cannot_be_changed(name):
    variant = VARIANTS[name]
    for config, field in ((variant, "num_steps"), (variant.dit, "hidden_size"), (variant.text_encoder, "layers")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 1)


def test_a_variant_is_found_by_name():
    assert get_variant("klein-9b") is VARIANTS["klein-9b"]


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown variant 'klein-5b'; known variants: dev, klein-4b, .*tiny"):
        get_variant("klein-5b")


def test_heads_that_do_not_fill_the_hidden_size_are_an_error_of_ours():
    with pytest.raises(AssertionError):
        DiTConfig(
            hidden_size=100,
            num_heads=3,
            num_double_blocks=1,
            num_single_blocks=1,
            context_dim=8,
            has_guidance_embedder=False,
        )
