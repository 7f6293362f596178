"""Weight formats of a Linear: rounding errors, the 8-bit product, backward without a copy, adapters, moves."""

from __future__ import annotations

import logging
import sys

import bitsandbytes.functional as functional
import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core import fp8, nf4
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.linear import FORMATS, Linear
from flux2_kit.flux2_core.lora import LoraSetting, apply_loras, merge_loras, save_merged_dit
from flux2_kit.flux2_core.lora_factors import Lora, LoraFactors, LoraReport
from flux2_kit.flux2_core.lora_files import linear_shapes
from flux2_kit.flux2_core.variants import VARIANTS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FORMAT_NAMES = ("fp8", "nf4")
WEIGHT_ERROR = {"fp8": 0.027, "nf4": 0.089}
"""Of Gaussian weights; the rounding itself gives 0.0265 and, in blocks of 64, 0.0918."""
SMALL = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=1,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)


@pytest.fixture(autouse=True)
def untried_devices(monkeypatch):
    monkeypatch.setattr(fp8, "_scaled_mm", {})


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def make_linear(generator: torch.Generator, weight_format: str | None, columns: int = 160, rows: int = 96) -> Linear:
    linear = Linear(columns, rows).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, columns, generator=generator))
    if weight_format:
        linear.quantise(weight_format)  # pyright: ignore[reportArgumentType]
    return linear


