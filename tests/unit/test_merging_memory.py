"""Host memory while weights are merged, quantised and written: one layer, beside what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from allocations import Allocations, peak_of
from flux2_kit.flux2_core import fp8, nf4
from flux2_kit.flux2_core.checkpoint import load_dit, save_dit
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.lora import (
    LiveFactors,
    LoraSetting,
    apply_loras,
    merge_checkpoint,
    merge_loras,
    merged_weight,
)
from flux2_kit.flux2_core.lora_factors import DiffFactors, Lora, LoraFactors, LoraReport
from flux2_kit.flux2_core.lora_files import linear_shapes
from flux2_kit.flux2_core.quantized_files import quantise_checkpoint
from flux2_kit.flux2_core.variants import VARIANTS

CONFIG = DiTConfig(
    hidden_size=128,
    num_heads=1,
    num_double_blocks=1,
    num_single_blocks=3,
    context_dim=64,
    has_guidance_embedder=False,
)
VARIANT = replace(VARIANTS["klein-9b"], dit=CONFIG)
LAYER = 9 * CONFIG.hidden_size**2
"""Numbers of the largest layer."""
ADAPTED = ("double_blocks.0.img_attn.qkv", *(f"single_blocks.{i}.linear1" for i in range(3)))
SMALL_TENSORS = 2**16


def random_dit() -> Flux2DiT:
    torch.manual_seed(0)
    return Flux2DiT(CONFIG).bfloat16().requires_grad_(False)


def setting(magnitude: str | None) -> LoraSetting:
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name in ADAPTED:
        rows, columns = linear_shapes(CONFIG)[name]
        layers[name] = (
            LoraFactors(
                lora_A=torch.randn(4, columns, generator=generator) / 8,
                lora_B=torch.randn(rows, 4, generator=generator) / 8,
                alpha=4.0,
                magnitude={None: None, "rows": torch.rand(rows, 1) + 0.5, "columns": torch.rand(1, columns) + 0.5}[
                    magnitude
                ],
            ),
        )
    report = LoraReport(dialects=(), groups=(), unmatched=())
    return LoraSetting(lora=Lora(name="x", config=CONFIG, layers=layers, report=report, metadata={}), strength=0.7)


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    # Slices that are small beside these layers, as they are beside real ones.
    monkeypatch.setattr(fp8, "SLICE_BYTES", 2**13)
    monkeypatch.setattr(nf4, "SLICE", 2**11)
    return save_dit(tmp_path / "base.safetensors", random_dit(), VARIANT)


def layers_of(work: Callable[[], object], kept_bytes: int = 0) -> float:
    """The peak, in numbers of the largest layer in fp32."""
    return (peak_of(work) - kept_bytes - SMALL_TENSORS) / (4 * LAYER)


@pytest.mark.parametrize(("magnitude", "limit"), [(None, 1.5), ("rows", 2), ("columns", 2)])
def test_merging_a_file_takes_one_layer_in_fp32_and_its_cast(base, tmp_path, magnitude, limit):
    settings, variants = [setting(magnitude)], {"klein-9b": VARIANT}
    merged = tmp_path / "merged.safetensors"
    assert layers_of(lambda: merge_checkpoint(base, settings, merged, variants=variants)) <= limit
    dit = random_dit()
    merge_loras(dit, settings)
    for name, tensor in load_dit(merged, variants=variants)[0].state_dict().items():
        assert torch.equal(tensor, dit.state_dict()[name]), name


@pytest.mark.parametrize(("magnitude", "limit"), [(None, 1.5), ("rows", 2)])
@pytest.mark.parametrize("file_format", ["fp8", "fp8-comfy"])
def test_quantising_a_file_takes_one_layer_in_fp32_and_its_numbers(base, tmp_path, file_format, magnitude, limit):
    out, variants = tmp_path / "out.safetensors", {"klein-9b": VARIANT}
    assert layers_of(lambda: quantise_checkpoint(base, out, file_format, variants=variants)) <= 1
    settings = [setting(magnitude)]
    assert layers_of(lambda: quantise_checkpoint(base, out, file_format, settings, variants=variants)) <= limit


@pytest.mark.parametrize("precision", ["fp8", "nf4", None])
def test_merging_while_loading_takes_one_layer_in_fp32_beside_the_result(base, precision):
    loaded = []

    def load() -> None:
        variants = {"klein-9b": VARIANT}
        loaded.append(load_dit(base, precision=precision, merge=[setting(None)], variants=variants)[0])

    peak = peak_of(load)
    kept = sum(tensor.nbytes for tensor in loaded[0].state_dict().values())
    assert (peak - kept - SMALL_TENSORS) / (4 * LAYER) <= 1.5


def test_merging_in_place_leaves_the_factors_alone_and_sees_the_weight_as_it_was():
    weight, magnitude = torch.randn(6, 8), torch.rand(6, 1) + 0.5
    diff = DiffFactors(diff=torch.randn(6, 8), magnitude=magnitude)
    low = LoraFactors(lora_A=torch.randn(2, 8), lora_B=torch.randn(6, 2), alpha=2.0, magnitude=magnitude)
    before = diff.diff.clone()
    for changes in ([(diff, 0.5)], [(low, 1.0), (diff, 0.5)], [(diff, 0.5), (low, 1.0)]):
        expected = weight + sum(strength * factors.change(weight) for factors, strength in changes)
        assert torch.allclose(merged_weight(weight.clone(), changes, in_place=True), expected, atol=1e-6)
        assert torch.equal(diff.diff, before)


def test_a_sum_that_is_not_finite_is_seen_wherever_it_is(base, tmp_path):
    for number in (torch.inf, -torch.inf, torch.nan, 1e38, -1e38):
        wrong = setting(None)
        wrong.lora.layers[ADAPTED[1]][0].lora_B[0, 0] = number  # pyright: ignore[reportAttributeAccessIssue]
        wrong = replace(wrong, strength=1e3)
        with pytest.raises(ValueError, match="too large"):
            merge_checkpoint(base, [wrong], tmp_path / "out.safetensors", variants={"klein-9b": VARIANT})


@pytest.mark.parametrize("magnitude", ["rows", "columns"])
def test_the_gain_of_a_magnitude_is_cast_and_moved_once(magnitude):
    dit = random_dit()
    apply_loras(dit, [setting(magnitude)])
    layer = dit.get_submodule(ADAPTED[1])
    assert isinstance(layer, Linear)
    adapter = layer.adapters[0]
    x = torch.randn(3, CONFIG.hidden_size).bfloat16()
    with torch.inference_mode():
        first = layer(x)
        with Allocations() as allocations:
            again = layer(x)
    assert torch.equal(first, again) and "aten::_to_copy" not in allocations.names
    assert isinstance(adapter, LiveFactors)
    assert not any(tensor.is_inference() for tensor in adapter._prepare_gain(x)), "training comes later"
    assert layer(x.float().bfloat16()).dtype == torch.bfloat16
    assert adapter._prepare_gain(x.half())[0].dtype == torch.float16
