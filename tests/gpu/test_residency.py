"""A network that leaves a GPU frees its memory there, and comes back with the same numbers."""

from __future__ import annotations

import gc

import pytest
import torch
from flux2_kit.flux2_core.checkpoint import load_dit
from flux2_kit.flux2_core.dit import Flux2DiT
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.residency import Residence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda")


def run(dit: Flux2DiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, text = torch.randn(1, 4, 128, generator=generator), torch.randn(1, 3, 192, generator=generator)
    inputs = (tokens.to(GPU), image_ids(2, 2).to(GPU), text.to(GPU), text_ids(3).to(GPU))
    with torch.inference_mode():
        return dit(*inputs, torch.tensor([0.5], device=GPU)).cpu()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_memory_is_free_after_leaving_and_after_a_part_has_left(random_tiny_files):
    run(load_dit(random_tiny_files.dit, "tiny", device=GPU)[0])  # what libraries allocate once
    before = allocated()
    dit = load_dit(random_tiny_files.dit, "tiny", device=GPU)[0]
    residence, expected = Residence(dit, GPU), run(dit)
    whole = allocated()
    freed = residence.free(residence.device_bytes // 8)
    # The buffers that count as taken are made by the next run.
    assert freed and allocated() <= whole - freed
    assert torch.equal(run(dit), expected) and allocated() <= whole - freed + 2**20
    residence.leave()
    assert allocated() <= before + 2**20
    residence.load(residence.bytes_with(1))
    assert residence.num_resident == 1 and torch.equal(run(dit), expected)
    residence.leave()
    residence.load()
    assert torch.equal(run(dit), expected) and all(tensor.is_cuda for tensor in dit.state_dict().values())
