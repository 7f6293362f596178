"""Our networks among ComfyUI's models: each makes the others leave the device when its memory is short.

ComfyUI counts models by their ModelPatchers. Ours have no weights that it could see: what it asks in bytes becomes
resident blocks. It holds them weakly, so they live as long as the networks do. Where there is no ComfyUI, or one
without these functions, networks stay where the loaders put them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..flux2_core import reference_memory
from ..flux2_core.autoencoder import PIXELS_PER_LATENT, Flux2Autoencoder
from ..flux2_core.autoencoder_memory import decoding_bytes, encoding_bytes, strip_bytes
from ..flux2_core.linear import Linear
from ..flux2_core.lora import LoraSetting, linear_layers
from ..flux2_core.memory_estimates import (
    Computation,
    TokenCounts,
    text_encoder_bytes,
    text_encoding_bytes,
)
from ..flux2_core.pipeline import SamplingConfig
from ..flux2_core.reference_cache import ReferenceCacheMode
from ..flux2_core.residency import HOST, Network, Residence
from ..flux2_core.text_encoder import TextEncoder
from . import host

if TYPE_CHECKING:
    from .loaders import LoadedDiT

_residences: WeakKeyDictionary[Network, Residence] = WeakKeyDictionary()
_patchers: WeakKeyDictionary[Network, Any] = WeakKeyDictionary()


def register(network: Network, residence: Residence, work_bytes: int) -> None:
    """Tells ComfyUI of a network that has just been loaded.

    Args:
        work_bytes: that its work will take beside the weights, as far as is known by now.
    """
    _residences[network] = residence
    if (management := _management()) is None:
        return
    patcher_class = network_patcher_class(sys.modules["comfy.model_patcher"].ModelPatcher)
    patcher = _patchers[network] = patcher_class(residence, _held(network), load_device=residence.device)
    management.load_models_gpu([patcher], memory_required=work_bytes)


def use(network: Network, work_bytes: int) -> None:
    """Brings a network to its device as far as there is room beside its work; others leave for it.

    Args:
        work_bytes: of the device, that the work takes beside the weights.
    """
    management, patcher = _management(), _patchers.get(network)
    if management is not None and patcher is not None:
        management.load_models_gpu([patcher], memory_required=work_bytes)
    else:
        host.make_room(work_bytes)


def use_text_encoder(encoder: TextEncoder) -> None:
    """As `use`, for a prompt."""
    if encoder in _patchers:
        use(encoder, text_bytes(encoder))


def make_others_leave(network: Network) -> bool:
    """Lets ComfyUI unload all models but this one; False where it has none, or does not know this one."""
    management, patcher = _management(), _patchers.get(network)
    if management is None or patcher is None:
        return False
    kept = [loaded for loaded in management.current_loaded_models if loaded.model is patcher]
    is_alone = len(kept) == len(management.current_loaded_models)
    management.free_memory(host.EVERYTHING, patcher.load_device, keep_loaded=kept)
    return not is_alone


def patcher_of(network: Network) -> Any:
    """What stands for a network among ComfyUI's models; None where nothing does."""
    return _patchers.get(network)


def is_shared() -> bool:
    """Whether networks leave the device when ComfyUI asks for room there."""
    return _management() is not None


def stream_all(kind: type[Network]) -> None:
    """Lets networks of a kind leave the device but for what they need to be streamed."""
    for network, residence in list(_residences.items()):
        if isinstance(network, kind):
            residence.set_limit(0)
    host.release_memory()


def text_bytes(encoder: TextEncoder) -> int:
    """What the encoding of a prompt takes of the device."""
    layers: Any = encoder.model.layers
    linears = [module for module in layers[0].modules() if isinstance(module, Linear)]
    weight_format = linears[0].weight_format if linears else None
    item_bytes = encoder.dtype.itemsize
    weights = text_encoder_bytes(encoder.config, weight_format, item_bytes)
    dense = weight_format == "nf4" or (weight_format == "fp8" and host.device().type != "cuda")
    return text_encoding_bytes(encoder.config, weights, item_bytes, dense=dense)


def picture_bytes(
    autoencoder: Flux2Autoencoder, sizes: Sequence[tuple[int, int]], *, decodes: bool, tiled: bool
) -> int:
    """What the autoencoder's work on pictures, one after the other, takes of the device.

    Args:
        sizes: width and height of each, in pixels.
        tiled: in strips.
    """
    item_bytes, is_cuda = autoencoder.decoder.conv_in.weight.dtype.itemsize, host.device().type == "cuda"
    count = partial(decoding_bytes if decodes else encoding_bytes, is_cuda=is_cuda)
    strips = partial(strip_bytes, decodes=decodes, is_cuda=is_cuda)
    return max(
        (
            strips(autoencoder.config, *size, item_bytes)[0] if tiled else count(autoencoder.config, *size, item_bytes)
            for size in sizes
        ),
        default=0,
    )


