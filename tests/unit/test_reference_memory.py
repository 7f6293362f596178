"""Memory of cached references: estimates against what is allocated, and where plans keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from allocations import peak_of
from flux2_kit.flux2_core.dit import DiTConfig, Flux2DiT
from flux2_kit.flux2_core.key_values import BlockKeyValues
from flux2_kit.flux2_core.latents import image_ids, reference_tokens, text_ids
from flux2_kit.flux2_core.memory import GIB, MemoryNeeds, MemoryPlan, MemoryRequest, describe, plan_memory
from flux2_kit.flux2_core.memory_estimates import Computation, TokenCounts
from flux2_kit.flux2_core.reference_cache import compute_alone
from flux2_kit.flux2_core.reference_memory import cached_step_bytes, first_pass_bytes, reference_cache_bytes
from flux2_kit.flux2_core.variants import VARIANTS

CONFIG = DiTConfig(
    hidden_size=128,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=3,
    context_dim=64,
    has_guidance_embedder=False,
    rope_axes=(8, 8, 8, 8),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "reference_side", "rows"), [(16, 16, 1), (8, 24, 1), (12, 16, 2)])
@torch.inference_mode()
def test_peaks_of_the_pass_and_of_the_steps(dtype, side, reference_side, rows):
    dit = Flux2DiT(CONFIG).to(dtype).requires_grad_(False)
    num_text, number = 32, reference_side**2
    how = Computation(item_bytes=dtype.itemsize, weight_format=None, is_cuda=False, is_adapted=False)
    tokens, ids = reference_tokens([torch.randn(1, 128, reference_side, reference_side)])
    blocks = [BlockKeyValues(number) for _ in range(5)]
    given = tokens.to(dtype)
    kept = reference_cache_bytes(CONFIG, number, 1, dtype.itemsize)
    measured = given.nbytes + peak_of(lambda: compute_alone(dit, given, ids, None, blocks))
    counts = TokenCounts(num_rows=rows, num_tokens=side * side, num_text_tokens=num_text)
    near(kept + first_pass_bytes(CONFIG, counts, number, how, is_exact=True), measured)
    assert sum(block.num_bytes for block in blocks) == kept

    picture = torch.randn(rows, side * side, 128).to(dtype)
    text = torch.randn(rows, num_text, CONFIG.context_dim).to(dtype)
    positions, sigma = (image_ids(side, side), text_ids(num_text)), torch.full((rows,), 0.5)

    def step(cache: Sequence[BlockKeyValues]) -> None:
        dit.velocity(picture, sigma, dit.prepare(positions[0], text, positions[1]), cache)

    measured = picture.nbytes + text.nbytes + peak_of(lambda: step(blocks))
    near(cached_step_bytes(CONFIG, counts, number, how), measured)


def near(estimate: int, measured: int) -> None:
    """Not under what is needed by much, and not far above it."""
    assert 0.9 <= estimate / measured <= 1.25, (estimate, measured)


def request(name: str = "klein-9b-kv", *, references: int = 1, **needs) -> MemoryRequest:
    sizes = ((1024, 1024),) * references
    return MemoryRequest(variant=VARIANTS[name], needs=MemoryNeeds(reference_sizes=sizes, **needs))


def plan(asked: MemoryRequest, budget_gib: float | None, host_gib: float | None = 256) -> MemoryPlan:
    return plan_memory(
        asked,
        None if budget_gib is None else round(budget_gib * GIB),
        None if host_gib is None else round(host_gib * GIB),
    )


def test_a_cache_of_klein_takes_2_gib_for_each_reference():
    config = VARIANTS["klein-9b-kv"].dit
    assert reference_cache_bytes(config, 4096, 1, 2) == 2 * GIB
    assert reference_cache_bytes(config, 3 * 4096, 2, 2) == 12 * GIB


def test_plans_count_the_cache_where_it_is():
    whole, none = plan(request(references=3), None), plan(request("klein-9b", references=3), None)
    assert (whole.reference_cache, none.reference_cache) == ("device", None)
    assert whole.sampling_bytes > none.dit.device_bytes + 6 * GIB
    assert whole.decoding_bytes >= none.decoding_bytes + 6 * GIB, "it stays for the next picture"
    asked = request("klein-9b", reference_cache="approximate", uses_cfg=True)
    approximate = plan(asked, None)
    assert approximate.reference_cache == "device"
    exactly = replace(asked, needs=replace(asked.needs, reference_cache="off"))
    assert approximate.sampling_bytes >= plan(exactly, None).sampling_bytes + 4 * GIB, "both rows have their own"
    assert approximate.decoding_bytes == plan(exactly, None).decoding_bytes, "it does not stay"


def test_where_the_device_is_small_the_cache_is_in_host_memory():
    found = {budget: plan(request(references=3), budget) for budget in (6, 8, 12, 16, 24, 32, 48, 80)}
    assert all(each.peak_bytes <= budget * GIB for budget, each in found.items())
    assert found[80].reference_cache == "device"
    assert found[8].reference_cache == "host" and "references cached in host memory" in describe(found[8])
    assert found[12].reference_cache == "device", "copies in every step cost more than streamed blocks"
    delays = [each.delay_seconds for each in found.values() if each.dit.precision == "fp8"]
    assert delays == sorted(delays, reverse=True)


def test_host_memory_that_cannot_hold_the_cache_is_not_planned_with():
    asked = replace(request(references=3), uses_text_encoder=False)
    assert plan(asked, 8, host_gib=16).reference_cache == "host"
    with pytest.raises(ValueError, match=r"needs more host memory than the 5\.0 GiB that are free"):
        plan(asked, 8, host_gib=5)


def test_without_references_there_is_no_cache():
    assert plan(request(references=0), 24).reference_cache is None
    assert plan(replace(request(), rank=16, uses_text_encoder=False), 48).reference_cache is None