# Rounding


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
@pytest.mark.parametrize("shape", [(512, 1024), (200, 160), (3, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_as_near_as_the_format_allows(generator, weight_format, shape, dtype):
    weight = torch.randn(shape, generator=generator).to(dtype)
    functions = FORMATS[weight_format]
    quantised, scale = functions.quantise(weight)
    dense = functions.dequantise(quantised, scale, torch.float32)
    bound = WEIGHT_ERROR[weight_format] * (1 if weight.numel() > 1000 else 2)
    assert dense.shape == weight.shape and relative(dense, weight) <= bound
    assert relative(functions.dequantise(quantised, scale, dtype), weight) <= bound
    bits = 8 * (quantised.nbytes + scale.nbytes) / weight.numel()
    assert bits <= {"fp8": 8 + 32 / shape[1], "nf4": 4.25 + 16 / weight.numel()}[weight_format]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_with_its_activations_in_8_bits_is_within_the_limit(generator, dtype):
    x = torch.randn(256, 1024, generator=generator).to(dtype)
    weight = torch.randn(512, 1024, generator=generator).to(dtype)
    quantised, scale = fp8.quantise_rows(x)
    assert quantised.dtype == fp8.E4M3 and scale.shape == (256, 1) and scale.dtype == torch.float32
    dense = fp8.dequantise(*fp8.quantise(weight), torch.float32)
    output = F.linear(quantised.float() * scale, dense)
    assert 0.03 < relative(output, F.linear(x.float(), weight.float())) <= 0.039


def test_slices_of_rows_change_nothing(generator, monkeypatch):
    weight = torch.randn(130, 48, generator=generator)
    whole = fp8.quantise(weight), fp8.quantise_per_tensor(weight)
    monkeypatch.setattr(fp8, "SLICE_BYTES", 4 * 48 * 7)
    for (quantised, scale), (expected, expected_scale) in zip(
        (fp8.quantise(weight), fp8.quantise_per_tensor(weight)), whole, strict=True
    ):
        assert torch.equal(quantised.float(), expected.float()) and torch.equal(scale, expected_scale)


def test_every_row_has_its_own_scale(generator):
    weight = torch.randn(64, 256, generator=generator)
    sizes = torch.logspace(-30, 30, 64)[:, None]
    quantised, scale = fp8.quantise(weight * sizes)
    assert relative(fp8.dequantise(quantised, scale, torch.float32) / sizes, weight) <= 0.027
    # Rounded once: another rounding on the way, to bf16, would move one number in thirty.
    others = quantised.float() != (weight * sizes / scale).to(fp8.E4M3).float()
    assert others.float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_of_the_smallest_and_largest_numbers(dtype):
    numbers = torch.finfo(dtype)
    rows = torch.tensor([[0.0, -0.0], [numbers.max, -numbers.max], [numbers.tiny, 0.0], [1.0, -0.5]], dtype=dtype)
    quantised, scale = fp8.quantise_rows(rows)
    back = quantised.double() * scale.double()
    assert back.isfinite().all() and torch.equal(back[0], torch.zeros(2).double())
    assert torch.allclose(back[[1, 3]], rows[[1, 3]].double(), rtol=0.07)


def test_slices_of_blocks_change_nothing(generator, monkeypatch):
    weight = torch.randn(130, 160, generator=generator)
    packed, scale = nf4.quantise(weight)
    monkeypatch.setattr(nf4, "SLICE", 3 * nf4.BLOCK)
    assert all(map(torch.equal, nf4.quantise(weight), (packed, scale)))


def test_every_block_takes_the_scale_that_leaves_the_smaller_error(generator, monkeypatch):
    weight = torch.randn(130, 160, generator=generator)

    def errors(packed: Tensor, scale: Tensor) -> Tensor:
        return (nf4.dequantise(packed, scale, torch.float32) - weight).view(-1, nf4.BLOCK).norm(dim=1)

    packed, scale = nf4.quantise(weight)
    of_both = errors(packed, scale)
    largest = weight.view(-1, nf4.BLOCK).abs().amax(dim=1)
    assert set((scale.float() / largest).mul(20).round().tolist()) == {18.0, 20.0}
    alone = []
    for share in nf4.SHARES:
        monkeypatch.setattr(nf4, "SHARES", (share,))
        alone.append(errors(*nf4.quantise(weight)))
    torch.testing.assert_close(of_both, torch.minimum(*alone))
    # The first one is QLoRA's, as bitsandbytes computes it.
    monkeypatch.setattr(nf4, "SHARES", (1.0,))
    state = functional.quantize_4bit(weight.reshape(-1), blocksize=nf4.BLOCK, quant_type="nf4")
    packed, scale = nf4.quantise(weight)
    assert torch.equal(packed.view(-1), state[0].view(-1)) and torch.equal(scale, state[1].absmax.bfloat16())


# The 8-bit product, which torch has on the CPU as well


@pytest.mark.parametrize("mode", ["rows", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_8_bit_product_is_that_of_the_rounded_factors(generator, monkeypatch, mode, dtype):
    monkeypatch.setitem(fp8._scaled_mm, -1, mode)
    linear = make_linear(generator, "fp8", 160, 96)
    x = (torch.randn(2, 24, 160, generator=generator) * torch.logspace(-2, 2, 24)[:, None]).to(dtype)
    output = linear(x)
    quantised, scale = fp8.quantise_rows(x)
    expected = F.linear(quantised.float() * scale, linear.dense_weight(torch.float32))
    assert output.shape == (2, 24, 96) and output.dtype == dtype
    assert relative(output, expected) < 5e-3  # bf16 gives 2e-3
    assert relative(output, F.linear(x.float(), linear.dense_weight(torch.float32))) > 0.02


@pytest.mark.parametrize(("rows", "columns"), [(96, 40), (40, 160)])
def test_sides_that_the_8_bit_product_does_not_take_are_multiplied_out(generator, monkeypatch, rows, columns):
    monkeypatch.setitem(fp8._scaled_mm, -1, "rows")
    linear = make_linear(generator, "fp8", columns, rows)
    x = torch.randn(3, columns, generator=generator)
    assert torch.equal(linear(x), F.linear(x, linear.dense_weight(torch.float32)))


@pytest.mark.parametrize("refused", [(), ("rows",), ("rows", "tensor"), "wrong"], ids=str)
def test_a_device_is_tried(monkeypatch, refused):
    product = torch._scaled_mm

    def scaled_mm(*args, scale_a: Tensor, **options) -> Tensor:
        if ("tensor" if scale_a.dim() == 0 else "rows") in refused:
            raise (RuntimeError if scale_a.dim() else ValueError)("not on this GPU")
        result = product(*args, scale_a=scale_a, **options)
        return result * 2 if refused == "wrong" else result

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    expected = {(): "rows", ("rows",): "tensor"}.get(refused)  # pyright: ignore[reportArgumentType]
    assert fp8._probe(torch.device("cpu")) == expected


def test_the_8_bit_product_is_given_the_layouts_that_gpus_demand(generator, monkeypatch):
    product, num_calls = torch._scaled_mm, 0

    def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **options) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_a.dtype == scale_b.dtype == torch.float32
        return product(a, b, scale_a=scale_a, scale_b=scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setitem(fp8._scaled_mm, -1, "rows")
    linear = make_linear(generator, "fp8", 160, 96)
    by_columns = torch.randn(160, 24, generator=generator).t().requires_grad_()
    linear(by_columns).backward(torch.randn(96, 24, generator=generator).t())
    assert num_calls == 2


def test_that_a_device_cannot_multiply_in_fp8_is_said_once(generator, caplog):
    with caplog.at_level(logging.WARNING):
        linear = make_linear(generator, "fp8")
        assert not caplog.records
        for _ in range(3):
            linear(torch.ones(2, 160))
    assert [record.message.split(":")[0] for record in caplog.records] == ["device cpu cannot multiply in fp8"]


# Backward


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
@pytest.mark.parametrize("mode", ["dense", "rows"])
def test_backward_keeps_nothing_but_what_is_in_memory_anyway(generator, monkeypatch, weight_format, mode):
    monkeypatch.setitem(fp8._scaled_mm, -1, mode if mode == "rows" else None)
    linear = make_linear(generator, weight_format)
    assert linear.weight_scale is not None
    resident = {linear.weight.data_ptr(), linear.weight_scale.data_ptr()}
    x = torch.randn(5, 7, 160, generator=generator, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = linear(x)
    assert kept and {tensor.data_ptr() for tensor in kept} == resident
    gradient = torch.randn(output.shape, generator=generator)
    output.backward(gradient)
    assert x.grad is not None
    error = relative(x.grad, gradient @ linear.dense_weight(torch.float32))
    assert 0.02 < error < 0.03 if mode == "rows" and weight_format == "fp8" else error < 1e-6
    assert linear.weight.grad is None


@pytest.mark.parametrize("mode", ["rows", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_8_bit_gradient_is_that_of_the_rounded_factors(generator, monkeypatch, mode, dtype):
    monkeypatch.setitem(fp8._scaled_mm, -1, mode)
    linear = make_linear(generator, None, 160, 96)
    linear.weight.mul_(torch.logspace(-1, 1, 96)[:, None])  # scales that differ along the sum
    linear.quantise("fp8")
    assert linear.weight_scale is not None
    x = torch.randn(2, 24, 160, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(2, 24, 96, generator=generator) * torch.logspace(-4, 2, 24)[:, None]
    gradient = gradient.to(dtype)
    linear(x).backward(gradient)
    assert x.grad is not None and x.grad.dtype == dtype
    wide = torch.float32 if dtype == torch.float16 else dtype
    quantised, scale = fp8.quantise_rows(gradient.to(wide) * linear.weight_scale[:, 0].to(wide))
    expected = (quantised.float() * scale) @ linear.weight.float()
    assert relative(x.grad, expected) < 5e-3  # bf16 gives 2e-3
    exact = gradient.float() @ linear.dense_weight(torch.float32)
    errors = [relative(x.grad[0, row], exact[0, row]) for row in range(24)]
    assert min(errors) > 0.015 and max(errors) < 0.04  # of small gradients as of large ones


@pytest.mark.parametrize(("weight_format", "mode"), [("fp8", None), ("fp8", "rows"), ("nf4", None)])
def test_gradient_checkpointing_and_autocast(generator, monkeypatch, weight_format, mode):
    monkeypatch.setitem(fp8._scaled_mm, -1, mode)
    linear = make_linear(generator, weight_format)
    x = torch.randn(4, 160, generator=generator, requires_grad=True)
    (plain,) = torch.autograd.grad(linear(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(linear, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(x)
    # An input that bf16 moves over the middle between two 8-bit numbers is rounded the other way.
    assert output.dtype == torch.bfloat16 and relative(output, linear(x)) < (0.03 if mode else 0.01)
    (narrow,) = torch.autograd.grad(output.float().square().sum(), x)
    assert narrow.dtype == torch.float32 and relative(narrow, plain) < 0.04


@pytest.mark.parametrize(("weight_format", "mode"), [("fp8", None), ("fp8", "rows"), ("nf4", None)])
def test_it_compiles_as_one_graph(generator, monkeypatch, weight_format, mode):
    monkeypatch.setitem(fp8._scaled_mm, -1, mode)
    linear = make_linear(generator, weight_format)
    x = torch.randn(4, 160, generator=generator, requires_grad=True)
    output = torch.compile(linear, backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(output, linear(x), atol=1e-5)
    compiled, plain = (torch.autograd.grad(result.square().sum(), x)[0] for result in (output, linear(x)))
    assert torch.allclose(compiled, plain, atol=1e-4)


# Adapters


class Recorder:
    """An adapter that keeps the weight it is given."""

    def __init__(self, needs_weight: bool | None) -> None:
        self.seen: Tensor | None = None
        if needs_weight is not None:
            self.needs_weight = needs_weight

    def __call__(self, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        self.seen = weight
        return 2 * output


@pytest.mark.parametrize("weight_format", [None, *FORMAT_NAMES])
@pytest.mark.parametrize("needs_weight", [None, True, False])
def test_adapters_see_a_dense_weight_unless_they_do_not_look(generator, weight_format, needs_weight):
    linear, adapter = make_linear(generator, weight_format), Recorder(needs_weight)
    x = torch.randn(3, 160, generator=generator).bfloat16()
    if weight_format is None:
        linear.bfloat16()
    base = linear(x)
    linear.adapters = (adapter,)
    assert torch.equal(linear(x), base + 2 * base) and adapter.seen is not None
    if weight_format and needs_weight is False:
        assert adapter.seen is linear.weight
    else:
        assert adapter.seen.dtype == torch.bfloat16
        assert torch.equal(adapter.seen, linear.dense_weight(torch.bfloat16))


def make_dit(weight_format: str | None) -> Flux2DiT:
    torch.manual_seed(0)
    dit = Flux2DiT(SMALL).requires_grad_(False)
    for name, layer in dit.named_modules():
        if isinstance(layer, Linear) and "blocks" in name and weight_format:
            layer.quantise(weight_format)  # pyright: ignore[reportArgumentType]
    return dit


def make_lora(magnitude: str | None) -> Lora:
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for layer in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2", "img_in"):
        rows, columns = linear_shapes(SMALL)[layer]
        layers[layer] = (
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
    return Lora(name="x", config=SMALL, layers=layers, report=report, metadata={})


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
@pytest.mark.parametrize("magnitude", [None, "rows", "columns"])
def test_live_loras_act_as_on_the_same_weight_kept_dense(generator, weight_format, magnitude):
    quantised, dense = make_dit(weight_format), make_dit(None)
    for name, layer in quantised.named_modules():
        if isinstance(layer, Linear):
            dense.get_submodule(name).weight.copy_(layer.dense_weight(torch.float32))  # pyright: ignore
    inputs = (
        torch.randn(1, 6, 128, generator=generator),
        torch.zeros(6, 4),
        torch.randn(1, 3, 48, generator=generator),
        torch.zeros(3, 4),
        torch.ones(1),
    )
    setting = LoraSetting(lora=make_lora(magnitude), strength=0.7)
    apply_loras(quantised, [setting])
    before = dense(*inputs)
    apply_loras(dense, [setting])
    assert relative(dense(*inputs), before) > 0.01
    # The gain of a magnitude comes from the dense weight in bf16.
    assert relative(quantised(*inputs), dense(*inputs)) < (1e-5 if magnitude is None else 1e-3)


def test_merging_into_quantised_weights_is_refused(tmp_path):
    setting = LoraSetting(lora=make_lora(None))
    with pytest.raises(ValueError, match="weights are fp8"):
        merge_loras(make_dit("fp8"), [setting])
    with pytest.raises(ValueError, match="weights are nf4"):
        save_merged_dit(tmp_path / "x.safetensors", make_dit("nf4"), VARIANTS["klein-4b"], [setting])
    assert not list(tmp_path.iterdir())


# Moves


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
def test_moves_take_the_scales_along_and_casts_leave_the_numbers_alone(generator, weight_format):
    linear = make_linear(generator, weight_format)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    assert list(before) == ["weight", "weight_scale"]
    for cast in (linear.half(), linear.to(torch.bfloat16), linear.float(), linear.to("cpu", torch.float64)):
        for name, tensor in cast.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    linear.to("meta", torch.float16)
    assert all(t.is_meta and t.dtype == before[n].dtype for n, t in linear.state_dict().items())


def test_without_bitsandbytes_nf4_names_what_to_install(generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        nf4.quantise(torch.ones(4, 64))
