"""A DiT of ours as ComfyUI's MODEL: native samplers, guiders and conditioning run it.

What goes over the link is a ModelPatcher of ComfyUI around a model without weights of its own, so nothing in ComfyUI
can patch, cast or save the DiT behind it. Whatever tries is refused with what to do instead. Classes of ComfyUI are
taken from its loaded modules when a MODEL is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux2_core.autoencoder import AutoencoderConfig
from ..flux2_core.dit import Flux2DiT
from ..flux2_core.latents import image_ids, latents_to_tokens, reference_tokens, text_ids, tokens_to_latents
from ..flux2_core.linear import Adapter
from ..flux2_core.lora import apply_loras, linear_layers
from ..flux2_core.pipeline import check_latents, check_num_references, check_text
from ..flux2_core.reference_cache import reference_caches
from ..flux2_core.variants import Variant
from . import host, patchers
from .loaders import LoadedDiT

UNSUPPORTED_OPTIONS = {
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
    "concat_latent_image": "an inpainting latent (use Set Latent Noise Mask for inpainting)",
}
"""Options of native CONDITIONING that the DiT cannot carry out, for people. Areas and masks are the sampler's work."""
UNSUPPORTED_PATCHES = ("patches", "patches_replace", "rope_options", "optimized_attention_override")
"""What native nodes set in a MODEL's transformer_options to change the inside of a network."""
REFERENCE_METHODS = (None, "index")
"""Of native `reference_latents_method`: FLUX.2's own, which counts references along the time axis."""
USE_APPLY_LORA = "Apply LoRAs with FLUX.2 Apply LoRA, before FLUX.2 to MODEL."


def to_model(dit: LoadedDiT, shift_exponent: float) -> Any:
    """A MODEL that runs a link's DiT with its LoRAs.

    Args:
        shift_exponent: the mu of the noise schedule that KSampler and BasicScheduler take from a MODEL.

    Raises:
        ValueError: there is no ComfyUI, or one that does not know FLUX.2.
    """
    supported_models, model_base = comfy_module("comfy.supported_models"), comfy_module("comfy.model_base")
    if not hasattr(supported_models, "Flux2"):
        raise ValueError("this ComfyUI does not know FLUX.2; update it, or sample with FLUX.2 Sample")
    # ComfyUI's own estimate of memory, which is not used, asks for the hidden size.
    settings = {"image_model": "flux2", "hidden_size": dit.variant.dit.hidden_size, "disable_unet_model_creation": True}
    config = supported_models.Flux2(settings)
    config.sampling_settings = {**config.sampling_settings, "shift": shift_exponent}
    if dit.variant.autoencoder != AutoencoderConfig():
        config.latent_format.latent_rgb_factors = None  # previews made for other latents would be noise
    model = bridged_model_class(model_base.BaseModel)(config, dit)
    patcher = bridged_patcher_class(comfy_module("comfy.model_patcher").ModelPatcher)
    management = comfy_module("comfy.model_management")
    return patcher(model, load_device=host.device(), offload_device=management.unet_offload_device())


def comfy_module(name: str) -> Any:
    """A loaded module of ComfyUI.

    Raises:
        ValueError: we run without it.
    """
    if (module := sys.modules.get(name)) is None:
        raise ValueError(f"{name} is not there: bridges to native nodes work inside ComfyUI only; use FLUX.2 Sample")
    return module


