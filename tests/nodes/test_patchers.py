"""What ComfyUI is told of our networks, and when; its memory management is stood in for by its interface.

The real one of 0.3.75 is used in tests/comfyui. This one has what came later as well: arguments and methods that it
hands to every patcher, of which ours need to know nothing.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

TINY = "tiny (bundled)"
CPU = torch.device("cpu")


class ModelPatcher:
    """As much of ComfyUI's as is called on a patcher without patches."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device, self.parent = model, load_device, offload_device, None

    def is_dynamic(self) -> bool:
        return False

    def model_patches_models(self) -> list[Any]:
        return []

    def partially_unload_ram(self, ram_to_unload: int, subsets: object = None) -> int:
        return 0


class DynamicPatcher(ModelPatcher):
    """What newer ones use for their own models: it cannot move ours."""

    def __init__(self, *args: object) -> None:
        raise AssertionError("networks of ours have no layers that it knows")


class Management:
    """Loads and unloads as ComfyUI does, by what it asks of patchers; the device has no end."""

    VRAMState: ClassVar = SimpleNamespace(NORMAL_VRAM=1)

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.calls: list[tuple[str, int]] = []

    def get_torch_device(self) -> torch.device:
        return CPU

    def unet_offload_device(self) -> torch.device:
        return CPU

    def soft_empty_cache(self) -> None:
        self.calls.append(("empty", 0))

    def throw_exception_if_processing_interrupted(self) -> None:
        pass

    def load_models_gpu(
        self, models: list[Any], memory_required: int = 0, force_patch_weights: bool = False, **_: object
    ) -> None:
        for model in [*models, *(other for first in models for other in first.model_patches_models())]:
            assert not model.is_dynamic() and model.model_size() >= model.loaded_size() >= 0
            self.calls.append((type(model.model).__name__, memory_required))
            self.loaded = [other for other in self.loaded if other is not model]
            model.detach(unpatch_all=False)
            model.partially_load(model.load_device, 1e32, force_patch_weights=force_patch_weights)
            assert model.current_loaded_device() == model.load_device and model.loaded_size() == model.model_size()
            self.loaded.append(model)

    @property
    def current_loaded_models(self) -> list[Any]:
        return [SimpleNamespace(model=model) for model in self.loaded]

    def free_memory(
        self, memory_required: float, device: torch.device, keep_loaded: Any = (), for_dynamic: bool = False, **_: int
    ) -> None:
        self.calls.append(("free", int(min(memory_required, 2**60))))
        if memory_required >= 2**60:
            kept = [loaded.model for loaded in keep_loaded]
            for model in self.loaded:
                model.detach(unpatch_all=model not in kept)
            self.loaded = kept

    def unload_all_models(self) -> None:
        self.calls.append(("unload", 0))
        for model in self.loaded:
            assert model.partially_unload(model.offload_device, 2**60) == 0
            model.detach(True)
            assert model.partially_unload_ram(2**60) == 0 and model.loaded_size() == 0
        self.loaded = []


@pytest.fixture
def management(monkeypatch, host) -> Management:
    made = Management()
    monkeypatch.setitem(sys.modules, "comfy.model_management", made)
    patchers = SimpleNamespace(ModelPatcher=ModelPatcher, CoreModelPatcher=DynamicPatcher)
    monkeypatch.setitem(sys.modules, "comfy.model_patcher", patchers)
    sys.modules[f"{host.__package__}.loaders"]._in_use.clear()
    return made


@pytest.fixture
def networks(management, nodes) -> SimpleNamespace:
    (dit,) = nodes["Flux2KitLoadDiT"].load(TINY, "auto", "fp32")
    (text_encoder,) = nodes["Flux2KitLoadTextEncoder"].load(TINY, "fp32")
    (ae,) = nodes["Flux2KitLoadAE"].load(TINY)
    assert [name for name, _ in management.calls if name != "free"] == [
        "Flux2DiTWeights",
        "TextEncoderWeights",
        "Flux2AutoencoderWeights",
    ]
    management.calls.clear()
    return SimpleNamespace(dit=dit, text_encoder=text_encoder, ae=ae)


@pytest.fixture
def patchers(host):
    return sys.modules[f"{host.__package__}.patchers"]


def sample(nodes, networks, **settings) -> torch.Tensor:
    (positive,) = nodes["Flux2KitEncodePrompt"].encode(networks.text_encoder, "a red circle")
    widgets = {"width": 64, "height": 64, "num_steps": 1, "cfg_scale": 1.0, "guidance": 0.0, "flow_shift": 0.0}
    widgets |= {"seed": 0, "num_images": 1, **settings}
    return nodes["Flux2KitSample"].sample(networks.dit, positive, **widgets)[0]["samples"]


