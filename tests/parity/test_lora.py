"""LoRAs against diffusers and PEFT, both ways: files of their writers in ours, files of ours in their loaders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.lora import LoraSetting, apply_loras, merge_loras
from flux2_kit.flux2_core.lora_factors import Lora
from flux2_kit.flux2_core.lora_files import linear_shapes, read_lora
from flux2_kit.flux2_core.lora_writer import UNREAD_BY_DIFFUSERS, reading_notes, write_lora
from flux2_kit.flux2_core.state_dict import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

LIMIT = 1e-5
CONFIG = DiTConfig(
    hidden_size=128,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=True,
    rope_axes=(8, 8, 8, 8),
)
SEVERAL_RANKS = (
    "diffusers before 0.40 takes layers of another rank at another strength; for it, convert the LoRA to the diffusers "
    "dialect",
)
PIPELINES = ["Flux2Pipeline", "Flux2KleinPipeline"]


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def build_pair():
    """Our DiT and diffusers' transformer with the same weights, all random."""
    ours = Flux2DiT(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    theirs = diffusers.Flux2Transformer2DModel(
        num_layers=CONFIG.num_double_blocks,
        num_single_layers=CONFIG.num_single_blocks,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=CONFIG.context_dim,
        axes_dims_rope=CONFIG.rope_axes,
        guidance_embeds=True,
    ).eval()
    theirs.load_state_dict(convert(ours.state_dict(), "dit", "bfl", "diffusers"), strict=True)
    return ours, theirs


def run_both(ours: Flux2DiT | None, theirs: torch.nn.Module | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, text = torch.randn(2, 15, 128, generator=generator), torch.randn(2, 7, 48, generator=generator)
    sigma, guidance = torch.tensor([0.9581, 0.25]), torch.tensor([4.0, 1.5])
    outputs = []
    with torch.inference_mode():
        if ours is not None:
            outputs.append(ours(tokens, image_ids(3, 5), text, text_ids(7), sigma, guidance))
        if theirs is not None:
            outputs.append(
                theirs(
                    hidden_states=tokens,
                    encoder_hidden_states=text,
                    timestep=sigma,
                    img_ids=image_ids(3, 5),
                    txt_ids=text_ids(7),
                    guidance=guidance,
                    return_dict=False,
                )[0]
            )
    return outputs


def pipeline(name: str, transformer: torch.nn.Module):
    """A pipeline with only the transformer: all that their LoRA loaders touch."""
    found = getattr(diffusers, name).__new__(getattr(diffusers, name))
    diffusers.DiffusionPipeline.__init__(found)
    others = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "vae"))
    found.register_modules(transformer=transformer, **others)
    return found


def add_peft_adapter(transformer: torch.nn.Module, **options) -> peft.LoraConfig:
    targets = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(2)
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_magnitude" in name:
            parameter.data = parameter.data * (0.6 + 0.8 * torch.rand(parameter.shape))
    return config


PEFT_OPTIONS = {
    "alpha as rank": {"lora_alpha": 4},
    "alpha": {"lora_alpha": 7},
    "patterns": {"lora_alpha": 7, "rank_pattern": {"ff.linear_in": 3}, "alpha_pattern": {"ff.linear_in": 5}},
    "rsLoRA": {"lora_alpha": 3, "use_rslora": True},
    "DoRA": {"lora_alpha": 7, "use_dora": True},
}


def saved_by_diffusers(name: str, transformer: torch.nn.Module, config: peft.LoraConfig, folder: Path) -> Path:
    metadata = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    metadata["target_modules"] = sorted(config.target_modules)
    metadata["peft_type"] = "LORA"
    layers = peft.get_peft_model_state_dict(transformer)
    getattr(diffusers, name).save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_an_adapter_saved_by_diffusers_gives_their_output(options, name, tmp_path):
    ours, theirs = build_pair()
    (before,) = run_both(ours, None)
    config = add_peft_adapter(theirs, **PEFT_OPTIONS[options])
    lora = read_lora(saved_by_diffusers(name, theirs, config, tmp_path), CONFIG)
    assert set(lora.layers) == set(linear_shapes(CONFIG))
    apply_loras(ours, [LoraSetting(lora=lora)])
    got, expected = run_both(ours, theirs)
    assert relative_l2(before, expected) > 0.05
    assert relative_l2(got, expected) <= LIMIT
    apply_loras(ours, [])
    merge_loras(ours, [LoraSetting(lora=lora)])
    assert relative_l2(run_both(ours, None)[0], expected) <= LIMIT


