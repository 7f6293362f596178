"""Networks leave their device and come back, as many blocks of them as a number of bytes asks for.

The CPU stands for the device here: what moves is counted, and what streams is real.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
from flux2_kit.flux2_core.block_memory import tensor_bytes
from flux2_kit.flux2_core.checkpoint import load_autoencoder, load_dit
from flux2_kit.flux2_core.dit import Flux2DiT
from flux2_kit.flux2_core.images import tensor_to_images
from flux2_kit.flux2_core.latents import image_ids, text_ids
from flux2_kit.flux2_core.pipeline import encode_references
from flux2_kit.flux2_core.placement import PlacedDiT
from flux2_kit.flux2_core.reference_cache import reference_caches
from flux2_kit.flux2_core.reference_store import reference_store
from flux2_kit.flux2_core.residency import Residence
from flux2_kit.flux2_core.streaming import stream_dit
from flux2_kit.flux2_core.text_encoder import load_text_encoder
from flux2_kit.flux2_core.variants import VARIANTS
from torch import Tensor

CPU = torch.device("cpu")
NUM_BLOCKS = 10


@pytest.fixture(autouse=True)
def device_with_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(Residence, "moves", True)


@pytest.fixture
def dit() -> Flux2DiT:
    """Random, with 2 double and 8 single blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Flux2DiT(replace(VARIANTS["tiny"].dit, num_single_blocks=NUM_BLOCKS - 2)).requires_grad_(False)