class BridgedDiT(nn.Module):
    """The diffusion_model of a MODEL: native arguments to those of `Flux2DiT`.

    The DiT is no submodule: its weights are not ComfyUI's to move or patch.
    """

    def __init__(self, loaded: LoadedDiT) -> None:
        super().__init__()
        self.loaded = loaded
        self._adapters: dict[str, tuple[Adapter, ...]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which the native side passes its arguments."""
        return self.loaded.dit.dtype

    def forward(
        self,
        x: Tensor,  # [B, 128, h, w]
        timestep: Tensor,  # [B], sigma
        context: Tensor,  # [B, L, C]
        guidance: float | None = None,
        ref_latents: Sequence[Tensor] = (),
        control: object = None,
        transformer_options: Mapping[str, Any] | None = None,
        **_: object,
    ) -> Tensor:
        """Returns the velocity ``[B, 128, h, w]``."""
        options = transformer_options or {}
        refuse_patches(options)
        run: Callable[..., Tensor] = self._run
        if extension := sys.modules.get("comfy.patcher_extension"):
            # Native nodes that skip steps (EasyCache) wrap a network by this name.
            wrappers = extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, options)
            run = extension.WrapperExecutor.new_class_executor(self._run, self, wrappers).execute
        return run(x, timestep, context, guidance, ref_latents, control, options)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: float | None,
        ref_latents: Sequence[Tensor],
        control: object,
        transformer_options: Mapping[str, Any],
    ) -> Tensor:
        assert control is None, "refused with the conditioning"
        with self._live_loras():
            is_exact = self.loaded.variant.reference_cache == "exact"
            return velocity(self.loaded.dit, x, timestep, context, ref_latents, guidance, caches_references=is_exact)

    @contextmanager
    def _live_loras(self) -> Iterator[None]:
        """This MODEL's LoRAs, and no others, act on the shared DiT: a sampler may run two MODELs in turns."""
        layers = linear_layers(self.loaded.dit)
        before = {name: layer.adapters for name, layer in layers.items()}
        try:
            if self._adapters is None:
                apply_loras(self.loaded.dit, self.loaded.loras)
                self._adapters = {name: layer.adapters for name, layer in layers.items()}
            for name, layer in layers.items():
                layer.adapters = self._adapters[name]
            yield
        finally:
            for name, layer in layers.items():
                layer.adapters = before[name]

    def forget_loras(self) -> None:
        """Frees what LoRAs take of the device; the next step makes it again."""
        self._adapters = None
        reference_caches(self.loaded.dit).settle(self.loaded.dit.device)


def velocity(
    dit: Flux2DiT,
    latents: Tensor,
    sigma: Tensor,
    text: Tensor,
    references: Sequence[Tensor] = (),
    guidance: float | None = None,
    *,
    caches_references: bool = False,
) -> Tensor:
    """One step's velocity ``[B, 128, h, w]``, of the type and on the device of the latents.

    Args:
        latents: ``[B, 128, h, w]``, noisy.
        sigma: ``[B]``, 1 is pure noise.
        text: ``[B, L, C]``.
        references: latents ``[B, 128, h_i, w_i]``.
        guidance: embedded guidance, for networks with a guidance embedder.
        caches_references: whether the network was trained to compute them once for all steps; it does not matter then
            which step is the first one.
    """
    height, width = latents.shape[-2:]
    tokens, ids = latents_to_tokens(latents), image_ids(height, width)
    num_image_tokens = tokens.shape[1]
    cached = None
    if references and caches_references:
        cached = reference_caches(dit).exact(dit, references, guidance)
    elif references:
        extra_tokens, extra_ids = reference_tokens(references)
        tokens, ids = torch.cat((tokens, extra_tokens.to(tokens)), dim=1), torch.cat((ids, extra_ids))
    device, dtype = dit.device, dit.dtype
    prepared = dit.prepare(
        ids.to(device),
        text.to(device, dtype),
        text_ids(text.shape[1]).to(device),
        None if guidance is None else torch.full((len(tokens),), guidance, device=device),
    )
    output = dit.velocity(tokens.to(device, dtype), sigma.to(device, torch.float32), prepared, cached)
    return tokens_to_latents(output[:, :num_image_tokens], height, width).to(latents)


def refuse_patches(transformer_options: Mapping[str, Any]) -> None:
    """Refuses what native nodes would change inside of the network."""
    for name in UNSUPPORTED_PATCHES:
        if found := transformer_options.get(name):
            kinds = f" ({', '.join(map(str, found))})" if isinstance(found, Mapping) else ""
            raise ValueError(
                f"a node between FLUX.2 to MODEL and the sampler sets {name}{kinds}, which the DiT of FLUX.2 Kit does "
                "not take; remove that node, or load the model with a native loader"
            )


def read_options(options: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """What the DiT needs of the options of native CONDITIONING: text, guidance and references.

    Args:
        options: as ComfyUI hands them to a model before it samples; ``cross_attn`` is the embedding, ``noise`` the
            noise of all pictures.

    Returns:
        ``text``: ``[B, L, C]``, padded; ``guidance``: a number, None for networks without; ``references``: latents.

    Raises:
        ValueError: it asks for what the DiT does not do.
    """
    unsupported = [what for key, what in UNSUPPORTED_OPTIONS.items() if options.get(key) is not None]
    if unsupported:
        raise ValueError(
            f"the conditioning carries {', '.join(unsupported)}, which the DiT of FLUX.2 Kit does not do; leave it out"
        )
    method = options.get("reference_latents_method")
    if method not in REFERENCE_METHODS:
        raise ValueError(f"reference_latents_method is {method!r}; FLUX.2 Kit has FLUX.2's own, index: leave it out")
    references = list(options.get("reference_latents") or ())
    check_num_references(len(references))
    check_latents(options["noise"], variant.dit.in_channels, "the sampler's input")
    for latents in references:
        check_latents(latents, variant.dit.in_channels, "a reference")
    text = options.get("cross_attn")
    if text is None:
        raise ValueError("the conditioning holds no prompt; connect CLIP Text Encode or FLUX.2 Encode Prompt")
    check_text(text, variant, len(text))
    # Native prompts are not padded; ComfyUI's FLUX.2 fills them up with zeros on the left.
    missing = max(variant.text_encoder.max_tokens - text.shape[1], 0)
    return {
        "text": F.pad(text, (0, 0, missing, 0)),
        "guidance": _guidance(options, variant),
        "references": references,
    }


def _guidance(options: Mapping[str, Any], variant: Variant) -> float | None:
    guidance = options.get("guidance", variant.guidance)
    if variant.guidance is None and guidance is not None:
        raise ValueError(
            f"the conditioning has guidance {guidance}, but {variant.name} has no guidance embedder; remove "
            "FluxGuidance, and use CFG"
        )
    if variant.guidance is not None and guidance is None:
        raise ValueError(
            f"the conditioning switches guidance off, and {variant.name} does not run without it; remove "
            "FluxDisableGuidance"
        )
    return guidance


@lru_cache
def bridged_model_class(base: Any) -> Any:
    """The model of a MODEL, a subclass of ComfyUI's BaseModel: what its samplers ask of a model is as they know it."""

    class BridgedModel(base):
        def __init__(self, model_config: Any, loaded: LoadedDiT) -> None:
            super().__init__(model_config, model_type=comfy_module("comfy.model_base").ModelType.FLUX)
            self.diffusion_model = BridgedDiT(loaded)

        def extra_conds(self, **options: Any) -> dict[str, Any]:
            conds = comfy_module("comfy.conds")
            loaded = self.diffusion_model.loaded
            read = read_options(options, loaded.variant)
            found = {"c_crossattn": conds.CONDRegular(read["text"])}
            if read["guidance"] is not None:
                # A plain number, since tensors are cast to the DiT's type on the way.
                found["guidance"] = conds.CONDConstant(float(read["guidance"]))
            if read["references"]:
                found["ref_latents"] = conds.CONDList(read["references"])
            return found

        def extra_conds_shapes(self, **options: Any) -> dict[str, list[int]]:
            references = options.get("reference_latents") or ()
            positions = sum(prod(latents.shape[2:]) for latents in references)
            return {"ref_latents": [1, loaded_channels(self), positions]} if references else {}

        def memory_required(
            self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] | None = None, **_: object
        ) -> int:
            loaded, shapes = self.diffusion_model.loaded, cond_shapes or {}
            references = max((prod(shape[2:]) for shape in shapes.get("ref_latents", ())), default=0)
            text = max((shape[1] for shape in shapes.get("c_crossattn", ())), default=0)
            text = max(text, loaded.variant.text_encoder.max_tokens)
            num_tokens = prod(input_shape[2:]) + references
            mode = loaded.variant.reference_cache
            return patchers.step_bytes(loaded, input_shape[0], num_tokens, text, references, mode)

        def state_dict_for_saving(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
            raise ValueError("a MODEL from FLUX.2 to MODEL has no weights to save; use FLUX.2 Save Merged DiT")

    return BridgedModel


def loaded_channels(model: Any) -> int:
    """Channels of the latents of a bridged model."""
    return model.diffusion_model.loaded.variant.dit.in_channels


@lru_cache
def bridged_patcher_class(base: Any) -> Any:
    """The MODEL itself, a subclass of ComfyUI's ModelPatcher that patches no weights."""

    class BridgedPatcher(base):
        def model_patches_models(self) -> list[Any]:
            # Whatever loads this MODEL loads the DiT behind it.
            dit = patchers.patcher_of(self.model.diffusion_model.loaded.dit)
            return [*super().model_patches_models(), *([] if dit is None else [dit])]

        def add_patches(self, patches: Mapping[Any, Any], *args: object, **kwargs: object) -> list[str]:
            raise ValueError(
                "a native node (a LoRA loader or a model merge) patches weights of this MODEL, which comes from "
                f"FLUX.2 to MODEL and has none of its own. {USE_APPLY_LORA}"
            )

        def add_hook_patches(self, *args: object, **kwargs: object) -> list[str]:
            return self.add_patches({})

        def get_key_patches(self, *args: object, **kwargs: object) -> dict[str, Any]:
            raise ValueError(
                "a native node merges or saves weights of this MODEL, which comes from FLUX.2 to MODEL and has none "
                f"of its own. {USE_APPLY_LORA} FLUX.2 Save Merged DiT saves the result."
            )

        def add_object_patch(self, name: str, obj: object) -> None:
            if name.split(".")[0] == "diffusion_model":
                raise ValueError(
                    f"a native node replaces {name} of this MODEL, which comes from FLUX.2 to MODEL; remove that node, "
                    "or load the model with a native loader"
                )
            if name == "manual_cast_dtype":
                raise ValueError(
                    "the precision of this MODEL, which comes from FLUX.2 to MODEL, is that of Load FLUX.2 DiT; choose "
                    "it there, and remove the node that sets a compute dtype"
                )
            super().add_object_patch(name, obj)

        def cleanup(self) -> None:
            self.model.diffusion_model.forget_loras()
            super().cleanup()

    return BridgedPatcher
