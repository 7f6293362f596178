"""LoRA files of every dialect, live adapters, merges, extraction: one known set of factors, whole tensors, fp32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.checkpoint import load_dit, save_dit
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.lora import (
    LoraSetting,
    apply_loras,
    extract_lora,
    merge_checkpoint,
    merge_loras,
    merged_weight,
    remove_loras,
    save_merged_dit,
)
from flux2_kit.flux2_core.lora_factors import Lora, LoraFactors
from flux2_kit.flux2_core.lora_files import linear_shapes, read_lora
from flux2_kit.flux2_core.lora_writer import write_lora
from flux2_kit.flux2_core.variants import VARIANTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=True,
    rope_axes=(8, 8, 8, 8),
)
VARIANT = replace(VARIANTS["dev"], dit=CONFIG)
SMALL_VARIANTS = {"dev": VARIANT}
SHAPES = linear_shapes(CONFIG)
QKV = "double_blocks.1.img_attn.qkv"
PROJ = "double_blocks.0.txt_attn.proj"
SWAPPED = "final_layer.adaLN_modulation.1"
LIMIT = 1e-6

# Written out here, not taken from the package: a mistake in its tables must show.
DIFFUSERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
for _i in range(2):
    DIFFUSERS |= {
        f"double_blocks.{_i}.img_attn.qkv": f"transformer_blocks.{_i}.attn.to_q to_k to_v",
        f"double_blocks.{_i}.txt_attn.qkv": f"transformer_blocks.{_i}.attn.add_q_proj add_k_proj add_v_proj",
        f"double_blocks.{_i}.img_attn.proj": f"transformer_blocks.{_i}.attn.to_out.0",
        f"double_blocks.{_i}.txt_attn.proj": f"transformer_blocks.{_i}.attn.to_add_out",
        f"double_blocks.{_i}.img_mlp.0": f"transformer_blocks.{_i}.ff.linear_in",
        f"double_blocks.{_i}.img_mlp.2": f"transformer_blocks.{_i}.ff.linear_out",
        f"double_blocks.{_i}.txt_mlp.0": f"transformer_blocks.{_i}.ff_context.linear_in",
        f"double_blocks.{_i}.txt_mlp.2": f"transformer_blocks.{_i}.ff_context.linear_out",
        f"single_blocks.{_i}.linear1": f"single_transformer_blocks.{_i}.attn.to_qkv_mlp_proj",
        f"single_blocks.{_i}.linear2": f"single_transformer_blocks.{_i}.attn.to_out",
    }
Known = dict[str, tuple[Tensor, Tensor, float]]


def known_factors(seed: int = 0, alpha: float = 3.0) -> Known:
    """lora_A, lora_B and alpha of every layer; ranks 4 and 2, so that alpha / rank is no power of two."""
    generator = torch.Generator().manual_seed(seed)
    known = {}
    for index, (layer, (out_features, in_features)) in enumerate(SHAPES.items()):
        rank = 4 if index % 3 else 2
        lora_A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        lora_B = torch.randn(out_features, rank, generator=generator) / 4
        known[layer] = (lora_A, lora_B, alpha)
    return known


KNOWN = known_factors()


def dense(known: Known) -> dict[str, Tensor]:
    return {layer: alpha / A.shape[0] * (B @ A) for layer, (A, B, alpha) in known.items()}


def swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def modules(known: Known, naming: str) -> Known:
    """The factors by module of a naming: diffusers has q, k, v apart and other halves in norm_out."""
    if naming == "bfl":
        return known
    result: Known = {}
    for layer, (A, B, alpha) in known.items():
        stem, *rest = DIFFUSERS[layer].split(" ")
        B = swapped(B) if layer == SWAPPED else B
        names = [stem, *(f"{stem.rpartition('.')[0]}.{name}" for name in rest)]
        for name, part in zip(names, B.chunk(len(names)), strict=True):
            result[name] = (A.clone(), part.clone(), alpha)
    return result


def write(
    path: Path,
    known: Known,
    prefix: str = "",
    naming: str = "bfl",
    roles: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
    alpha: str = "tensor",
) -> Path:
    """A file of a dialect. ``alpha``: a tensor, the metadata, or multiplied in."""
    tensors, pattern = {}, {}
    for module, (A, B, value) in modules(known, naming).items():
        stem = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        if alpha == "baked":
            B = B * (value / A.shape[0])
        if alpha == "tensor":
            tensors[f"{stem}.alpha"] = torch.tensor(value)
        pattern[module] = value
        tensors |= {f"{stem}.{roles[0]}": A.clone(), f"{stem}.{roles[1]}": B.clone()}
    metadata = {"modelspec.title": "known", "ss_network_alpha": "77"}
    if alpha == "metadata":
        config = {"r": 4, "lora_alpha": 99, "alpha_pattern": pattern}
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": v for key, v in config.items()})
    save_file(tensors, path, metadata)
    return path


def assert_deltas(lora: Lora, expected: Mapping[str, Tensor], limit: float = LIMIT) -> None:
    assert lora.layers.keys() == expected.keys()
    for layer, delta in expected.items():
        got = torch.zeros_like(delta)
        for part in lora.layers[layer]:
            got[slice(*(part.rows or (0, None)))] += part.delta()
        assert (got - delta).norm() <= limit * delta.norm(), layer


def random_dit(dtype: torch.dtype = torch.float32) -> Flux2DiT:
    dit = Flux2DiT(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    return dit.to(dtype)


def run(dit: Flux2DiT) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    tokens, text = torch.randn(1, 12, 128, generator=generator), torch.randn(1, 5, 48, generator=generator)
    with torch.inference_mode():
        return dit(
            tokens.to(dit.dtype), image_ids(3, 4), text.to(dit.dtype), text_ids(5), torch.tensor([0.7]),
            torch.tensor([4.0]),
        )  # fmt: skip


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def lora(tmp_path) -> Lora:
    return read_lora(write(tmp_path / "known.safetensors", KNOWN, "lora_unet_"), CONFIG)


DIALECTS: dict[str, tuple] = {
    "no prefix": ("", "bfl", ("lora_A.weight", "lora_B.weight"), "tensor"),
    "no prefix, diffusers names": ("", "diffusers", ("lora_A.weight", "lora_B.weight"), "tensor"),
    "ai-toolkit, ours": ("diffusion_model.", "bfl", ("lora_A.weight", "lora_B.weight"), "baked"),
    "ComfyUI": ("diffusion_model.", "bfl", ("lora_down.weight", "lora_up.weight"), "tensor"),
    "ComfyUI, whole prefix": ("model.diffusion_model.", "bfl", ("lora_A.weight", "lora_B.weight"), "tensor"),
    "musubi, kohya": ("lora_unet_", "bfl", ("lora_down.weight", "lora_up.weight"), "tensor"),
    "kohya, diffusers names": ("lora_unet_", "diffusers", ("lora_down.weight", "lora_up.weight"), "tensor"),
    "diffusers": ("transformer.", "diffusers", ("lora_A.weight", "lora_B.weight"), "metadata"),
    "diffusers, baked": ("transformer.", "diffusers", ("lora_A.weight", "lora_B.weight"), "baked"),
    "old diffusers": ("transformer.", "diffusers", ("lora.down.weight", "lora.up.weight"), "tensor"),
    "SimpleTuner": ("transformer.", "diffusers", ("lora_A.weight", "lora_B.weight"), "tensor"),
    "DiffSynth": ("", "diffusers", ("lora_A.default.weight", "lora_B.default.weight"), "baked"),
    "PEFT": ("base_model.model.", "diffusers", ("lora_A.default.weight", "lora_B.default.weight"), "tensor"),
    "PEFT, BFL names": ("base_model.model.", "bfl", ("lora_A.weight", "lora_B.weight"), "tensor"),
    "PEFT, other adapter name": ("base_model.model.", "bfl", ("lora_A.mine.weight", "lora_B.mine.weight"), "tensor"),
    "OneTrainer": ("lora_transformer_", "diffusers", ("lora_down.weight", "lora_up.weight"), "tensor"),
    "LyCORIS": ("lycoris_", "diffusers", ("lora_down.weight", "lora_up.weight"), "tensor"),
    "LyCORIS, BFL names": ("lycoris_", "bfl", ("lora_down.weight", "lora_up.weight"), "tensor"),
}


def test_every_layer_of_the_model_is_among_the_known_factors():
    assert KNOWN.keys() == DIFFUSERS.keys() == SHAPES.keys()
    assert len(SHAPES) == 10 * 2 + 11


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_gives_the_same_change_of_every_layer(name, tmp_path):
    found = read_lora(write(tmp_path / "a.safetensors", KNOWN, *DIALECTS[name]), CONFIG)
    assert_deltas(found, dense(KNOWN))
    assert found.report.unmatched == ()
    assert set(found.report.matched) == set(SHAPES)
    assert len(found.report.dialects) == 1
    assert {(group.kind, group.rank) for group in found.report.groups} == {("LoRA", 2), ("LoRA", 4)}
    assert {group.alpha for group in found.report.groups} == ({2.0, 4.0} if "baked" in DIALECTS[name] else {3.0})
    assert found.metadata["ss_network_alpha"] == "77"


def test_dialects_are_told_apart_by_tensor(tmp_path):
    tensors = {}
    for index, layer in enumerate(SHAPES):
        dialect = list(DIALECTS.values())[index % len(DIALECTS)]
        dialect = (*dialect[:3], "tensor")
        file = write(tmp_path / f"{index}.safetensors", {layer: KNOWN[layer]}, *dialect)
        tensors |= load_file(file)
    save_file(tensors, tmp_path / "mixed.safetensors")
    assert_deltas(read_lora(tmp_path / "mixed.safetensors", CONFIG), dense(KNOWN))


def test_underscores_in_a_name_with_dots_are_understood(tmp_path):
    A, B, _ = KNOWN[QKV]
    stem = "diffusion_model.double_blocks.1.img_attn_qkv"
    save_file({f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}, tmp_path / "a.safetensors")
    assert_deltas(read_lora(tmp_path / "a.safetensors", CONFIG), {QKV: B @ A})


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 6}, 6.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attn.to_out.0": 2}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attn.to_q": 2}}, 6.0),
        ({"lora_alpha": 6, "alpha_pattern": {r"transformer_blocks\.\d+\.attn\..*": 5}}, 5.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6.0 * 2),
        ({"r": 16}, 4.0),
    ],
)
@pytest.mark.parametrize("place", ["metadata", "adapter_config.json"])
def test_alpha_of_peft(config, alpha, place, tmp_path):
    stem = "base_model.model.transformer_blocks.0.attn.to_out.0"
    A, B = torch.randn(4, 64), torch.randn(64, 4)
    metadata = {}
    if place == "metadata":
        wrapped = {f"transformer.{key}": value for key, value in config.items()} | {"text_encoder.lora_alpha": 50}
        metadata["lora_adapter_metadata"] = json.dumps(wrapped)
    else:
        (tmp_path / place).write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}, file, metadata)
    layer = "double_blocks.0.img_attn.proj"
    assert_deltas(read_lora(file, CONFIG), {layer: alpha / 4 * (B @ A)})


def test_an_expression_that_could_take_forever_is_refused(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 1, "alpha_pattern": {"((a+)+)+b": 1}})}
    save_file({"img_in.lora_A.weight": torch.ones(1, 128), "img_in.lora_B.weight": torch.ones(64, 1)},
              tmp_path / "a.safetensors", metadata)  # fmt: skip
    with pytest.raises(ValueError, match="too complicated"):
        read_lora(tmp_path / "a.safetensors", CONFIG)


def separate_qkv(tmp_path: Path, alphas: tuple[float, ...] = (3.0, 3.0, 3.0), names: str = "q k v") -> tuple:
    """A file with q, k, v that have lora_A of their own, and the change of the fused layer."""
    tensors, delta = {}, torch.zeros(192, 64)
    for index, name in enumerate("qkv"):
        A, B = torch.randn(4, 64), torch.randn(64, 4)
        if name in names:
            stem = f"transformer.transformer_blocks.1.attn.to_{name}"
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
            tensors[f"{stem}.alpha"] = torch.tensor(alphas[index])
            delta[64 * index : 64 * (index + 1)] = alphas[index] / 4 * (B @ A)
    save_file(tensors, tmp_path / "separate.safetensors")
    return read_lora(tmp_path / "separate.safetensors", CONFIG), delta, tensors


@pytest.mark.parametrize("alphas", [(3.0, 3.0, 3.0), (1.0, 2.0, 5.0)])
@pytest.mark.parametrize("names", ["q k v", "q", "k", "q v"])
def test_separate_q_k_v_are_exact_on_the_fused_layer(alphas, names, tmp_path):
    found, delta, _ = separate_qkv(tmp_path, alphas, names)
    assert_deltas(found, {QKV: delta})
    assert len(found.layers[QKV]) == 1


def factors_of(kind: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a kind and the change they make, by the formula of its paper."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if kind == "loha":
        w1_a, w1_b, w2_a, w2_b = (
            random(out_features, 3),
            random(3, in_features),
            random(out_features, 3),
            random(3, in_features),
        )
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        tensors = dict(zip(names, (w1_a, w1_b, w2_a, w2_b), strict=True))
        return tensors | {"alpha": torch.tensor(2.0)}, 2 / 3 * (w1_a @ w1_b) * (w2_a @ w2_b)
    if kind == "diff":
        diff = random(out_features, in_features)
        return {"diff": diff, "diff_b": torch.zeros(out_features)}, diff
    rows = 1 if kind.endswith("one row") else 4
    w1, w2 = random(rows, 2), random(out_features // rows, in_features // 2)
    if kind.startswith("lokr whole"):
        return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9999.0)}, torch.kron(w1, w2)
    w2_a, w2_b = random(out_features // rows, 3), random(3, in_features // 2)
    tensors = {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(2.0)}
    if kind == "lokr":
        return tensors | {"lokr_w1": w1}, 2 / 3 * torch.kron(w1, w2_a @ w2_b)
    assert kind == "lokr both"
    w1_a, w1_b = random(rows, 3), random(3, 2)
    return tensors | {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b}, 2 / 3 * torch.kron(w1_a @ w1_b, w2_a @ w2_b)


KINDS = ["loha", "lokr", "lokr both", "lokr whole", "lokr whole, one row", "diff"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", ["diffusion_model.", "lora_unet_", "lycoris_", "transformer."])
def test_other_kinds_of_factors(kind, dialect, tmp_path):
    """On a plain layer, on one whose halves diffusers swaps, and on k of a fused layer."""
    diffusers = dialect in ("lycoris_", "transformer.")
    tensors, expected = {}, {}
    for layer in (PROJ, SWAPPED, QKV):
        part = diffusers and layer == QKV
        found, delta = factors_of(kind, (64, 64) if part else SHAPES[layer])
        name = "transformer_blocks.1.attn.to_k" if part else DIFFUSERS[layer] if diffusers else layer
        name = name.replace(".", "_") if dialect.endswith("_") else name
        tensors |= {f"{dialect}{name}.{role}": tensor for role, tensor in found.items()}
        expected[layer] = swapped(delta) if diffusers and layer == SWAPPED else delta
        if part:
            expected[layer] = torch.cat((torch.zeros(64, 64), delta, torch.zeros(64, 64)))
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", CONFIG)
    assert_deltas(found, expected)
    assert_live_equals_merged(found)


def test_an_odd_lokr_on_the_swapped_layer(tmp_path):
    # 128 rows are no multiple of 3, but a LoKr may have w1 of one row and this checks the dense way out.
    config = replace(CONFIG, rope_axes=(6, 6, 6, 6), hidden_size=48)
    w1, w2 = torch.randn(3, 2), torch.randn(32, 24)
    save_file({"norm_out.linear.lokr_w1": w1, "norm_out.linear.lokr_w2": w2}, tmp_path / "a.safetensors")
    assert_deltas(read_lora(tmp_path / "a.safetensors", config), {SWAPPED: swapped(torch.kron(w1, w2))})


def assert_live_equals_merged(lora: Lora, strength: float = 0.7) -> None:
    live, merged = random_dit(), random_dit()
    before = run(live)
    apply_loras(live, [LoraSetting(lora=lora, strength=strength)])
    merge_loras(merged, [LoraSetting(lora=lora, strength=strength)])
    assert relative(run(live), run(merged)) <= 1e-5
    assert relative(run(live), before) > 1e-3


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("naming", ["bfl", "diffusers"])
def test_dora_is_the_formula_of_the_paper(axis, naming, tmp_path):
    """Magnitude times the direction of W + delta, normed per row or column; also with halves swapped, q, k, v apart."""
    dit = random_dit()
    weights = dict(dit.named_parameters())
    strength, expected, tensors = 0.6, {}, {}
    for layer in (PROJ, SWAPPED, QKV):
        weight = weights[f"{layer}.weight"]
        A, B, alpha = KNOWN[layer]
        magnitude = 0.5 + torch.rand((weight.shape[0], 1) if axis == "row" else (1, weight.shape[1]))
        changed = weight + alpha / A.shape[0] * (B @ A)
        split = naming == "diffusers" and layer == QKV
        blocks = changed.chunk(3) if split else [changed]
        norms = [block.norm(dim=1 if axis == "row" else 0, keepdim=True) for block in blocks]
        magnitudes = magnitude.chunk(3) if split and axis == "row" else [magnitude] * len(blocks)
        tuned = torch.cat([m * b / n for m, b, n in zip(magnitudes, blocks, norms, strict=True)])
        expected[layer] = weight + strength * (tuned - weight)
        if layer == SWAPPED and axis == "row" and naming == "diffusers":
            magnitudes = [swapped(magnitude)]
        for (name, (a, b, value)), m in zip(modules({layer: KNOWN[layer]}, naming).items(), magnitudes, strict=True):
            stem = f"transformer.{name}"
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(value)}
            peft = axis == "row" and naming == "diffusers"
            role, value = ("lora_magnitude_vector", m[:, 0]) if peft else ("dora_scale", m)
            if axis == "row" and layer == PROJ:
                role, value = "magnitude", m[:, 0]  # as ai-toolkit has it
            tensors[f"{stem}.{role}"] = value.clone()
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", CONFIG)
    assert found.report.kinds == ("DoRA",)
    for layer, tuned in expected.items():
        got = merged_weight(weights[f"{layer}.weight"], [(part, strength) for part in found.layers[layer]])
        assert relative(got, tuned) <= LIMIT, layer
    assert_live_equals_merged(found, strength)


def test_merged_and_live_agree(lora):
    assert_live_equals_merged(lora)
    assert_live_equals_merged(lora, -1.3)


def test_live_loras_leave_weights_and_state_dict_alone(lora):
    dit = random_dit()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    plain = run(dit)
    apply_loras(dit, [LoraSetting(lora=lora, strength=0.8)])
    assert relative(run(dit), plain) > 1e-2
    assert dit.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    remove_loras(dit)
    assert torch.equal(run(dit), plain)


def test_setting_twice_applies_once_and_reweighting_forgets(lora):
    dit = random_dit()
    apply_loras(dit, [LoraSetting(lora=lora, strength=0.5)])
    once = run(dit)
    assert torch.equal(run(dit), once)
    apply_loras(dit, [LoraSetting(lora=lora, strength=0.5)])
    assert torch.equal(run(dit), once)
    apply_loras(dit, [LoraSetting(lora=lora, strength=1.0)])
    assert relative(run(dit), once) > 1e-3
    apply_loras(dit, [LoraSetting(lora=lora, strength=0.5)])
    assert torch.equal(run(dit), once)


def test_loras_add_up_in_any_order(lora, tmp_path):
    other = read_lora(write(tmp_path / "other.safetensors", known_factors(seed=9), "lora_unet_"), CONFIG)
    settings = [LoraSetting(lora=lora, strength=0.6), LoraSetting(lora=other, strength=-0.4)]
    outputs = []
    for order in (settings, settings[::-1]):
        dit = random_dit()
        apply_loras(dit, order)
        outputs.append(run(dit))
    merged = random_dit()
    for name, parameter in merged.named_parameters():
        if (layer := name.removesuffix(".weight")) in SHAPES:
            parameter += 0.6 * dense(KNOWN)[layer] - 0.4 * dense(known_factors(seed=9))[layer]
    assert relative(outputs[0], outputs[1]) <= 1e-6
    assert relative(outputs[0], run(merged)) <= 1e-5
    once = random_dit()
    apply_loras(once, settings[:1])
    assert relative(outputs[0], run(once)) > 1e-3


@pytest.mark.parametrize("shape", [(64, 1), (1, 64)])
def test_dora_beside_another_lora_starts_from_the_base_weight(shape, lora, tmp_path):
    A, B, alpha = KNOWN[PROJ]
    magnitude = 0.5 + torch.rand(shape)
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "alpha": torch.tensor(alpha), "dora_scale": magnitude}
    save_file({f"{PROJ}.{role}": tensor for role, tensor in tensors.items()}, tmp_path / "dora.safetensors")
    dora = LoraSetting(lora=read_lora(tmp_path / "dora.safetensors", CONFIG), strength=0.8)
    plain = LoraSetting(lora=lora, strength=0.5, include=[f"^{PROJ}$"])

    weight = random_dit().get_submodule(PROJ).weight
    changed = weight + dense(KNOWN)[PROJ]
    tuned = magnitude * changed / changed.norm(dim=1 if shape[1] == 1 else 0, keepdim=True)
    expected = random_dit()
    expected.get_submodule(PROJ).weight.data = weight + 0.5 * dense(KNOWN)[PROJ] + 0.8 * (tuned - weight)
    for settings in ([plain, dora], [dora, plain]):
        live, merged = random_dit(), random_dit()
        apply_loras(live, settings)
        merge_loras(merged, settings)
        assert relative(run(live), run(expected)) <= 1e-6
        assert relative(merged.get_submodule(PROJ).weight, expected.get_submodule(PROJ).weight) <= LIMIT


def adapted(dit: Flux2DiT) -> set[str]:
    return {name for name, module in dit.named_modules() if getattr(module, "adapters", ())}


def test_strength_zero_costs_nothing(lora):
    dit = random_dit()
    plain = run(dit)
    apply_loras(dit, [LoraSetting(lora=lora, strength=0.0)])
    assert not adapted(dit)
    assert torch.equal(run(dit), plain)
    apply_loras(dit, [LoraSetting(lora=lora, block_strengths={"single_blocks": 0, "single_blocks.1": 1})])
    assert adapted(dit) == {layer for layer in SHAPES if not layer.startswith("single_blocks.0")}


def test_patterns_choose_layers(lora):
    dit = random_dit()
    apply_loras(dit, [LoraSetting(lora=lora, include=["_attn", r"^img_in$"], exclude=[r"blocks\.0\."])])
    assert adapted(dit) == {"img_in"} | {
        f"double_blocks.1.{s}_attn.{k}" for s in ("img", "txt") for k in ("qkv", "proj")
    }


def test_block_strengths_multiply(lora):
    setting = LoraSetting(lora=lora, strength=0.5, block_strengths={"double_blocks": 3, "double_blocks.1.img_mlp": -1})
    strengths = setting.layer_strengths()
    assert strengths["double_blocks.0.img_mlp.0"] == 1.5
    assert strengths["double_blocks.1.img_mlp.0"] == -0.5
    assert strengths["img_in"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": math.nan}, "must be finite"),
        ({"include": ["("]}, "no regular expression"),
        ({"include": ["nothing"]}, "leave no layer"),
        ({"include": "img"}, "must be a list"),
        ({"block_strengths": {"double_blocks.7": 1.0}}, "no layer begins with"),
        ({"block_strengths": {"double": 1.0}}, "no layer begins with"),
    ],
)
def test_wrong_settings_change_nothing(lora, options, message):
    dit = random_dit()
    apply_loras(dit, [LoraSetting(lora=lora, include=["img_in"])])
    before = run(dit)
    with pytest.raises(ValueError, match=message) as error:
        apply_loras(dit, [LoraSetting(lora=lora), LoraSetting(lora=lora, **options)])
    assert "\n" not in str(error.value)
    assert torch.equal(run(dit), before)


def test_a_bf16_model_runs_them_in_bf16(lora):
    dit, exact = random_dit(torch.bfloat16), random_dit()
    for model in (dit, exact):
        apply_loras(model, [LoraSetting(lora=lora, strength=0.7)])
    got = run(dit)
    assert got.dtype == torch.bfloat16
    assert relative(got, run(exact)) < 0.05
    assert dit.img_in.weight.dtype == torch.bfloat16


def test_a_merge_is_cast_once(lora):
    dit = random_dit(torch.bfloat16)
    weight = dit.img_in.weight.clone()
    merge_loras(dit, [LoraSetting(lora=lora, strength=0.3), LoraSetting(lora=lora, strength=0.4)])
    delta = dense(KNOWN)["img_in"]
    assert torch.equal(dit.img_in.weight, (weight.float() + 0.3 * delta + 0.4 * delta).bfloat16())


def test_a_merge_beside_live_loras_is_refused(lora):
    dit = random_dit()
    apply_loras(dit, [LoraSetting(lora=lora)])
    with pytest.raises(ValueError, match="live LoRAs"):
        merge_loras(dit, [LoraSetting(lora=lora)])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_checkpoint_is_merged_as_the_model_is(lora, layout, dtype, tmp_path):
    dit = random_dit()
    save_dit(tmp_path / "base.safetensors", dit, VARIANT, layout)
    settings = [LoraSetting(lora=lora, strength=0.9)]
    out = merge_checkpoint(tmp_path / "base.safetensors", settings, tmp_path / "merged.safetensors", dtype,
                           variants=SMALL_VARIANTS)  # fmt: skip
    merge_loras(dit, settings)
    loaded, variant = load_dit(out, variants=SMALL_VARIANTS)
    assert variant == VARIANT
    expected = dit.to(dtype or torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert load_file(out).keys() == expected.keys()  # the safetensors library reads it too
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        "known.safetensors",
        "merged.safetensors",
    ]


def test_a_failed_merge_leaves_the_file_that_was_there(lora, tmp_path):
    save_dit(tmp_path / "base.safetensors", random_dit(), VARIANT)
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        merge_checkpoint(tmp_path / "base.safetensors", [LoraSetting(lora=lora, strength=1e7)], out, torch.float16,
                         variants=SMALL_VARIANTS)  # fmt: skip
    assert out.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_extraction_finds_the_factors_of_a_merge(lora, tmp_path):
    dit = random_dit()
    save_dit(tmp_path / "base.safetensors", dit, VARIANT)
    out = merge_checkpoint(tmp_path / "base.safetensors", [LoraSetting(lora=lora, exclude=["img_in"])],
                           tmp_path / "tuned.safetensors", variants=SMALL_VARIANTS)  # fmt: skip
    found = extract_lora(tmp_path / "base.safetensors", out, 4, variants=SMALL_VARIANTS)
    assert_deltas(found, {layer: delta for layer, delta in dense(KNOWN).items() if layer != "img_in"}, 1e-5)
    assert all(part.rank <= 4 for parts in found.layers.values() for part in parts)
    again = read_lora(write_lora(tmp_path / "found.safetensors", found), CONFIG)
    assert again.report.matched == found.report.matched
    # A smaller rank is the nearest there is: Eckart and Young.
    small = extract_lora(tmp_path / "base.safetensors", out, 1, variants=SMALL_VARIANTS)
    delta = dense(KNOWN)[QKV]
    singular = torch.linalg.svdvals(delta)
    assert (delta - small.layers[QKV][0].delta()).norm().item() == pytest.approx(singular[1:].norm().item(), rel=1e-4)


def test_extraction_of_large_layers_is_as_good(lora, tmp_path, monkeypatch):
    """Layers of real models are decomposed by iteration: what has the rank is found all the same."""
    monkeypatch.setattr("flux2_kit.flux2_core.lora.EXACT_SVD_SIDE", 0)
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    save_dit(paths[0], random_dit(), VARIANT)
    merge_checkpoint(paths[0], [LoraSetting(lora=lora)], paths[1], variants=SMALL_VARIANTS)
    state = torch.random.get_rng_state()
    found = extract_lora(*paths, 4, variants=SMALL_VARIANTS)
    assert_deltas(found, dense(KNOWN), 1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_extraction_of_what_a_lora_cannot_hold(tmp_path):
    dit = random_dit()
    save_dit(tmp_path / "base.safetensors", dit, VARIANT)
    dit.single_blocks[0].norm.key_norm.scale += 0.1
    dit.single_blocks[0].linear2.weight += 0.1
    save_dit(tmp_path / "tuned.safetensors", dit, VARIANT)
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    with pytest.raises(ValueError, match="key_norm"):
        extract_lora(*paths, 1, variants=SMALL_VARIANTS)
    found = extract_lora(*paths, 1, variants=SMALL_VARIANTS, allow_unmatched=True)
    assert found.report.matched == ("single_blocks.0.linear2",)
    assert found.report.unmatched == ("single_blocks.0.norm.key_norm.scale",)
    with pytest.raises(ValueError, match="do not differ"):
        extract_lora(paths[0], paths[0], 1, variants=SMALL_VARIANTS)
    with pytest.raises(ValueError, match="1 or more"):
        extract_lora(*paths, 0, variants=SMALL_VARIANTS)


def same_file(first: Path, second: Path) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype, name


BAKED = ("comfy", "diffsynth")


@pytest.mark.parametrize("through", ["comfy", "kohya", "diffusers", "diffsynth"])
@pytest.mark.parametrize("start", ["comfy", "kohya", "diffusers", "diffsynth"])
def test_round_trips_are_exact(lora, start, through, tmp_path):
    """Two have no alpha: from the others, the file that comes back says the same with alpha multiplied in."""
    first = write_lora(tmp_path / "1.safetensors", lora, start)
    there = write_lora(tmp_path / "2.safetensors", read_lora(first, CONFIG), through)
    back = write_lora(tmp_path / "3.safetensors", read_lora(there, CONFIG), start)
    if through not in BAKED or start in BAKED:
        same_file(first, back)
    assert_deltas(read_lora(back, CONFIG), dense(KNOWN))
    assert {group.rank for group in read_lora(back, CONFIG).report.groups} == {2, 4}
    if METADATA in (from_file := read_lora(there, CONFIG).metadata):
        config = json.loads(from_file[METADATA])
        assert config["transformer.r"] in (2, 4)


METADATA = "lora_adapter_metadata"


def test_a_file_for_diffsynth_is_like_its_own(lora, tmp_path):
    theirs = load_file(write(tmp_path / "theirs.safetensors", KNOWN, *DIALECTS["DiffSynth"]))
    ours = load_file(write_lora(tmp_path / "ours.safetensors", lora, "diffsynth"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) <= LIMIT, name


@pytest.mark.parametrize("through", ["comfy", "kohya"])
@pytest.mark.parametrize("names", ["q k v", "q", "k v"])
def test_separate_q_k_v_come_back_separate(through, names, tmp_path):
    found, _, tensors = separate_qkv(tmp_path, (4.0, 4.0, 4.0), names)
    there = write_lora(tmp_path / "there.safetensors", found, through)
    back = load_file(write_lora(tmp_path / "back.safetensors", read_lora(there, CONFIG), "diffusers"))
    factors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    assert back.keys() == factors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in factors.items())


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_of_other_kinds(kind, dialect, tmp_path):
    found, delta = factors_of(kind, SHAPES[PROJ])
    save_file(
        {f"lora_unet_{PROJ.replace('.', '_')}.{role}": t for role, t in found.items()}, tmp_path / "a.safetensors"
    )
    first = write_lora(tmp_path / "1.safetensors", read_lora(tmp_path / "a.safetensors", CONFIG), dialect)
    other = "kohya" if dialect == "comfy" else "comfy"
    there = write_lora(tmp_path / "2.safetensors", read_lora(first, CONFIG), other)
    back = write_lora(tmp_path / "3.safetensors", read_lora(there, CONFIG), dialect)
    assert_deltas(read_lora(back, CONFIG), {PROJ: delta})
    if dialect == "comfy":
        same_file(first, back)
        assert not any(name.endswith("alpha") for name in load_file(first))


@pytest.mark.parametrize("dialect", ["comfy", "kohya", "diffusers"])
def test_round_trips_of_dora(dialect, tmp_path):
    tensors = {}
    for layer in (PROJ, QKV, SWAPPED):
        A, B, alpha = KNOWN[layer]
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(alpha)}
        tensors[f"{stem}.dora_scale"] = torch.rand(B.shape[0], 1)
    save_file(tensors, tmp_path / "a.safetensors")
    there = write_lora(tmp_path / "there.safetensors", read_lora(tmp_path / "a.safetensors", CONFIG), dialect)
    back = read_lora(there, CONFIG)
    assert back.report.kinds == ("DoRA",)
    for layer in (PROJ, QKV, SWAPPED):
        (part,) = back.layers[layer]
        assert torch.equal(part.magnitude, tensors[f"lora_unet_{layer.replace('.', '_')}.dora_scale"])
        assert relative(part.delta(), dense(KNOWN)[layer]) <= LIMIT
    if dialect != "comfy":
        same_file(tmp_path / "a.safetensors", write_lora(tmp_path / "back.safetensors", back, "kohya"))


def test_metadata_is_kept_and_stale_hashes_are_not(tmp_path):
    A, B, _ = KNOWN["img_in"]
    metadata = {"ss_steps": "100", "modelspec.title": "mine", "modelspec.author": "me", "sshs_model_hash": "abc"}
    save_file({"img_in.lora_A.weight": A, "img_in.lora_B.weight": B}, tmp_path / "a.safetensors", metadata)
    out = write_lora(tmp_path / "b.safetensors", read_lora(tmp_path / "a.safetensors", CONFIG), metadata={"mine": "1"})
    found = read_lora(out, CONFIG).metadata
    assert found["sshs_model_hash"] not in ("abc", "")
    assert {key: found.get(key) for key in (*metadata, "mine")} == metadata | {
        "sshs_model_hash": found["sshs_model_hash"], "mine": "1"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_the_output(lora, dtype, tmp_path):
    tensors = load_file(write_lora(tmp_path / "a.safetensors", lora, "kohya", dtype))
    assert {t.dtype for name, t in tensors.items() if not name.endswith("alpha")} == {dtype}
    assert {t.dtype for name, t in tensors.items() if name.endswith("alpha")} == {torch.float32}
    assert_deltas(read_lora(tmp_path / "a.safetensors", CONFIG), dense(KNOWN), {4: LIMIT, 2: 1e-2}[dtype.itemsize])


def test_what_a_dialect_cannot_express_is_named(lora, tmp_path):
    def read(tensors: dict[str, Tensor]) -> Lora:
        save_file(tensors, tmp_path / "a.safetensors")
        return read_lora(tmp_path / "a.safetensors", CONFIG)

    A, B, _ = KNOWN["img_in"]
    plain = {"img_in.lora_A.weight": A, "img_in.lora_B.weight": B}
    lokr = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(32, 32)}
    column = read(plain | {"img_in.dora_scale": torch.ones(1, 128)})
    mixed = read(plain | {"txt_in.dora_scale": torch.ones(64, 1), "txt_in.lora_A.weight": torch.ones(2, 48),
                          "txt_in.lora_B.weight": torch.ones(64, 2)})  # fmt: skip
    dora = read(plain | {"img_in.dora_scale": torch.ones(64, 1)})
    whole = read({f"{PROJ}.{role}": tensor for role, tensor in lokr.items()})
    part = read({f"transformer_blocks.1.attn.to_k.{role}": tensor for role, tensor in lokr.items()})
    for found, dialect, message in (
        (column, "diffusers", "img_in has a magnitude per column"),
        (mixed, "diffusers", "x_embedder has no DoRA"),
        (whole, "diffusers", f"{PROJ} is a LoKr"),
        (whole, "diffsynth", f"{PROJ} is a LoKr"),
        (dora, "diffsynth", "x_embedder is a DoRA, which DiffSynth-Studio does not have"),
        (part, "comfy", f"LoKr of separate q, k, v in {QKV}"),
        (part, "kohya", f"LoKr of separate q, k, v in {QKV}"),
        (lora, "peft", "unknown LoRA dialect"),
    ):
        with pytest.raises(ValueError, match=message):
            write_lora(tmp_path / "out.safetensors", found, dialect)
    big = replace(lora, layers={"img_in": (LoraFactors(lora_A=A, lora_B=1e6 * B, alpha=2.0),)})
    with pytest.raises(ValueError, match="too large"):
        write_lora(tmp_path / "out.safetensors", big, dtype=torch.float16)
    assert not (tmp_path / "out.safetensors").exists()


def bad(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        tensors = load_file(write(path, KNOWN, "diffusion_model."))
        change(tensors)
        save_file(tensors, path)

    return make


def set_shape(name: str, *shape: int) -> Callable[[Path], None]:
    return bad(lambda tensors: tensors.update({f"diffusion_model.{name}": torch.ones(shape)}))


def truncate(path: Path) -> None:
    content = write(path, KNOWN, "diffusion_model.").read_bytes()
    path.write_bytes(content[: len(content) // 2])


def nan(tensors: dict[str, Tensor]) -> None:
    tensors["diffusion_model.img_in.lora_B.weight"][3, 0] = torch.nan


def both_dialects(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_img_in.lora_down.weight"] = tensors["diffusion_model.img_in.lora_A.weight"].clone()


def whole_and_parts(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.transformer_blocks.1.attn.to_q.lora_A.weight"] = torch.ones(4, 64)
    tensors["transformer.transformer_blocks.1.attn.to_q.lora_B.weight"] = torch.ones(64, 4)


def text_encoder(path: Path) -> None:
    names = ("lora_te_layers_0_q.lora_down.weight", "text_encoder.x.lora_B.weight")
    save_file({name: torch.ones(4, 8) for name in names}, path)


def larger(path: Path) -> None:
    A, B = torch.ones(4, 4096), torch.ones(12288, 4)
    save_file({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": A,
               "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": B}, path)  # fmt: skip


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is truncated"),
    "empty": (lambda path: path.write_bytes(b""), "holds 0 bytes"),
    "no tensors": (lambda path: save_file({}, path), "holds no tensors"),
    "missing": (lambda path: None, "does not exist"),
    "ranks differ": (set_shape("img_in.lora_A.weight", 3, 128), "different ranks"),
    "rank 0": (
        bad(lambda t: t.update({"diffusion_model.img_in.lora_A.weight": torch.ones(0, 128),
                                "diffusion_model.img_in.lora_B.weight": torch.ones(64, 0)})),
        "must be matrices",
    ),
    "wrong width": (set_shape("img_in.lora_A.weight", 2, 64), "of another size or model"),
    "not a matrix": (set_shape("img_in.lora_A.weight", 2, 128, 1, 1), "must be matrices"),
    "NaN": (bad(nan), "not finite"),
    "NaN alpha": (bad(lambda t: t.update({"diffusion_model.img_in.alpha": torch.tensor(torch.nan)})), "not finite"),
    "alpha 0": (bad(lambda t: t.update({"diffusion_model.img_in.alpha": torch.tensor(0.0)})), "other than 0"),
    "integers": (
        bad(lambda t: t.update({"diffusion_model.img_in.lora_A.weight": torch.ones(2, 128, dtype=torch.int8)})),
        "must be floating-point",
    ),
    "half of a pair": (bad(lambda t: t.pop("diffusion_model.img_in.lora_A.weight")), "no lora_A"),
    "alpha alone": (
        bad(lambda t: [t.pop(f"diffusion_model.img_in.lora_{side}.weight") for side in "AB"]),
        "no factors beside it",
    ),
    "two kinds": (bad(lambda t: t.update({"img_in.diff": torch.ones(64, 128)})), "several kinds"),
    "bias": (bad(lambda t: t.update({"img_in.diff_b": torch.ones(64)})), "changes a bias"),
    "PEFT bias": (bad(lambda t: t.update({"img_in.lora_B.bias": torch.ones(64)})), "changes a bias"),
    "convolution": (bad(lambda t: t.update({"img_in.lora_mid.weight": torch.ones(2, 2)})), "convolution"),
    "magnitude": (bad(lambda t: t.update({"img_in.dora_scale": torch.ones(7, 1)})), "DoRA magnitude"),
    "a checkpoint": (lambda path: save_dit(path, random_dit(), VARIANT), "is a FLUX.2 DiT, not a LoRA"),
    "text encoder": (text_encoder, "only adapts a text encoder"),
    "two dialects": (bad(both_dialects), "for one layer; keep one"),
    "whole and parts": (bad(whole_and_parts), "both whole and as separate"),
    "unknown layer": (bad(lambda t: t.update({"nothing.lora_A.weight": torch.ones(2, 2)})), "1 tensors of .* nothing"),
    "unknown role": (bad(lambda t: t.update({"img_in.oft_blocks": torch.ones(2, 2)})), "img_in.oft_blocks"),
    "nothing matches": (
        lambda path: save_file({"lora_unet_input_blocks_1.lora_down.weight": torch.ones(2, 2)}, path),
        "nothing in .* matches",
    ),
    "another size": (larger, "LoRA of another size, klein-9b or klein-base-9b"),
    "more blocks": (
        bad(lambda t: t.update({"double_blocks.6.img_attn.qkv.lora_A.weight": torch.ones(2, 64)})),
        "does not have .*double_blocks.6.* has; give a LoRA of this model's size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name, tmp_path):
    make, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, CONFIG)
    assert "\n" not in str(error.value)
    assert "bad.safetensors" in str(error.value)


@pytest.mark.parametrize(("dialect", "naming"), [("diffusion_model.", "bfl"), ("transformer.", "diffusers")])
def test_a_lora_for_9b_on_4b_says_so(dialect, naming, tmp_path):
    """All its layers, of which 4B has a part, in smaller."""
    tensors = {}
    for index in range(8):
        name = f"double_blocks.{index}.img_attn.qkv" if naming == "bfl" else f"transformer_blocks.{index}.attn.to_k"
        tensors[f"{dialect}{name}.lora_A.weight"] = torch.ones(1, 4096)
        tensors[f"{dialect}{name}.lora_B.weight"] = torch.ones(12288 if naming == "bfl" else 4096, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another size, klein-9b .*; give a LoRA of this model's size"):
        read_lora(tmp_path / "a.safetensors", VARIANTS["klein-4b"].dit)
    read_lora(tmp_path / "a.safetensors", VARIANTS["klein-9b"].dit)


def test_unmatched_names_may_be_allowed_and_are_reported(tmp_path):
    tensors = load_file(write(tmp_path / "a.safetensors", KNOWN, "diffusion_model."))
    extra = {"lora_te_x.lora_down.weight": torch.ones(2, 2), "nothing.lora_A.weight": torch.ones(2, 2)}
    save_file(tensors | extra, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"2 tensors .* 1 of them a text encoder's"):
        read_lora(tmp_path / "a.safetensors", CONFIG)
    found = read_lora(tmp_path / "a.safetensors", CONFIG, allow_unmatched=True)
    assert_deltas(found, dense(KNOWN))
    assert set(found.report.unmatched) == set(extra)
    assert "lora_te_x" in found.report.summary() and "LoRA rank 4 alpha 3" in found.report.summary()
    save_file(extra, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="nothing in"):
        read_lora(tmp_path / "a.safetensors", CONFIG, allow_unmatched=True)


def test_a_lora_of_another_model_is_refused_and_the_model_stays(lora):
    other = Flux2DiT(replace(CONFIG, num_single_blocks=1)).eval()
    before = run(other)
    with pytest.raises(ValueError, match="no such layer"):
        apply_loras(other, [LoraSetting(lora=lora)])
    with pytest.raises(ValueError, match="no such layer"):
        merge_loras(other, [LoraSetting(lora=lora)])
    assert torch.equal(run(other), before)
    assert isinstance(other.img_in, nn.Linear)


def test_saving_a_merge_with_a_lora_of_another_model_writes_nothing(lora, tmp_path):
    smaller = replace(CONFIG, num_single_blocks=1)
    path = tmp_path / "merged.safetensors"
    with pytest.raises(ValueError, match="no such layer"):
        save_merged_dit(path, Flux2DiT(smaller), replace(VARIANT, dit=smaller), [LoraSetting(lora=lora)])
    assert not path.exists()
