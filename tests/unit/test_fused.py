"""The fused kernels against PyTorch, in Triton's interpreter, and when they are chosen.

The interpreter runs in a process of its own, since Triton reads its setting once.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from flux2_kit.flux2_core import fp8, fused
from flux2_kit.flux2_core.linear import Linear

CASES = [
    ("modulated_norm", (40,), 1),
    ("modulated_norm", (64,), 3),
    ("joined_swiglu", (0, 48), 2),
    ("joined_swiglu", (40, 34), 3),
    ("gated_residual", (41,), 3),
    ("heads", (3, 8, 2), 2),
    ("heads", (5, 12, 1), 3),
]
SCRIPT = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from flux2_kit.flux2_core import fused, triton_kernels as kernels

cpu, found = torch.device("cpu"), []
for number, (name, widths, num_tokens) in enumerate(json.loads(sys.argv[1])):
    for dtype in (torch.float32, (torch.bfloat16, torch.float16)[number % 2]):
        error = fused.compare(kernels, name, cpu, dtype, tuple(widths), num_tokens)
        found.append([name, widths, str(dtype), error, fused.LARGEST_ERROR[dtype]])

# Modulation by token, rows of a larger tensor, more channels than a program takes at once.
torch.manual_seed(0)
kernels.MAX_BLOCK = 16
x, modulation = torch.randn(2, 5, 96)[:, 1:4, 8:88], torch.randn(2, 3, 240).chunk(3, dim=-1)
shift, scale, gate = modulation
largest = x.abs().amax(dim=-1, keepdim=True)


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


found.append(["norm by token", [], "", distance(kernels.modulated_norm(x, shift, scale, 1e-6),
    fused.modulated_norm(x, shift, scale)), 1e-6])
found.append(["gate by token", [], "", distance(kernels.gated_residual(x, gate, x), x + gate * x), 1e-6])
found.append(["wide", [], "", distance(kernels.joined_swiglu(x, x), fused.joined_swiglu(x, x)), 1e-6])


def plain_rows(like, width):
    # In place of e4m3, to which the interpreter does not round as a GPU does.
    return torch.empty(*like.shape[:2], width), torch.empty(*like.shape[:2], 1)


def off(rows, exact):
    codes, row_scale = rows
    wrong_scale = row_scale / (exact.abs().amax(dim=-1, keepdim=True) / 448) - 1
    return distance(codes * row_scale, exact) + float(wrong_scale.abs().max())


kernels._empty_rows = plain_rows
rows = {
    "norm": (kernels.modulated_norm_rows(x, shift, scale, 1e-6), fused.modulated_norm(x, shift, scale)),
    "swiglu": (kernels.joined_swiglu_rows(None, x), fused.swiglu(x)),
    "joined": (kernels.joined_swiglu_rows(x, x), fused.joined_swiglu(x, x)),
    "plain": (kernels.joined_swiglu_rows(x, None), x),
}
for name, (got, exact) in rows.items():
    found.append([name, [], "fp8", off(got, exact), 1e-6])
codes, row_scale = kernels.joined_swiglu_rows(torch.zeros(1, 2, 32), None)
found.append(["zeros", [], "fp8", float(codes.abs().max() + (~row_scale.isfinite()).sum()), 0])

# A whole network: what its blocks give the kernels lies in memory otherwise than random numbers do.
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT

config = DiTConfig(hidden_size=16, num_heads=2, num_double_blocks=1, num_single_blocks=1, context_dim=6,
    has_guidance_embedder=False, in_channels=4, rope_axes=(2, 2, 2, 2))
dit = Flux2DiT(config).requires_grad_(False)
for parameter in dit.parameters():
    parameter.data = torch.randn(parameter.shape) / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1)
ids = torch.randint(9, (5, 4))
inputs = torch.randn(2, 3, 4), ids[:3], torch.randn(2, 2, 6), ids[3:], torch.tensor([0.3, 0.7])
with torch.inference_mode():
    expected, used = dit(*inputs), set()
    fused._kernels = lambda name, *rest: (used.add(name), kernels)[1]
    found.append(["network", sorted(used), "", distance(dit(*inputs), expected), 1e-5])
    found.append(["all kernels", sorted(used), "", 4 - len(used), 0])
print(json.dumps(found))
"""


def test_kernels_equal_pytorch_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(CASES) + 10
    wrong = [row for row in found if not row[3] <= row[4]]
    assert not wrong, wrong


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


class OnCuda(torch.Tensor):
    """A tensor that says that it is on CUDA."""

    is_cuda = True  # pyright: ignore


