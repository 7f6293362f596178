"""Our networks among others in ComfyUI's own memory management, on a device that is only counted.

``launch.py memory_scenarios.py COMFYUI_FOLDER PACK_FOLDER`` runs every scenario and prints, as JSON, what went wrong in
which. ComfyUI is told of a GPU of a size that a scenario chooses; what is loaded there is counted, while all numbers
stay on the CPU. Models of ComfyUI are stood in for by patchers of which only the size is known.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

MIB = 2**20
PLENTY = 1000 * MIB
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
TINY = "tiny (bundled)"


class World:
    """ComfyUI's memory management, the pack, and the GPU that both believe in."""

    def __init__(self, comfyui: Path, pack: Path) -> None:
        sys.path.insert(0, str(comfyui))
        sys.argv = ["main.py", "--cpu"]
        import comfy.options  # pyright: ignore[reportMissingImports]

        comfy.options.enable_args_parsing()
        import comfy.model_management as management  # pyright: ignore[reportMissingImports]
        import comfy.model_patcher  # pyright: ignore[reportMissingImports]

        self.management: Any = management
        self.total = PLENTY
        self.natives: WeakSet[Any] = WeakSet()
        management.get_torch_device = lambda: GPU
        management.get_free_memory = self.free
        management.vram_state = management.VRAMState.NORMAL_VRAM
        management.minimum_inference_memory = lambda: 0
        management.extra_reserved_memory = lambda: 0
        management.MIN_WEIGHT_MEMORY_RATIO = 0.0
        self.native_class = native_class(comfy.model_patcher.ModelPatcher)

        self.nodes = load_pack(pack).NODE_CLASS_MAPPINGS
        self.host, self.patchers, self.loaders = (
            sys.modules[f"{pack_name(pack)}.nodes.{name}"] for name in ("host", "patchers", "loaders")
        )
        self.residence = sys.modules[f"{pack_name(pack)}.flux2_core.residency"].Residence
        self.host.device = lambda: CPU
        self.residence.moves = True
        make = self.patchers.network_patcher_class
        self.patchers.network_patcher_class = lambda base: on_gpu(make(base))
        self.text: Any = None
        self.dit: Any = None
        self.ae: Any = None

    def free(self, device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        assert device in (None, GPU), device
        # Not what ComfyUI counts: while it loads a model, that is in no list.
        patchers = [*self.patchers._patchers.values(), *self.natives]
        free = self.total - sum(patcher.loaded_size() for patcher in patchers)
        return (free, 0) if torch_free_too else free

    def fresh(self) -> None:
        """Nothing is loaded, and there is plenty of memory."""
        self.text = self.dit = self.ae = None
        gc.collect()
        self.management.unload_all_models()
        self.total = PLENTY

    def load(self, vram_budget: float = 0.0) -> None:
        """Our three networks, by the nodes that load them."""
        (self.dit,) = self.nodes["Flux2KitLoadDiT"].load(TINY, "auto", "fp32", vram_budget)
        (self.text,) = self.nodes["Flux2KitLoadTextEncoder"].load(TINY, "fp32")
        (self.ae,) = self.nodes["Flux2KitLoadAE"].load(TINY)

    def picture(self) -> torch.Tensor:
        """By the nodes that make one."""
        with torch.inference_mode():
            (positive,) = self.nodes["Flux2KitEncodePrompt"].encode(self.text, "a large red circle")
            settings = {"width": 64, "height": 64, "num_steps": 2, "cfg_scale": 1.0, "guidance": 0.0}
            settings |= {"flow_shift": 0.0, "seed": 5, "num_images": 1}
            (latent,) = self.nodes["Flux2KitSample"].sample(self.dit, positive, ae=self.ae, **settings)
            return self.nodes["Flux2KitDecode"].decode(self.ae, latent, False)[0]

    def native(self, num_bytes: int) -> Any:
        """A loaded model of ComfyUI's."""
        native = self.native_class(num_bytes)
        self.natives.add(native)
        self.management.load_models_gpu([native])
        return native

    def residence_of(self, network: Any) -> Any:
        return self.patchers.patcher_of(network).residence

    @property
    def loaded(self) -> dict[str, int]:
        models = [loaded.model for loaded in self.management.current_loaded_models]
        return {type(model.model).__name__: model.loaded_size() for model in models}


def native_class(base: Any) -> Any:
    """A ModelPatcher of a model of which only the size is known; it can be loaded in part, like any of ComfyUI's."""

    class Native(base):
        def __init__(self, num_bytes: int) -> None:
            super().__init__(nn.Module(), load_device=GPU, offload_device=CPU, size=num_bytes)
            self.loaded = 0

        def loaded_size(self) -> int:
            return self.loaded

        def current_loaded_device(self) -> torch.device:
            return GPU if self.loaded else CPU

        def partially_load(self, device_to: torch.device, extra_memory: float = 0, **_: object) -> int:
            before, self.loaded = self.loaded, int(min(self.size, max(self.loaded + extra_memory, 0)))
            return max(self.loaded - before, 0)

        def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: object) -> int:
            before, self.loaded = self.loaded, int(max(self.loaded - memory_to_free, 0))
            return before - self.loaded

        def detach(self, unpatch_all: bool = True) -> nn.Module:
            self.loaded = 0 if unpatch_all else self.loaded
            return self.model

    return Native


def on_gpu(patcher_class: Any) -> Any:
    """The same, with ComfyUI told that the network runs on its GPU."""

    class OnGPU(patcher_class):
        def __init__(self, residence: Any, held: nn.Module, load_device: torch.device) -> None:
            super().__init__(residence, held, load_device=GPU)

    return OnGPU


