"""Weight formats on a CUDA device: the 8-bit product's error, what backward keeps, and agreement with the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flux2_kit.flux2_core import fp8
from flux2_kit.flux2_core.checkpoint import load_dit
from flux2_kit.flux2_core.linear import FORMATS, Linear
from flux2_kit.flux2_core.pipeline import Flux2Pipeline, GenerateRequest, SamplingConfig, load_pipeline
from flux2_kit.flux2_core.weights import TINY_FILES, TINY_FOLDER
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMAT_NAMES = ("fp8", "nf4")
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 tensor cores"
)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def make_linear(weight_format: str | None, rows: int, columns: int) -> Linear:
    torch.manual_seed(0)
    with torch.device("cuda"):
        linear = Linear(columns, rows).bfloat16().requires_grad_(False)
    linear.weight.normal_()
    if weight_format:
        linear.quantise(weight_format)  # pyright: ignore[reportArgumentType]
    return linear


@needs_fp8
@pytest.mark.parametrize(("rows", "columns"), [(36864, 4096), (4096, 16384), (480, 160)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_8_bit_product_is_used_and_within_the_limit(rows, columns, dtype):
    plain, linear = make_linear(None, rows, columns), make_linear("fp8", rows, columns)
    assert fp8.scaled_mm(linear.weight.device) is not None
    x = torch.randn(2, 300, columns, device="cuda", dtype=dtype)
    expected = F.linear(x.float(), plain.weight.float())
    assert 0.03 < relative(linear(x), expected) <= 0.039
    assert relative(F.linear(x.float(), linear.dense_weight(torch.float32)), expected) <= 0.027


@needs_fp8
@pytest.mark.parametrize("mode", ["rows", "tensor"])
def test_both_kinds_of_scales_give_the_product_of_the_rounded_factors(monkeypatch, mode):
    linear = make_linear("fp8", 512, 1024)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16) * torch.logspace(-2, 2, 64, device="cuda")[:, None]
    x = x.bfloat16()
    found = fp8.scaled_mm(x.device)
    if mode == "rows" and found != "rows":
        pytest.skip("this GPU takes no scales per row")
    monkeypatch.setitem(fp8._scaled_mm, x.device.index, mode)
    quantised, scale = fp8.quantise_rows(x)
    assert relative(linear(x), F.linear(quantised.float() * scale, linear.dense_weight(torch.float32))) < 5e-3


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
def test_backward_needs_no_memory_for_weights_and_is_that_of_the_dense_weight(weight_format):
    linear = make_linear(weight_format, 8192, 4096)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear(x.detach())  # what the libraries allocate once
    before = torch.cuda.memory_allocated()
    output = linear(x)
    assert torch.cuda.memory_allocated() - before <= output.nbytes + 2**20
    gradient = torch.randn_like(output)
    output.backward(gradient)
    in_8_bits = weight_format == "fp8" and fp8.scaled_mm(x.device) is not None
    expected = gradient @ linear.dense_weight(torch.bfloat16)
    # In 8 bits the gradient is rounded, and the weight not a second time.
    assert x.grad is not None and relative(x.grad, expected) < (0.04 if in_8_bits else 5e-3)


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
def test_the_device_quantises_as_the_cpu_does(weight_format):
    weight = torch.randn(256, 480).bfloat16()
    functions = FORMATS[weight_format]
    here = functions.dequantise(*functions.quantise(weight), torch.float32)
    there = functions.dequantise(*functions.quantise(weight.cuda()), torch.float32).cpu()
    assert relative(there, here) < 2e-3
    moved = make_linear(weight_format, 256, 480).to("cpu").to("cuda")
    assert relative(moved.dense_weight(), make_linear(weight_format, 256, 480).dense_weight()) == 0


@pytest.mark.parametrize("weight_format", FORMAT_NAMES)
def test_it_compiles_as_one_graph(weight_format):
    linear = make_linear(weight_format, 512, 1024)
    x = torch.randn(32, 1024, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(linear, fullgraph=True)
    assert relative(compiled(x), linear(x)) < 1e-2


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 0.18), ("nf4", 0.25)])
def test_pictures_of_the_bundled_model(precision, limit):
    request = GenerateRequest(
        prompt="a large red circle at the top left on a blue background", sampling=SamplingConfig(seed=0)
    )
    plain = load_pipeline("tiny", dtype=torch.float32, device="cuda")
    expected = plain.generate(request).latents
    dit, _ = load_dit(TINY_FOLDER / TINY_FILES["dit"], "tiny", torch.float32, "cuda", precision=precision)
    pipeline = Flux2Pipeline(
        variant=plain.variant, dit=dit, autoencoder=plain.autoencoder, text_encoder=plain.text_encoder
    )
    assert relative(pipeline.generate(request).latents, expected) < limit