def on_cuda(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(OnCuda)


@pytest.fixture
def probed(monkeypatch) -> list[str]:
    """Kernels that were tried; all of them give zeros and are found to work."""
    tried: list[str] = []
    monkeypatch.setattr(fused, "_probed", {})
    monkeypatch.setattr(fused, "_works", lambda name, *rest: (tried.append(name), True)[1])
    zeros = SimpleNamespace(gated_residual=lambda x, *rest: torch.zeros_like(x))
    monkeypatch.setitem(sys.modules, "flux2_kit.flux2_core.triton_kernels", zeros)
    monkeypatch.setattr(sys.modules["flux2_kit.flux2_core"], "triton_kernels", zeros, raising=False)
    return tried


def test_a_kernel_is_tried_once_and_only_for_inference_on_cuda(probed):
    x, gate = random(1, 3, 8), random(1, 1, 8)
    expected = x + gate * x
    with torch.inference_mode():
        torch.testing.assert_close(fused.gated_residual(x, gate, x), expected)
    torch.testing.assert_close(fused.gated_residual(on_cuda(x), gate, x).as_subclass(torch.Tensor), expected)
    with torch.no_grad():
        fused.gated_residual(on_cuda(x.double()), gate.double(), x.double())
    assert not probed
    with torch.no_grad():
        for _ in range(2):
            assert fused.gated_residual(on_cuda(x), gate, x).count_nonzero() == 0
    assert probed == ["gated_residual"]


def test_without_triton_one_warning_stands_for_all_kernels(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_probed", {})
    monkeypatch.delattr(sys.modules["flux2_kit.flux2_core"], "triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "flux2_kit.flux2_core.triton_kernels", None)
    fused._has_triton.cache_clear()
    x, gate = random(1, 3, 8), random(1, 1, 8)
    try:
        with torch.no_grad():
            fused.gated_residual(on_cuda(x), gate, x)
            fused.modulated_norm(on_cuda(x), gate, gate)
    finally:
        fused._has_triton.cache_clear()
    (record,) = caplog.records
    assert "need Triton" in record.getMessage()


@pytest.mark.parametrize("failure", ["raises", "differs"])
def test_a_kernel_that_fails_is_not_used_and_is_told_of_once(failure, monkeypatch, caplog):
    def run(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if failure == "raises":
            raise RuntimeError("no compiler\nwith many lines")
        return torch.zeros_like(x)

    monkeypatch.setattr(fused, "_probed", {})
    module = SimpleNamespace(gated_residual=run)
    monkeypatch.setitem(sys.modules, "flux2_kit.flux2_core.triton_kernels", module)
    monkeypatch.setattr(sys.modules["flux2_kit.flux2_core"], "triton_kernels", module, raising=False)
    x, gate = random(1, 3, 8), random(1, 1, 8)
    fused._has_triton.cache_clear()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = fused.gated_residual(on_cuda(x), gate, x).as_subclass(torch.Tensor)
            torch.testing.assert_close(result, x + gate * x)
    (record,) = caplog.records
    expected = "RuntimeError: no compiler)" if failure == "raises" else "off by 1)"
    assert expected in record.getMessage() and "gated_residual" in record.getMessage()


def test_an_fp8_layer_takes_rows_unless_adapters_need_what_was_not_rounded(monkeypatch):
    layer, x = Linear(32, 16), on_cuda(random(1, 3, 32))
    monkeypatch.setattr(fp8, "scaled_mm", lambda device: "rows")
    with torch.no_grad():
        assert not layer.takes_rows(x)
        layer.quantise("fp8")
        assert layer.takes_rows(x) and not layer.takes_rows(random(1, 3, 32))
        layer.adapters = (lambda x, output, weight: output,)
        assert not layer.takes_rows(x)
    layer.adapters = ()
    assert not layer.takes_rows(x)


def test_a_layer_multiplies_rows_as_it_does_what_they_were_made_of(monkeypatch):
    layer, x = Linear(32, 16), random(2, 3, 32)
    layer.quantise("fp8")
    monkeypatch.setattr(fp8, "scaled_mm", lambda device: "rows")
    monkeypatch.setattr(
        torch,
        "_scaled_mm",
        lambda a, b, scale_a, scale_b, **_: (a.float() * scale_a) @ (b.float() * scale_b),
    )
    codes, scale = fp8.quantise_rows(x)
    with torch.no_grad():
        product = layer(fp8.Fp8Rows(codes=codes, scale=scale, dtype=x.dtype))
        assert product.shape == (2, 3, 16)
        assert torch.equal(product, layer(x))
        exact = x @ layer.dense_weight(torch.float32).t()
    assert (product - exact).norm() < 0.05 * exact.norm()
