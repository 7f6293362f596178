"""Blocks under torch.compile: the same gradients, and few graphs, with all that training combines them with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flux2_kit.flux2_core import fp8
from flux2_kit.flux2_core.compilation import compile_blocks
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.streaming import stream_dit
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from flux2_kit.training.flow_matching import velocity_losses
from torch import Tensor

CONFIG = DiTConfig(
    hidden_size=64,
    num_heads=2,
    num_double_blocks=0,
    num_single_blocks=2,
    context_dim=48,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)
SIZES = [(2, 3), (4, 3), (3, 5)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """Runs graphs as torch.compile's own backends get them, without compiling them, and counts them."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, module, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(module, inputs)
        self.num_graphs += 1
        return compiled


def build(
    weight_format: str | None, checkpointing: str, adapter: AdapterConfig, config: DiTConfig = CONFIG
) -> tuple[Flux2DiT, TrainableAdapters]:
    torch.manual_seed(0)
    dit = Flux2DiT(config).requires_grad_(False)
    adapters = TrainableAdapters(dit, adapter, generator=torch.Generator().manual_seed(0))
    for name, parameter in adapters.named_parameters():
        if not name.endswith("magnitude"):
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    adapters.attach()
    for name, layer in dit.named_modules():
        if weight_format and isinstance(layer, Linear) and "blocks" in name:
            layer.quantise(weight_format)  # pyright: ignore[reportArgumentType]
    dit.checkpointing = checkpointing
    return dit, adapters


def gradients(dit: Flux2DiT, adapters: TrainableAdapters, size: tuple[int, int], rows: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(rows, 128, *size, generator=generator) for _ in range(2))
    text = torch.randn(rows, 7, 48, generator=generator)
    torch.manual_seed(2)
    with adapters.cast_once(dit.dtype):
        velocity_losses(dit, latents, text, noise, torch.rand(rows, generator=generator)).mean().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapters.parameters()]
    adapters.zero_grad()
    # Without single blocks nothing comes of the text of the last block.
    assert sum(bool(gradient.count_nonzero()) for gradient in found) > 0.7 * len(found)
    return found


# With the first layers adapted all blocks get inputs with gradients: otherwise the first one has a graph of its own.
ADAPTED = AdapterConfig(rank=4, alpha=2.0, include=("_blocks", "^img_in$", "^txt_in$"))


@pytest.mark.parametrize(
    ("weight_format", "checkpointing", "adapter", "config", "num_sizes"),
    [
        ("fp8", "blocks", ADAPTED, CONFIG, 3),
        (None, "none", replace(ADAPTED, dropout=0.3), replace(CONFIG, num_double_blocks=2, num_single_blocks=0), 1),
    ],
    ids=["streamed single blocks in fp8", "double blocks"],
)
def test_gradients_of_all_sizes_come_from_one_graph(
    monkeypatch, weight_format, checkpointing, adapter, config, num_sizes
):
    if adapter.dropout and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot trace dataclasses: a block whose adapters have dropout is many graphs")
    monkeypatch.setitem(fp8._scaled_mm, -1, "rows" if weight_format == "fp8" else None)
    dit, adapters = build(weight_format, checkpointing, adapter, config)
    sizes = SIZES[:num_sizes]
    expected = [gradients(dit, adapters, size) for size in sizes]
    names = list(dit.state_dict())
    if weight_format == "fp8":
        stream_dit(dit, "cpu", num_resident=1)
    backend = Backend()
    for _ in range(2):
        compile_blocks(dit, backend=backend)
    tries = backend.num_graphs
    for number, (size, wanted) in enumerate(zip(sizes, expected, strict=True)):
        for got, gradient in zip(gradients(dit, adapters, size), wanted, strict=True):
            assert torch.allclose(got, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()), size
        assert backend.num_graphs - tries == 1, number
    assert list(dit.state_dict()) == names


def test_a_machine_that_cannot_compile_is_told_at_once():
    def broken(module, inputs):
        raise RuntimeError("no compiler here")

    dit, _ = build(None, "none", AdapterConfig(rank=4))
    with pytest.raises(ValueError, match=r"torch.compile does not work here .*no compiler here.*leave compile out"):
        compile_blocks(dit, backend=broken)
    assert not any("forward" in block.__dict__ for block in dit.single_blocks)
