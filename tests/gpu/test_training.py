"""Training on a GPU: gradients in 8 bits, a host that never waits, compiled blocks."""

from __future__ import annotations

import pytest
import torch
from flux2_kit.flux2_core import fp8
from flux2_kit.flux2_core.compilation import compile_blocks
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.streaming import stream_dit
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from flux2_kit.training.flow_matching import velocity_losses
from flux2_kit.training.optimizer_step import GuardedStep
from flux2_kit.training.optimizers import Ema, OptimizerConfig, make_optimizer
from flux2_kit.training.step_reports import StepReports
from flux2_kit.training.train_batch import TrainBatch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 tensor cores"
)
CONFIG = DiTConfig(
    hidden_size=1024,
    num_heads=8,
    num_double_blocks=2,
    num_single_blocks=4,
    context_dim=256,
    has_guidance_embedder=False,
)
CUDA = torch.device("cuda")


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@needs_fp8
@pytest.mark.parametrize(("rows", "columns"), [(36864, 4096), (4096, 16384), (480, 160)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_in_8_bits_are_used_and_within_the_limit(rows, columns, dtype):
    torch.manual_seed(0)
    with CUDA:
        linear = Linear(columns, rows).bfloat16().requires_grad_(False)
    linear.weight.normal_()
    plain = linear.weight.detach().clone()
    linear.quantise("fp8")
    x = torch.randn(2, 300, columns, device=CUDA, dtype=dtype, requires_grad=True)
    gradient = torch.randn(2, 300, rows, device=CUDA).to(dtype) * 1e-3
    output = linear(x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output.backward(gradient)
    peak = torch.cuda.max_memory_allocated() - before
    assert x.grad is not None
    assert 0.03 < relative(x.grad, gradient.float() @ plain.float()) <= 0.039
    # One transposed weight in 8 bits; the gradient times the scales, its codes, and the result.
    assert peak <= plain.numel() + 4 * gradient.numel() * 4 + 3 * x.numel() * 4 + 2**22


def build(weight_format: str | None) -> tuple[Flux2DiT, TrainableAdapters]:
    torch.manual_seed(0)
    with CUDA:
        dit = Flux2DiT(CONFIG).bfloat16().requires_grad_(False)
    for name, layer in dit.named_modules():
        if weight_format and isinstance(layer, Linear) and "blocks" in name:
            layer.quantise(weight_format)  # pyright: ignore[reportArgumentType]
    dit.checkpointing = "blocks"
    adapters = TrainableAdapters(dit, AdapterConfig(rank=16), generator=torch.Generator().manual_seed(0)).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5).to(CUDA)
    adapters.attach()
    return dit, adapters


def make_batch(side: int, rows: int = 1) -> TrainBatch:
    generator = torch.Generator().manual_seed(2)
    batch = TrainBatch(
        latents=torch.randn(rows, 128, side, side, generator=generator),
        references=(torch.randn(rows, 128, 4, side, generator=generator),),
        text=torch.randn(rows, 32, CONFIG.context_dim, generator=generator),
        mask=None,
        noise=torch.randn(rows, 128, side, side, generator=generator),
        sigma=torch.full((rows,), 0.4),
        weights=torch.ones(rows),
    )
    return batch.map(Tensor.pin_memory)


def backward(dit: Flux2DiT, adapters: TrainableAdapters, batch: TrainBatch) -> Tensor:
    batch = batch.to(CUDA)
    with adapters.cast_once(dit.dtype):
        losses = velocity_losses(
            dit, batch.latents, batch.text, batch.noise, batch.sigma, references=batch.references, mask=batch.mask
        )
        loss = (losses * batch.weights).mean()
        loss.backward()
    return loss.detach()


def gradients(dit: Flux2DiT, adapters: TrainableAdapters, side: int) -> Tensor:
    backward(dit, adapters, make_batch(side))
    found = torch.cat([p.grad.flatten() for p in adapters.parameters() if p.grad is not None])
    adapters.zero_grad()
    return found


@needs_fp8
def test_gradients_of_a_step_in_8_bits_are_near_those_of_dequantised_weights(monkeypatch):
    dit, adapters = build("fp8")
    found = gradients(dit, adapters, 16)
    monkeypatch.setitem(fp8._scaled_mm, dit.device.index, None)
    assert 0 < relative(found, gradients(dit, adapters, 16)) < 0.15


@pytest.mark.parametrize("weight_format", [None, "fp8"])
def test_streamed_gradients_are_those_of_the_resident_model(weight_format):
    dit, adapters = build(weight_format)
    expected = gradients(dit, adapters, 16)
    streamer = stream_dit(dit, CUDA, num_resident=1)
    for _ in range(3):
        assert torch.equal(gradients(dit, adapters, 16), expected)
    streamer.close()


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("weight_format", [None, "fp8"])
def test_compiled_blocks_give_the_same_gradients_for_all_sizes(weight_format, is_streamed):
    torch.compiler.reset()
    dit, adapters = build(weight_format)
    expected = {side: gradients(dit, adapters, side) for side in (8, 16, 12, 20)}
    if is_streamed:
        stream_dit(dit, CUDA, num_resident=1)
    compile_blocks(dit)
    for side, wanted in expected.items():
        assert relative(gradients(dit, adapters, side), wanted) < (0.03 if weight_format is None else 0.15), side


def test_the_host_never_waits_for_a_step():
    dit, adapters = build(None)
    parameters = list(adapters.parameters())
    optimizer = make_optimizer(adapters.parameter_groups(1e-4), OptimizerConfig())
    end_step = GuardedStep(optimizer, parameters, 1.0, Ema(parameters, 0.9), fp16=False)
    reports = StepReports(CUDA)
    told = []
    batch = make_batch(16)
    for step in range(1, 5):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            numbers = end_step(backward(dit, adapters, batch))
            reports.put(numbers, step=step, learning_rate=1e-4, seconds_per_step=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        told += [found.step for found in reports.take(wait=False)]
        assert told == list(range(1, step))
    (last,) = reports.take(wait=True)
    assert last.step == 4 and last.loss > 0 and last.gradient_norm > 0
    before = [parameter.detach().clone() for parameter in parameters]
    loss, _ = end_step(backward(dit, adapters, batch) * float("nan")).tolist()
    assert loss != loss and all(map(torch.equal, before, parameters))
