"""Cached references on a CUDA device: in its memory or in pinned host memory, streamed blocks and fp8 with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.latents import seed_noise
from flux2_kit.flux2_core.linear import Linear
from flux2_kit.flux2_core.memory_estimates import Computation, TokenCounts
from flux2_kit.flux2_core.pipeline import SamplingConfig, sample_latents
from flux2_kit.flux2_core.reference_cache import reference_caches
from flux2_kit.flux2_core.reference_memory import sampling_bytes
from flux2_kit.flux2_core.streaming import stream_dit
from flux2_kit.flux2_core.variants import VARIANTS
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = DiTConfig(
    hidden_size=1024,
    num_heads=8,
    num_double_blocks=2,
    num_single_blocks=4,
    context_dim=64,
    has_guidance_embedder=False,
)
KV = replace(VARIANTS["klein-9b-kv"], dit=CONFIG)
BASE = replace(VARIANTS["klein-base-9b"], dit=CONFIG)
REFERENCES = [seed_noise(2, 1, 512, 768), seed_noise(3, 1, 1024, 256)]
TEXT = torch.randn(1, 64, CONFIG.context_dim, generator=torch.Generator().manual_seed(1))


def build_dit(weight_format: str | None = None) -> Flux2DiT:
    dit = Flux2DiT(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
    dit.bfloat16()
    for name, module in dit.named_modules():
        if isinstance(module, Linear) and weight_format == "fp8" and "_blocks" in name:
            module.quantise("fp8")
    return dit


def sample(dit: Flux2DiT, mode: str, **changes) -> Tensor:
    sampling = SamplingConfig(width=512, height=512, num_steps=3, cfg_scale=2.0, reference_cache=mode)  # pyright: ignore
    variant = KV if mode == "exact" else BASE
    return sample_latents(
        dit, variant, replace(sampling, **changes), TEXT, negative_text=-TEXT, references=REFERENCES
    ).cpu()


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@pytest.mark.parametrize("weight_format", [None, "fp8"])
@pytest.mark.parametrize("num_resident", [None, 1])
def test_where_a_cache_is_kept_changes_no_number(mode, weight_format, num_resident):
    results = []
    for place in ("device", "host"):
        dit = build_dit(weight_format)
        if num_resident is None:
            dit.cuda()
        else:
            stream_dit(dit, "cuda", num_resident=num_resident)
        caches = reference_caches(dit)
        caches.place = place
        results += [sample(dit, mode), sample(dit, mode)]
        for blocks, _ in (value for value, _ in caches._kept._items.values()):
            assert all(block.keys.is_pinned() == (place == "host") for block in blocks)
    assert all(torch.equal(result, results[0]) for result in results)


def test_in_fp32_the_device_computes_what_the_cpu_does():
    dit = build_dit().float()
    expected = sample(dit, "exact")
    found = sample(dit.cuda(), "exact")
    assert (found - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_the_estimate_is_near_the_peak(mode):
    dit = build_dit().cuda()
    sample(dit, mode)  # makes what stays
    reference_caches(dit).clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample(dit, mode)
    measured = torch.cuda.max_memory_allocated() - before
    num_references = 32 * 48 + 64 * 16
    counts = TokenCounts(num_rows=2, num_tokens=32 * 32 + num_references, num_text_tokens=TEXT.shape[1])
    how = Computation(item_bytes=2, weight_format=None, is_cuda=True, is_adapted=False)
    assert 0.9 < sampling_bytes(CONFIG, counts, num_references, how, mode) / measured < 1.35


def test_without_a_plan_a_large_cache_leaves_the_device_after_the_run(monkeypatch):
    from flux2_kit.flux2_core import reference_cache

    dit = build_dit().cuda()
    sample(dit, "exact")
    assert len(reference_caches(dit)._kept) == 1
    monkeypatch.setattr(reference_cache, "device_budget", lambda device: 2**20)
    sample(dit, "exact", seed=2)
    assert len(reference_caches(dit)._kept) == 0
    sample(dit, "exact", seed=3)
    ((blocks, _),) = (value for value, _ in reference_caches(dit)._kept._items.values())
    assert all(block.keys.is_pinned() for block in blocks), "there is no room for a new one"
