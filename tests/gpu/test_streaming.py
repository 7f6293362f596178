"""Block streaming on a GPU: races, overlap of copies and computation, and the memory it takes."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from flux2_kit.flux2_core.block_memory import HostBuffer, tensor_bytes
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.files import write_safetensors
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.streaming import BlockStreamer, stream_dit
from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = DiTConfig(
    hidden_size=1024,
    num_heads=8,
    num_double_blocks=4,
    num_single_blocks=8,
    context_dim=256,
    has_guidance_embedder=False,
)
NUM_BLOCKS = 12
CUDA = "cuda"
FEW, MANY = 4, 64
"""Sides of pictures in latents: with few tokens copies take longer than the computation, with many they do not."""


def build(weight_format: str = "bf16") -> Flux2DiT:
    """On the CPU, the same weights every time."""
    generator = torch.Generator().manual_seed(0)
    dit = Flux2DiT(CONFIG).requires_grad_(False)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    dit.to(torch.bfloat16)
    if weight_format in ("fp8", "nf4"):
        for block in blocks_of(dit):
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.quantise(weight_format)
    return dit


def blocks_of(dit: Flux2DiT) -> list[nn.Module]:
    return [*dit.double_blocks, *dit.single_blocks]


def adapt(dit: Flux2DiT) -> TrainableAdapters:
    generator = torch.Generator().manual_seed(1)
    adapters = TrainableAdapters(dit, AdapterConfig(rank=8), generator=generator)
    for parameter in adapters.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapters.attach()
    return adapters


def run(dit: Flux2DiT, side: int = FEW, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(side)
    tokens = torch.randn(batch, side * side, 128, generator=generator).to(CUDA, torch.bfloat16)
    text = torch.randn(batch, 64, 256, generator=generator).to(CUDA, torch.bfloat16)
    sigma = torch.linspace(0.9, 0.3, batch, device=CUDA)
    return dit(tokens, image_ids(side, side).to(CUDA), text, text_ids(64).to(CUDA), sigma)


def sample(dit: Flux2DiT, side: int = FEW) -> Tensor:
    with torch.inference_mode():
        return run(dit, side)


def train(dit: Flux2DiT, adapters: TrainableAdapters, side: int) -> list[Tensor]:
    adapters.zero_grad()
    for _ in range(2):
        run(dit, side).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in adapters.parameters()]


def median_ms(work: Callable[[], object], num_runs: int = 7) -> float:
    times = []
    for index in range(num_runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


@pytest.fixture(autouse=True)
def free_memory() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("weight_format", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize(("ring_size", "num_resident"), [(1, 0), (2, 0), (2, 5), (3, 0)])
def test_many_passes_are_bit_by_bit_those_of_the_resident_model(weight_format, ring_size, num_resident):
    dit = build(weight_format)
    resident = copy.deepcopy(dit).to(CUDA)
    expected = {side: sample(resident, side) for side in (FEW, MANY)}
    stream_dit(dit, CUDA, num_resident=num_resident, ring_size=ring_size)
    results = [(side, sample(dit, side)) for _ in range(10) for side in (FEW, MANY, FEW)]  # no wait in between
    for side, result in results:
        assert torch.equal(result, expected[side])


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
@pytest.mark.parametrize("checkpointing", ["blocks", "offload"])
@pytest.mark.parametrize(("ring_size", "num_resident"), [(1, 0), (2, 0), (2, 5)])
def test_gradients_are_bit_by_bit_those_of_the_resident_model(weight_format, checkpointing, ring_size, num_resident):
    dit = build(weight_format).to(CUDA)
    adapters = adapt(dit).to(CUDA)
    dit.checkpointing = checkpointing
    # The backward pass of attention adds in no fixed order, unless it is told to.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = {side: train(dit, adapters, side) for side in (FEW, MANY)}
        again = train(dit, adapters, FEW)
        if not all(map(torch.equal, again, expected[FEW])):
            pytest.skip("gradients of the resident model differ from run to run")
        stream_dit(dit, CUDA, num_resident=num_resident, ring_size=ring_size)
        for side in (FEW, MANY, FEW, FEW):
            for gradient, wanted in zip(train(dit, adapters, side), expected[side], strict=True):
                assert torch.equal(gradient, wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pinned", [True, False])
def test_from_disk_and_from_memory_that_is_not_pinned(tmp_path, pinned):
    dit = build("fp8")
    expected = sample(copy.deepcopy(dit).to(CUDA))
    path = write_safetensors(tmp_path / "dit.safetensors", dit.state_dict()) if pinned else None
    streamer = stream_dit(dit, CUDA, num_resident=3, pinned=pinned, file=path)
    for result in [sample(dit) for _ in range(10)]:
        assert torch.equal(result, expected)
    streamer.close()
    assert torch.equal(sample(dit.to(CUDA)), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    dit = build()
    expected = sample(copy.deepcopy(dit).to(CUDA)).cpu()
    streamer = stream_dit(dit, "cuda:1", num_resident=3)
    free = torch.cuda.mem_get_info(0)[0]
    inputs = torch.Generator().manual_seed(FEW)
    tokens = torch.randn(2, FEW * FEW, 128, generator=inputs).to("cuda:1", torch.bfloat16)
    text = torch.randn(2, 64, 256, generator=inputs).to("cuda:1", torch.bfloat16)
    ids, words = image_ids(FEW, FEW).to("cuda:1"), text_ids(64).to("cuda:1")
    with torch.inference_mode(), torch.cuda.device(0):
        for _ in range(3):
            result = dit(tokens, ids, text, words, torch.linspace(0.9, 0.3, 2, device="cuda:1"))
    assert (result.cpu() - expected).norm() < 0.02 * expected.norm()
    assert torch.cuda.mem_get_info(0)[0] >= free
    streamer.close()


def test_host_buffers_are_pinned_where_they_lie():
    buffer = HostBuffer(3 * 2**20 + 5)
    buffer.bytes.fill_(7)
    buffer.pin()
    assert buffer.bytes.is_pinned() and buffer.bytes[-1] == 7
    buffer.unpin()
    assert not buffer.bytes.is_pinned()
    buffer.pin()
    assert buffer.bytes.is_pinned()


def test_the_host_never_waits():
    blocks = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(8)]
    streamer = BlockStreamer(blocks, CUDA, num_resident=2)
    x = torch.randn(64, 2048, device=CUDA)

    def forward() -> Tensor:
        y = x
        for block in blocks:
            y = block(y)
        return y

    with torch.inference_mode():
        forward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                forward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # The device is busy for long after the host has gone through a pass.
        torch.cuda._sleep(10**9)
        behind = torch.cuda.Event()
        forward()
        behind.record()
        assert not behind.query()
    streamer.close()


def test_device_memory_is_the_ring_beside_what_a_resident_model_needs_without_its_blocks():
    dit = build()
    size = sum(map(tensor_bytes, blocks_of(dit)))
    resident = copy.deepcopy(dit).to(CUDA)
    sample(resident, MANY)
    torch.cuda.reset_peak_memory_stats()
    sample(resident, MANY)
    without_blocks = torch.cuda.max_memory_allocated() - size
    del resident
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    streamer = stream_dit(dit, CUDA, num_resident=0)
    assert torch.cuda.max_memory_allocated() - before < 0.2 * size, "the model was on the device as a whole"
    sample(dit, MANY)
    torch.cuda.reset_peak_memory_stats()
    sample(dit, MANY)
    peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(without_blocks + streamer.ring_bytes, rel=0.05)

    allocated = torch.cuda.memory_allocated()
    streamer.unload()
    assert allocated - torch.cuda.memory_allocated() == pytest.approx(streamer.ring_bytes, rel=0.05)
    for num_resident in (6, 2):
        streamer.set_num_resident(num_resident)
        now = torch.cuda.memory_allocated()
        rest = sum(tensor_bytes(child) for name, child in dit.named_children() if not name.endswith("_blocks"))
        assert now - before == pytest.approx(rest + streamer.resident_bytes, rel=0.05)
    expected = sample(dit)
    dit.to("cpu")
    assert torch.cuda.memory_allocated() - before < 0.05 * size
    dit.to(CUDA)
    assert torch.equal(sample(dit), expected)


@pytest.mark.parametrize("num_resident", [0, 6])
def test_copies_run_beside_the_computation(num_resident):
    """One pass takes about as long as the longer of the two, not as long as both."""
    dit = build()
    resident = copy.deepcopy(dit).to(CUDA)
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device=CUDA)
    bytes_per_ms = host.numel() / median_ms(lambda: device.copy_(host, non_blocking=True))
    streamer = stream_dit(dit, CUDA, num_resident=num_resident)
    for side in (FEW, MANY):
        computing = median_ms(lambda side=side: sample(resident, side))
        copying = streamer.host_bytes / bytes_per_ms
        both = median_ms(lambda side=side: sample(dit, side))
        assert both < 1.25 * max(computing, copying) + 0.1 * min(computing, copying), (side, computing, copying, both)


def test_compiled_blocks_run_streamed():
    dit = build("fp8")
    expected = sample(copy.deepcopy(dit).to(CUDA))
    stream_dit(dit, CUDA, num_resident=4)
    for block in blocks_of(dit):
        block.compile()
    results = [sample(dit) for _ in range(6)]
    for result in results:
        assert torch.equal(result, results[0])
    assert (results[0] - expected).norm() < 0.05 * expected.norm()