def pack_name(pack: Path) -> str:
    return str(pack).replace(".", "_x_")


def load_pack(pack: Path) -> ModuleType:
    """As ComfyUI does it."""
    name = pack_name(pack)
    spec = importlib.util.spec_from_file_location(name, pack / "__init__.py", submodule_search_locations=[str(pack)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def ours_make_native_models_leave(world: World) -> None:
    world.load()
    expected = world.picture()
    world.management.unload_all_models()
    native = world.native(10 * MIB)
    world.total = 16 * MIB
    assert torch.equal(world.picture(), expected)
    assert native.loaded < 10 * MIB and sum(world.loaded.values()) <= world.total


def native_models_make_ours_leave(world: World) -> None:
    world.load()
    expected = world.picture()
    before = sum(world.loaded.values())
    world.total = before + MIB
    native = world.native(10 * MIB)
    assert native.loaded == 10 * MIB and sum(world.loaded.values()) <= world.total
    assert torch.equal(world.picture(), expected)


def part_of_a_network_leaves(world: World) -> None:
    world.load()
    expected = world.picture()
    residence = world.residence_of(world.dit.dit)
    world.total = before = residence.device_bytes
    world.management.unload_all_models()
    world.patchers.use(world.dit.dit, 0)
    assert residence.device_bytes == before
    for wanted in (before // 8, before // 3):
        world.management.free_memory(wanted, GPU)
        assert residence.is_loaded and world.free() >= wanted and residence.num_resident < residence.num_blocks
    world.management.free_memory(before - 1, GPU)
    assert not residence.is_loaded and world.loaded == {}
    world.total = PLENTY
    assert torch.equal(world.picture(), expected) and residence.num_resident == residence.num_blocks


def too_little_memory_streams(world: World) -> None:
    world.load()
    expected = world.picture()
    residence = world.residence_of(world.dit.dit)
    work = world.patchers.step_bytes(world.dit, 1, 16, 24)
    world.management.unload_all_models()
    world.total = work + residence.bytes_with(2)
    world.patchers.use(world.dit.dit, work)
    assert residence.num_resident == 2 and world.free() >= work
    world.total = work  # nothing is left for weights
    world.patchers.use(world.dit.dit, work)
    assert residence.num_resident == 0
    world.total = PLENTY
    assert torch.equal(world.picture(), expected)


def a_budget_of_the_user_stays_the_limit(world: World) -> None:
    world.load()
    expected = world.picture()
    whole = world.residence_of(world.dit.dit).device_bytes
    work = world.patchers.step_bytes(world.dit, 1, 16, 24)
    world.fresh()
    world.load(vram_budget=(whole * 0.8 + work) / 2**30)
    residence = world.residence_of(world.dit.dit)
    limit = residence.num_resident
    assert limit < residence.num_blocks
    assert torch.equal(world.picture(), expected) and residence.num_resident == limit
    world.management.unload_all_models()
    assert torch.equal(world.picture(), expected) and residence.num_resident == limit
    assert residence.device_bytes == residence.wanted_bytes < whole


def everything_leaves_and_comes_back(world: World) -> None:
    world.load()
    expected = world.picture()
    networks = {"Flux2DiTWeights", "TextEncoderWeights", "Flux2AutoencoderWeights"}
    assert set(world.loaded) == networks and all(world.loaded.values())
    before = (world.dit, world.text, world.ae)
    world.host.unload_all()
    residences = [world.residence_of(network) for network in (world.dit.dit, world.text, world.ae)]
    assert world.loaded == {} and not any(residence.is_loaded for residence in residences)
    reads: list[Any] = []
    world.loaders._load_dit = world.loaders._load_text_encoder = world.loaders._load_autoencoder = reads.append
    world.load()
    assert (world.dit, world.text, world.ae) == before and reads == []
    assert torch.equal(world.picture(), expected) and set(world.loaded) == networks


def a_second_picture_moves_nothing(world: World) -> None:
    world.load()
    world.picture()
    moves: list[int] = []
    original = world.residence._come, world.residence._set_num_resident
    world.residence._come = world.residence._set_num_resident = lambda self, number: moves.append(number)
    try:
        world.picture()
    finally:
        world.residence._come, world.residence._set_num_resident = original
    assert moves == []


def networks_that_are_dropped_are_forgotten(world: World) -> None:
    world.load()
    world.picture()
    world.residence_of(world.dit.dit).free(1)
    world.dit = world.text = world.ae = None
    gc.collect()
    assert world.management.current_loaded_models == []
    assert len(world.patchers._patchers) == len(world.patchers._residences) == 0


def little_memory_loads_them_all(world: World) -> None:
    """Each as far as it can while it is the one in use."""
    world.load()
    expected = world.picture()
    world.fresh()
    world.total = 9 * MIB
    world.load()
    assert torch.equal(world.picture(), expected)
    assert sum(world.loaded.values()) <= world.total


SCENARIOS: dict[str, Callable[[World], None]] = {
    scenario.__name__: scenario
    for scenario in (
        *(ours_make_native_models_leave, native_models_make_ours_leave, part_of_a_network_leaves),
        *(too_little_memory_streams, a_budget_of_the_user_stays_the_limit, little_memory_loads_them_all),
        *(a_second_picture_moves_nothing, networks_that_are_dropped_are_forgotten, everything_leaves_and_comes_back),
    )
}


def main() -> None:
    world = World(*map(Path, sys.argv[1:3]))
    failures: dict[str, str] = {}
    for name, scenario in SCENARIOS.items():
        world.fresh()
        try:
            scenario(world)
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