def test_every_node_brings_its_network_with_room_for_its_work(management, nodes, networks, patchers):
    latents = sample(nodes, networks, ae=networks.ae)
    nodes["Flux2KitDecode"].decode(networks.ae, {"samples": latents}, False)
    tokens = networks.dit.variant.text_encoder.max_tokens
    assert management.calls == [
        ("TextEncoderWeights", patchers.text_bytes(networks.text_encoder)),
        ("Flux2AutoencoderWeights", 0),  # for the preview, whose factors are fitted once
        ("Flux2DiTWeights", patchers.step_bytes(networks.dit, 1, 16, tokens)),
        ("Flux2AutoencoderWeights", patchers.picture_bytes(networks.ae, [(64, 64)], decodes=True, tiled=False)),
    ]
    assert all(num_bytes > 0 for name, num_bytes in management.calls if name != "Flux2AutoencoderWeights")
    management.calls.clear()
    sample(nodes, networks, ae=networks.ae, num_images=2, width=128)
    assert management.calls[1:] == [("Flux2DiTWeights", patchers.step_bytes(networks.dit, 2, 32, tokens))]


def test_references_are_encoded_with_the_autoencoder_and_once(management, nodes, networks, patchers):
    encode = nodes["Flux2KitEncodeReference"].encode
    for _ in range(2):
        (references,) = encode(
            networks.ae, torch.rand(1, 80, 96, 3, generator=torch.Generator().manual_seed(0)), False, False
        )
        sample(nodes, networks, references=references)
    room = patchers.picture_bytes(networks.ae, [(96, 80)], decodes=False, tiled=False)
    assert [call for call in management.calls if call[0] == "Flux2AutoencoderWeights"] == [
        ("Flux2AutoencoderWeights", room)
    ]


def test_what_was_unloaded_comes_back_with_the_same_numbers(management, nodes, networks):
    before = sample(nodes, networks)
    management.unload_all_models()
    assert management.loaded == []
    assert torch.equal(sample(nodes, networks), before)
    assert {type(model.model).__name__ for model in management.loaded} == {"Flux2DiTWeights", "TextEncoderWeights"}


def test_native_vae_and_clip_bring_their_networks(management, nodes, networks, patchers):
    (vae,) = nodes["Flux2KitToVAE"].convert(networks.ae)
    (clip,) = nodes["Flux2KitToCLIP"].convert(networks.text_encoder)
    vae.encode(torch.rand(1, 64, 64, 3))
    clip.encode("a red circle")
    assert [name for name, _ in management.calls] == ["Flux2AutoencoderWeights", "TextEncoderWeights"]
    assert all(num_bytes > 0 for _, num_bytes in management.calls)


def test_a_patcher_is_its_own_clone_and_keeps_nothing_alive(management, nodes, networks, patchers):
    patcher = patchers.patcher_of(networks.dit.dit)
    assert patcher.clone() is patcher and patcher.memory_required([1, 128, 4, 4]) == 0
    patcher.unpatch_model(CPU, unpatch_weights=False)
    assert patcher.loaded_size() == patcher.model_size() > 0
    assert patcher.patch_model(CPU, lowvram_model_memory=0) is patcher.model
    management.loaded.clear()
    alive = weakref.ref(networks.dit.dit)
    del patcher, networks.dit
    assert alive() is None


def test_out_of_memory_others_leave_before_blocks_do(management, nodes, networks, monkeypatch):
    before, placed = sample(nodes, networks, num_images=2), networks.dit.placed
    monkeypatch.setattr(placed, "device", torch.device("cuda"))  # where running out of memory is answered
    seen: list[tuple[int, int]] = []

    def work() -> torch.Tensor:
        seen.append((len(management.loaded), placed.residence.num_resident))
        if len(seen) < 3:
            raise torch.OutOfMemoryError("no")
        return sample(
            nodes, SimpleNamespace(dit=replace(networks.dit, placed=None), text_encoder=text_encoder), num_images=2
        )

    text_encoder = networks.text_encoder
    assert torch.equal(networks.dit.run(work), before)
    assert seen == [(3, 6), (1, 6), (1, 3)]


def test_all_leave_when_the_device_is_needed(management, networks, host):
    host.unload_all()
    assert management.calls == [("unload", 0), ("empty", 0)] and management.loaded == []


def test_a_host_that_cannot_unload_all_is_asked_for_all_its_memory(host, monkeypatch):
    freed = []
    plain = SimpleNamespace(
        get_torch_device=lambda: CPU, soft_empty_cache=lambda: None, free_memory=lambda *args: freed.append(args)
    )
    monkeypatch.setitem(sys.modules, "comfy.model_management", plain)
    host.unload_all()
    assert freed == [(host.EVERYTHING, CPU)]


def test_a_host_without_the_interface_only_makes_room(nodes, host, patchers, monkeypatch):
    freed = []
    plain = SimpleNamespace(get_torch_device=lambda: CPU, free_memory=lambda num_bytes, _: freed.append(num_bytes))
    monkeypatch.setitem(sys.modules, "comfy.model_management", plain)
    sys.modules[f"{host.__package__}.loaders"]._in_use.clear()
    (dit,) = nodes["Flux2KitLoadDiT"].load(TINY, "auto", "fp32")
    patchers.use(dit.dit, 123)
    assert patchers.patcher_of(dit.dit) is None and not patchers.is_shared() and freed[-1] == 123