def run(dit: Flux2DiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return dit(
            torch.randn(1, 4, 128, generator=generator),
            image_ids(2, 2),
            torch.randn(1, 3, 192, generator=generator),
            text_ids(3),
            torch.tensor([0.5]),
        )


def blocks_of(dit: Flux2DiT) -> list[torch.nn.Module]:
    return [*dit.double_blocks, *dit.single_blocks]


def test_bytes_are_those_of_the_weights_that_are_there(dit):
    residence = Residence(dit, CPU)
    assert residence.num_blocks == residence.limit == residence.num_resident == NUM_BLOCKS
    assert residence.device_bytes == residence.wanted_bytes == tensor_bytes(dit)
    residence.free(1)
    streamer = residence.streamer
    assert streamer is not None and 0 < streamer.num_resident < NUM_BLOCKS
    outer = tensor_bytes(dit) - sum(map(tensor_bytes, blocks_of(dit)))
    assert residence.device_bytes == outer + streamer.resident_bytes + streamer.ring_bytes
    residence.leave()
    assert residence.device_bytes == 0 and residence.wanted_bytes == tensor_bytes(dit)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_at_least_what_is_asked_for_is_freed_or_nothing_is_done(dit, share):
    residence, expected = Residence(dit, CPU), run(dit)
    before = residence.device_bytes
    wanted = round(share * before)
    freed = residence.free(wanted)
    assert freed == before - residence.device_bytes
    if share == 0.9:
        assert freed == 0 and residence.num_resident == NUM_BLOCKS, "the buffers alone take more than is left"
    else:
        # One block more would have been too much.
        assert freed >= wanted > before - residence.bytes_with(residence.num_resident + 1)
    assert torch.equal(run(dit), expected)


def test_a_budget_becomes_resident_blocks_and_no_number_changes(dit):
    residence, expected, counts = Residence(dit, CPU), run(dit), []
    for budget in (residence.bytes_with(2), residence.bytes_with(6) - 1, 0, None, residence.bytes_with(4)):
        residence.leave()
        residence.load(budget)
        assert residence.is_loaded and (not budget or residence.device_bytes <= budget)
        assert torch.equal(run(dit), expected)
        counts.append(residence.num_resident)
    assert counts == [2, 5, 0, NUM_BLOCKS, 4]


def test_inference_mode_leaves_weights_that_can_be_trained_on(dit, monkeypatch):
    residence = Residence(dit, CPU)
    monkeypatch.setattr(torch.nn.Module, "to", new_tensors)
    with torch.inference_mode():
        residence.leave()
        residence.load()
    assert not any(parameter.is_inference() for parameter in dit.parameters())


def test_a_limit_holds_whatever_the_budget(dit):
    residence = Residence(dit, CPU, streamer=stream_dit(dit, CPU, num_resident=2), limit=2)
    residence.load()
    assert residence.num_resident == 2 and residence.wanted_bytes == residence.device_bytes
    residence.leave()
    residence.load(10 * tensor_bytes(dit))
    assert residence.num_resident == 2
    placed = PlacedDiT(dit=dit, device=CPU, streamer=residence.streamer)
    assert placed.lower() and placed.residence.limit == 1
    placed.residence.load()
    assert placed.residence.num_resident == 1


def test_a_little_more_room_moves_nothing(dit, monkeypatch):
    residence = Residence(dit, CPU)
    residence.load(residence.bytes_with(2))
    assert residence.streamer is not None
    changes = []
    monkeypatch.setattr(residence.streamer, "set_num_resident", changes.append)
    monkeypatch.setattr("flux2_kit.flux2_core.residency.RAISE_SHARE", 0.3)
    residence.load(residence.bytes_with(2))
    residence.load(residence.bytes_with(4))
    assert changes == []
    residence.load(residence.bytes_with(5))
    residence.load(residence.bytes_with(1))
    residence.load()
    assert changes == [5, 1, NUM_BLOCKS]


def test_weights_of_a_file_stay_there_when_the_network_leaves(random_tiny_files):
    dit = load_dit(random_tiny_files.dit, "tiny")[0]
    expected = run(dit)
    streamer = stream_dit(dit, CPU, num_resident=3, file=random_tiny_files.dit)
    residence = Residence(dit, CPU, streamer=streamer)
    residence.leave()
    assert streamer.num_resident == 0
    residence.load()
    assert streamer.num_resident == 6 and torch.equal(run(dit), expected)


def test_without_memory_nothing_of_it_is_left_on_the_device(dit, monkeypatch):
    residence, expected = Residence(dit, CPU), run(dit)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr("flux2_kit.flux2_core.residency.stream_dit", fail)
        with pytest.raises(torch.OutOfMemoryError):
            residence.load(residence.bytes_with(2))
    assert not residence.is_loaded and residence.device_bytes == 0
    residence.load()
    assert torch.equal(run(dit), expected)


def test_a_text_encoder_leaves_layer_by_layer(random_tiny_files):
    encoder = load_text_encoder(random_tiny_files.text_encoder)
    residence, expected = Residence(encoder, CPU), encoder.encode(["a red circle"]).embeddings
    whole = residence.device_bytes
    assert whole == tensor_bytes(encoder.model) and residence.free(1) > 0
    assert torch.equal(encoder.encode(["a red circle"]).embeddings, expected)
    residence.leave()
    residence.load()
    assert residence.num_resident == residence.num_blocks
    # The token embedding stays in host memory once layers were streamed.
    assert residence.device_bytes == whole - tensor_bytes(encoder.model.get_input_embeddings())
    assert torch.equal(encoder.encode(["a red circle"]).embeddings, expected)


def test_an_autoencoder_leaves_whole_and_knows_its_references_afterwards(random_tiny_files, monkeypatch):
    autoencoder = load_autoencoder(random_tiny_files.autoencoder)
    residence = Residence(autoencoder, CPU)
    picture = tensor_to_images(torch.rand(1, 3, 64, 64))[0]
    (before,) = encode_references(autoencoder, [picture], known=reference_store(autoencoder))
    assert residence.free(1) == 0 and residence.is_loaded
    residence.leave()
    # A move between devices gives the weights another address.
    monkeypatch.setattr(torch.nn.Module, "to", new_addresses)
    residence.load(0)
    assert residence.device_bytes == tensor_bytes(autoencoder)
    (after,) = encode_references(autoencoder, [picture], known=reference_store(autoencoder))
    assert after is before
    autoencoder.decoder.conv_in.weight.data.zero_()
    new_addresses(autoencoder)
    (other,) = encode_references(autoencoder, [picture], known=reference_store(autoencoder))
    assert other is not before


def new_tensors(module: torch.nn.Module, *_: object) -> torch.nn.Module:
    return module._apply(torch.clone)


def new_addresses(module: torch.nn.Module, *_: object) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def test_cached_references_leave_the_device_with_the_network(dit, monkeypatch):
    residence, left = Residence(dit, CPU), []
    monkeypatch.setattr(reference_caches(dit), "leave_device", lambda: left.append(residence.is_loaded))
    residence.free(1)
    residence.leave()
    assert left == [True, True]


def test_it_keeps_no_network_alive(dit):
    networks = [Flux2DiT(dit.config), Flux2DiT(dit.config), Flux2Autoencoder(VARIANTS["tiny"].autoencoder)]
    residences = [Residence(network.requires_grad_(False), CPU) for network in networks]
    assert residences[0].free(1)
    alive = [weakref.ref(network) for network in networks]
    gc.disable()  # nobody else may be needed for it
    try:
        networks.clear()
        assert [weak() for weak in alive] == [None] * 3
    finally:
        gc.enable()
