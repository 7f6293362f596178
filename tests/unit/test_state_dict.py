"""The key tables: every tensor of both networks goes to every layout and back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.state_dict import convert, from_bfl, rules, to_bfl
from flux2_kit.flux2_core.variants import VARIANTS
from torch import Tensor

DIT = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=12,  # two digits: block 1 is not block 10
    context_dim=48,
    has_guidance_embedder=True,
    rope_axes=(8, 8, 8, 8),
)
AUTOENCODER = AutoencoderConfig(
    encoder_widths=(8, 16, 16, 24),
    decoder_widths=(8, 8, 16, 16),
    num_res_blocks=1,
    latent_channels=4,
    num_norm_groups=4,
)
LAYOUTS = ("bfl", "diffusers", "comfyui")


def random_state(module: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
        if name != "bn.num_batches_tracked"
    }


STATES = {"dit": random_state(Flux2DiT(DIT)), "autoencoder": random_state(Flux2Autoencoder(AUTOENCODER))}


@pytest.mark.parametrize("component", ["dit", "autoencoder"])
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_round_trip_is_exact(component, source, target):
    start = convert(STATES[component], component, "bfl", source)
    there = convert(start, component, source, target)
    back = convert(there, component, target, source)
    assert back.keys() == start.keys()
    assert all(torch.equal(back[name], start[name]) for name in start)


def test_qkv_is_split_into_thirds_and_the_last_modulation_swaps_halves():
    state, converted = STATES["dit"], convert(STATES["dit"], "dit", "bfl", "diffusers")
    qkv = state["double_blocks.1.txt_attn.qkv.weight"]
    names = ("add_q_proj", "add_k_proj", "add_v_proj")
    for index, name in enumerate(names):
        assert torch.equal(converted[f"transformer_blocks.1.attn.{name}.weight"], qkv[64 * index : 64 * (index + 1)])
    shift, scale = state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(converted["norm_out.linear.weight"], torch.cat((scale, shift)))


def test_decoder_levels_count_from_the_other_end():
    state, converted = STATES["autoencoder"], convert(STATES["autoencoder"], "autoencoder", "bfl", "diffusers")
    coarsest = state["decoder.up.3.block.0.conv1.weight"]
    assert torch.equal(converted["decoder.up_blocks.0.resnets.0.conv1.weight"], coarsest)
    assert converted["encoder.mid_block.attentions.0.to_q.weight"].shape == (24, 24)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if v.dit_file or v.name == "tiny"], ids=lambda v: v.name
)
def test_every_tensor_of_every_variant_has_a_name(variant):
    with torch.device("meta"):
        dit, autoencoder = Flux2DiT(variant.dit), Flux2Autoencoder(variant.autoencoder)
    for component, module in (("dit", dit), ("autoencoder", autoencoder)):
        names = list(module.state_dict())
        for layout in LAYOUTS:
            planned = from_bfl(names, component, layout)
            back = to_bfl([step.target for step in planned], component, layout)
            assert {step.target for step in back} == set(names) - (
                {"bn.num_batches_tracked"} if layout == "diffusers" else set()
            )


def test_names_and_shapes_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        transformer = diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=128,
            num_layers=2,
            num_single_layers=12,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(8, 8, 8, 8),
        )
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16, 16, 24),
            decoder_block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
    for component, model in (("dit", transformer), ("autoencoder", vae)):
        ours = {
            name: tensor.shape for name, tensor in convert(STATES[component], component, "bfl", "diffusers").items()
        }
        theirs = {name: tensor.shape for name, tensor in model.state_dict().items() if "num_batches" not in name}
        assert ours == theirs


def test_comfyui_may_call_the_norms_weight():
    renamed = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in STATES["dit"].items()}
    back = convert(renamed, "dit", "comfyui", "bfl")
    assert back.keys() == STATES["dit"].keys()


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(ValueError, match=r"double_blocks\.0\.img_mod\.lin\.weight"):
        to_bfl(["img_in.weight", "double_blocks.0.img_mod.lin.weight"], "dit", "bfl")
    with pytest.raises(ValueError, match=r"5 of the names .* and 1 more"):
        from_bfl([f"stranger.{index}" for index in range(5)], "dit", "diffusers")


def test_a_fused_tensor_needs_all_its_parts():
    with pytest.raises(ValueError, match="to_q, to_k, to_v"):
        to_bfl([f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_v")], "dit", "diffusers")


def test_one_tensor_under_two_names_is_refused():
    names = [f"single_blocks.0.norm.query_norm.{last}" for last in ("scale", "weight")]
    with pytest.raises(ValueError, match="are the same tensor"):
        to_bfl(names, "dit", "comfyui")


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="known layouts: bfl, diffusers, comfyui"):
        rules("dit", "kohya")


def test_steps_foretell_their_shapes():
    state = STATES["dit"]
    for step in from_bfl(state, "dit", "diffusers"):
        sources = [state[name] for name in step.sources]
        assert step.shape([tuple(tensor.shape) for tensor in sources]) == tuple(step.apply(sources).shape)