def our_lora(tmp_path: Path, layers: list[str], alpha: float = 3.0) -> Lora:
    """Random factors with a scale that is no power of two, read as kohya's."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, layer in enumerate(layers):
        out_features, in_features = linear_shapes(CONFIG)[layer]
        rank = 4 if index % 3 else 2
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out_features, rank, generator=generator) / 4
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "ours.safetensors")
    return read_lora(tmp_path / "ours.safetensors", CONFIG)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("dialect", ["comfy", "kohya", "diffusers"])
def test_our_files_give_our_output_in_diffusers(dialect, name, tmp_path):
    layers = [layer for layer in linear_shapes(CONFIG) if layer not in UNREAD_BY_DIFFUSERS.get(dialect, ())]
    lora = our_lora(tmp_path, layers)
    assert reading_notes(lora, dialect) == (SEVERAL_RANKS if dialect != "diffusers" else ())
    ours, theirs = build_pair()
    apply_loras(ours, [LoraSetting(lora=lora)])
    path = write_lora(tmp_path / f"{dialect}.safetensors", lora, dialect)
    pipeline(name, theirs).load_lora_weights(str(path))
    got, expected = run_both(ours, theirs)
    assert relative_l2(got, run_both(build_pair()[0], None)[0]) > 0.05
    assert relative_l2(got, expected) <= LIMIT


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_layers_that_diffusers_misreads_are_named(dialect, tmp_path):
    for layer in UNREAD_BY_DIFFUSERS[dialect]:
        lora = our_lora(tmp_path, [layer])
        (note,) = reading_notes(lora, dialect)
        assert layer in note
        ours, theirs = build_pair()
        apply_loras(ours, [LoraSetting(lora=lora)])
        pipeline("Flux2Pipeline", theirs).load_lora_weights(str(write_lora(tmp_path / "a.safetensors", lora, dialect)))
        got, expected = run_both(ours, theirs)
        assert relative_l2(got, expected) > 100 * LIMIT, f"diffusers {diffusers.__version__} reads {layer} now"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_dora_gives_our_output_in_diffusers(dtype, tmp_path):
    """In bf16 too, where training keeps the magnitudes in fp32: in no file may they come first."""
    ours, theirs = build_pair()
    config = add_peft_adapter(theirs, lora_alpha=6, use_dora=True)
    lora = read_lora(saved_by_diffusers("Flux2Pipeline", theirs, config, tmp_path), CONFIG)
    factors = {
        layer: part.map(lambda t: t if t.shape[1] == 1 else t.to(dtype)) for layer, (part,) in lora.layers.items()
    }
    lora = replace(lora, layers={layer: (part,) for layer, part in factors.items()})
    assert len(reading_notes(lora)) == 4  # magnitudes in diffusers and in ComfyUI, ranks, and the last modulation
    kohya = write_lora(tmp_path / "kohya.safetensors", lora, "kohya")
    path = write_lora(tmp_path / "ours.safetensors", read_lora(kohya, CONFIG), "diffusers")
    assert load_file(path).keys() == load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()
    assert reading_notes(lora, "diffusers") == ()
    apply_loras(ours, [LoraSetting(lora=lora)])
    _, theirs = build_pair()
    pipeline("Flux2Pipeline", theirs).load_lora_weights(str(path))
    got, expected = run_both(ours, theirs)
    assert relative_l2(got, expected) <= LIMIT


def test_our_metadata_makes_their_config(tmp_path):
    lora = our_lora(tmp_path, list(linear_shapes(CONFIG)))
    path = write_lora(tmp_path / "a.safetensors", lora, "diffusers")
    state, metadata = diffusers.Flux2Pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    assert state.keys() == load_file(path).keys()
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    made = peft.LoraConfig(**config)
    assert made.lora_alpha == 3 and made.r in (2, 4) and not made.use_dora
    assert json.loads(lora.metadata.get("lora_adapter_metadata", "{}")) == {}
