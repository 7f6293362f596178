"""The fused kernels on a CUDA device: against PyTorch, in a whole network, and without a wait for the device."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core import attention_backends, fused
from flux2_kit.flux2_core.acceleration import Acceleration, accelerate
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.sampling import denoise
from flux2_kit.flux2_core.schedule import sigma_schedule
from torch import Tensor

triton_kernels = pytest.importorskip("flux2_kit.flux2_core.triton_kernels", reason="triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
CONFIG = DiTConfig(
    hidden_size=512,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=3,
    context_dim=96,
    has_guidance_embedder=False,
)


@pytest.mark.parametrize("num_tokens", [1, 77, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("modulated_norm", (4096,)),
        ("modulated_norm", (6144,)),
        ("modulated_norm", (160,)),
        ("joined_swiglu", (0, 12288)),
        ("joined_swiglu", (6144, 18432)),
        ("joined_swiglu", (160, 486)),
        ("gated_residual", (4096,)),
        ("gated_residual", (6144,)),
        ("heads", (32, 128, 2)),
        ("heads", (48, 128, 1)),
        ("heads", (5, 32, 2)),
        ("modulated_norm_rows", (4096,)),
        ("modulated_norm_rows", (6144,)),
        ("joined_swiglu_rows", (0, 9216)),
        ("joined_swiglu_rows", (6144, 18432)),
        ("joined_swiglu_rows", (160, 480)),
        ("fp8_rows", (4096,)),
    ],
)
def test_kernels_equal_pytorch(name, widths, dtype, num_tokens):
    is_rows = name.endswith("rows")
    if is_rows and not HAS_FP8:
        pytest.skip("needs fp8 tensor cores")
    limit = fused.LARGEST_FP8_ERROR if is_rows else fused.LARGEST_ERROR[dtype]
    assert fused.compare(triton_kernels, name, torch.device("cuda:0"), dtype, widths, num_tokens) <= limit


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("modulated_norm", (160,)),
        ("joined_swiglu", (160, 486)),
        ("gated_residual", (4096,)),
        ("heads", (5, 32, 2)),
        ("joined_swiglu_rows", (160, 480)),
    ],
)
def test_kernels_run_where_the_tensors_are(name, widths):
    if name.endswith("rows") and not HAS_FP8:
        pytest.skip("needs fp8 tensor cores")
    with torch.cuda.device(0):
        assert fused.compare(triton_kernels, name, torch.device("cuda:1"), torch.float16, widths) <= 3e-2


def build(dtype: torch.dtype, precision: str | None = None) -> Flux2DiT:
    torch.manual_seed(0)
    dit = Flux2DiT(CONFIG).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter
    dit = dit.to("cuda", dtype)
    for block in dit.blocks if precision else ():
        for layer in block.modules():
            if hasattr(layer, "quantise"):
                layer.quantise(precision)  # pyright: ignore
    return dit


@torch.inference_mode()
def run(dit: Flux2DiT, height: int = 24, width: int = 20, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(rows, height * width, 128, generator=generator)
    text = torch.randn(rows, 33, 96, generator=generator)
    ids, words = image_ids(height, width).cuda(), text_ids(33).cuda()
    sigma = torch.full((rows,), 0.7).cuda()
    return dit(tokens.to("cuda", dit.dtype), ids, text.to("cuda", dit.dtype), words, sigma).float()


@pytest.mark.parametrize(
    ("dtype", "precision", "limit"),
    [(torch.float32, None, 1e-4), (torch.bfloat16, None, 3e-2), (torch.bfloat16, "fp8", 6e-2)],
)
def test_a_network_computes_the_same_with_and_without_them(dtype, precision, limit, monkeypatch, caplog):
    if precision == "fp8" and not HAS_FP8:
        pytest.skip("needs fp8 tensor cores")
    dit = build(dtype, precision)
    fast = run(dit)
    assert not caplog.records
    assert all(fused._probed.values()) and len(fused._probed) >= 4
    monkeypatch.setattr(fused, "_kernels", lambda *_: None)
    plain = run(dit)
    assert ((fast - plain).norm() / plain.norm()).item() < limit


def test_no_step_waits_for_the_device():
    dit = build(torch.bfloat16)
    noise, text = torch.randn(1, 128, 24, 20), torch.randn(1, 33, 96)
    steps = sigma_schedule(3, 480)
    denoise(dit, noise, text, steps)  # kernels are tried and attention is measured here
    waits: list[int] = []

    def forbid(should_wait: bool) -> None:
        torch.cuda.set_sync_debug_mode("default" if should_wait else "error")

    try:
        denoise(
            dit,
            noise,
            text,
            steps,
            should_stop=lambda: (forbid(False), False)[1],
            on_step=lambda step: (waits.append(step.index), forbid(step.index == step.num_steps))[0],
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1, 2, 3]


@pytest.mark.parametrize("name", ["sdpa", "cudnn", "flash", "auto"])
def test_attention_kernels_agree(name):
    dit = build(torch.bfloat16)
    expected = run(dit)
    accelerate(dit, Acceleration(attention=name))
    assert ((run(dit) - expected).norm() / expected.norm()).item() < 2e-2
    if name == "auto":
        assert attention_backends._fastest


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_compiled_blocks_agree_and_do_not_compile_again_for_another_size(precision):
    if precision == "fp8" and not HAS_FP8:
        pytest.skip("needs fp8 tensor cores")
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    dit = build(torch.bfloat16, precision)
    expected = [run(dit), run(dit, 16, 32)]
    accelerate(dit, Acceleration(compile=True))
    counters.clear()  # of the trial
    for output, got in zip(expected, (run(dit), run(dit, 16, 32)), strict=True):
        assert ((got - output).norm() / output.norm()).item() < (0.06 if precision else 0.03)
    assert counters["stats"]["unique_graphs"] == 2
