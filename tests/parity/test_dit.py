"""The DiT against diffusers' transformer: random weights everywhere, whole tensors, fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, reference_tokens, text_ids
from flux2_kit.flux2_core.state_dict import convert
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

LIMIT = 2e-6
REFERENCE_SIZES = [(4, 6), (7, 3), (2, 5)]
CONFIGS = {
    "heads of 32": DiTConfig(
        hidden_size=128,
        num_heads=4,
        num_double_blocks=2,
        num_single_blocks=3,
        context_dim=48,
        has_guidance_embedder=False,
        rope_axes=(8, 8, 8, 8),
    ),
    "heads of 128": DiTConfig(
        hidden_size=256,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=2,
        context_dim=72,
        has_guidance_embedder=False,
    ),
    "heads of 32, guidance": DiTConfig(
        hidden_size=128,
        num_heads=4,
        num_double_blocks=2,
        num_single_blocks=3,
        context_dim=48,
        has_guidance_embedder=True,
        rope_axes=(8, 8, 8, 8),
    ),
    "heads of 128, guidance": DiTConfig(
        hidden_size=256,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=2,
        context_dim=72,
        has_guidance_embedder=True,
    ),
}


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def randomize(module: nn.Module) -> None:
    """Matrices that keep the size of activations, norm scales around 1: no term is zero, none drowns the others."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values


def build_pair(config: DiTConfig) -> tuple[Flux2DiT, nn.Module]:
    """Our DiT and diffusers' transformer with the same weights."""
    ours = Flux2DiT(config).eval()
    randomize(ours)
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
    return ours, theirs


def make_inputs(config: DiTConfig, num_references: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 5 * 8, 128, generator=generator)
    ids = image_ids(5, 8)
    if num_references:
        references = [torch.randn(2, 128, *size, generator=generator) for size in REFERENCE_SIZES[:num_references]]
        extra_tokens, extra_ids = reference_tokens(references)
        tokens, ids = torch.cat((tokens, extra_tokens), dim=1), torch.cat((ids, extra_ids))
    return {
        "tokens": tokens,
        "token_ids": ids,
        "text": torch.randn(2, 11, config.context_dim, generator=generator),
        "text_ids": text_ids(11),
        "sigma": torch.tensor([0.9581, 0.25]),
        "guidance": torch.tensor([4.0, 1.5]) if config.has_guidance_embedder else None,
    }


def run_theirs(model: nn.Module, inputs: dict[str, Tensor | None]) -> Tensor:
    return model(
        hidden_states=inputs["tokens"],
        encoder_hidden_states=inputs["text"],
        timestep=inputs["sigma"],
        img_ids=inputs["token_ids"],
        txt_ids=inputs["text_ids"],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("num_references", [0, 1, 3])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_velocity_equals_diffusers(name, num_references):
    ours, theirs = build_pair(CONFIGS[name])
    inputs = make_inputs(CONFIGS[name], num_references)
    assert relative_l2(ours(**inputs), run_theirs(theirs, inputs)) <= LIMIT


def test_gradients_equal_diffusers():
    config = CONFIGS["heads of 32, guidance"]
    ours, theirs = build_pair(config)
    inputs = make_inputs(config, num_references=1)
    ours(**inputs).square().mean().backward()
    run_theirs(theirs, inputs).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    converted = convert(gradients, "dit", "bfl", "diffusers")
    for name, parameter in theirs.named_parameters():
        assert relative_l2(converted[name], parameter.grad) <= 10 * LIMIT, name


@torch.inference_mode()
def test_bf16_stays_near_fp32():
    config = CONFIGS["heads of 32, guidance"]
    ours, _ = build_pair(config)
    inputs = make_inputs(config, num_references=3)
    exact = ours(**inputs)
    rounded = ours.bfloat16()(**inputs | {"tokens": inputs["tokens"].bfloat16(), "text": inputs["text"].bfloat16()})
    assert rounded.dtype == torch.bfloat16
    assert rounded.isfinite().all()
    assert relative_l2(rounded, exact) < 0.05


@torch.inference_mode()
def test_shift_and_scale_of_the_last_layer_in_the_wrong_order_would_show():
    config = CONFIGS["heads of 32"]
    ours, theirs = build_pair(config)
    inputs = make_inputs(config, num_references=0)
    shift, scale = ours.final_layer.adaLN_modulation[1].weight.chunk(2)
    ours.final_layer.adaLN_modulation[1].weight = nn.Parameter(torch.cat((scale, shift)))
    assert relative_l2(ours(**inputs), run_theirs(theirs, inputs)) > 0.1


@torch.inference_mode()
def test_the_order_of_references_counts():
    config = CONFIGS["heads of 32"]
    ours, _ = build_pair(config)
    inputs = make_inputs(config, num_references=3)
    renumbered = inputs["token_ids"].clone()
    renumbered[:, 0] = torch.where(renumbered[:, 0] > 0, 40 - renumbered[:, 0], renumbered[:, 0])
    assert relative_l2(ours(**inputs | {"token_ids": renumbered}), ours(**inputs)) > 1e-2