def latent_size(latents: Tensor) -> tuple[int, int]:
    """Width and height of the pictures of latents ``[..., h, w]``, in pixels."""
    return latents.shape[-1] * PIXELS_PER_LATENT, latents.shape[-2] * PIXELS_PER_LATENT


def step_bytes(
    loaded: LoadedDiT,
    num_rows: int,
    num_tokens: int,
    num_text_tokens: int,
    num_reference_tokens: int = 0,
    reference_cache: ReferenceCacheMode = "off",
) -> int:
    """What a forward pass of the DiT takes of the device, with the factors of its LoRAs and the cache of references.

    Args:
        num_tokens: of the picture and its references.
        num_reference_tokens: how many of them are of references.
    """
    assert reference_cache != "auto"
    first = next(iter(linear_layers(loaded.dit).values()))
    how = Computation(
        item_bytes=loaded.dit.dtype.itemsize,
        weight_format=first.weight_format,
        is_cuda=host.device().type == "cuda",
        is_adapted=bool(loaded.loras),
    )
    counts = TokenCounts(num_rows=num_rows, num_tokens=num_tokens, num_text_tokens=num_text_tokens)
    peak = reference_memory.sampling_bytes(loaded.variant.dit, counts, num_reference_tokens, how, reference_cache)
    return peak + lora_bytes(loaded.loras)


def sampling_bytes(loaded: LoadedDiT, sampling: SamplingConfig, text: Tensor, references: Sequence[Tensor]) -> int:
    """As `step_bytes`, of sampling with resolved settings."""
    assert sampling.width and sampling.height
    sizes = [(sampling.width, sampling.height), *map(latent_size, references)]
    counts = [(width // PIXELS_PER_LATENT) * (height // PIXELS_PER_LATENT) for width, height in sizes]
    num_rows = sampling.num_images * (1 if sampling.cfg_scale in (None, 1) else 2)
    return step_bytes(loaded, num_rows, sum(counts), text.shape[1], sum(counts[1:]), sampling.reference_cache)


def lora_bytes(loras: Sequence[LoraSetting]) -> int:
    """What the factors of LoRAs take as they run."""
    from ..flux2_core.placement import lora_bytes as count

    return count(loras)


class HeldNetwork(nn.Module):
    """What ComfyUI sees of a network: something that lives as long as its patcher, and a name for its log."""


@lru_cache
def _held_class(name: str) -> type[HeldNetwork]:
    return type(name, (HeldNetwork,), {})


def _held(network: Network) -> HeldNetwork:
    return _held_class(f"{type(network).__name__}Weights")()


def _management() -> Any:
    """ComfyUI's module of that name, where it can be told of our networks."""
    management = sys.modules.get("comfy.model_management")
    has_patcher = hasattr(sys.modules.get("comfy.model_patcher"), "ModelPatcher")
    return management if has_patcher and hasattr(management, "load_models_gpu") else None


@lru_cache
def network_patcher_class(base: Any) -> Any:
    """A ModelPatcher that moves a network as its `Residence` does.

    The base is the plain class, not the one that ComfyUI may use for its own models: that one moves single weights on
    demand, and knows how to do so only for layers of ComfyUI's.
    """

    class NetworkPatcher(base):
        def __init__(self, residence: Residence, held: HeldNetwork, load_device: torch.device) -> None:
            super().__init__(held, load_device=load_device, offload_device=HOST)
            self.residence = residence

        def clone(self, *args: object, **kwargs: object) -> Any:
            # Nothing is ever patched, so there is nothing that two of them could differ in.
            return self

        def model_size(self) -> int:
            return self.residence.wanted_bytes

        def loaded_size(self) -> int:
            return self.residence.device_bytes

        def current_loaded_device(self) -> torch.device:
            return self.load_device if self.residence.is_loaded else self.offload_device

        def memory_required(self, *args: object, **kwargs: object) -> int:
            return 0  # what the work takes is told with every use

        def load(
            self,
            device_to: Any = None,
            lowvram_model_memory: float = 0,
            force_patch_weights: bool = False,
            full_load: bool = False,
            **_: Any,
        ) -> None:
            is_free = full_load or not lowvram_model_memory
            self.residence.load(None if is_free else round(lowvram_model_memory))

        def patch_model(
            self,
            device_to: Any = None,
            lowvram_model_memory: float = 0,
            load_weights: bool = True,
            *args: Any,
            **_: Any,
        ) -> HeldNetwork:
            if load_weights:
                self.load(device_to, lowvram_model_memory)
            return self.model

        def partially_load(self, device_to: Any, extra_memory: float = 0, *args: Any, **_: Any) -> int:
            before = self.residence.device_bytes
            self.residence.load(round(before + extra_memory))
            return max(self.residence.device_bytes - before, 0)

        def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **_: Any) -> int:
            return self.residence.free(round(memory_to_free))

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
            if unpatch_weights:
                self.residence.leave()

        def detach(self, unpatch_all: bool = True) -> HeldNetwork:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
            return self.model

    return NetworkPatcher
