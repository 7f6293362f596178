"""Stand-ins of native nodes: what their inputs and outputs are, and where it is short, what they do.

Inputs and defaults are those that ComfyUI 0.3.75 tells under ``/object_info``; lists of choices are cut short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SEED = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}
CFG = {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1}
SAMPLERS, SCHEDULERS = ["euler", "heun", "dpmpp_2m"], ["simple", "normal", "beta"]


class LoadImage:
    """Gives what a test put into `pictures`."""

    pictures: Mapping[str, torch.Tensor] = {}
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"image": (sorted(cls.pictures), {"image_upload": True})}}

    def load(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        picture = self.pictures[image]
        return picture, torch.zeros(picture.shape[:3])


class PreviewImage:
    """Shows pictures; as UI output they stay readable for a test."""

    FUNCTION = "show"
    RETURN_TYPES = ()
    RETURN_NAMES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"images": ("IMAGE", {})}, "hidden": {"prompt": "PROMPT"}}

    def show(self, images: torch.Tensor, prompt: object = None) -> dict[str, Any]:
        return {"ui": {"images": images}}


class SaveImage(PreviewImage):
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        prefix = ("STRING", {"default": "ComfyUI"})
        return {"required": {"images": ("IMAGE", {}), "filename_prefix": prefix}, "hidden": {"prompt": "PROMPT"}}

    def show(self, images: torch.Tensor, filename_prefix: str = "", prompt: object = None) -> dict[str, Any]:
        return {"ui": {"images": images}}


class CLIPTextEncode:
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"text": ("STRING", {"multiline": True, "default": ""}), "clip": ("CLIP", {})}}

    def encode(self, text: str, clip: Any) -> tuple[Any]:
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)


class SolidMask:
    FUNCTION = "solid"
    RETURN_TYPES = ("MASK",)
    RETURN_NAMES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        side = ("INT", {"default": 512, "min": 1, "max": 16384, "step": 1})
        value = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})
        return {"required": {"value": value, "width": side, "height": side}}

    def solid(self, value: float, width: int, height: int) -> tuple[torch.Tensor]:
        return (torch.full((1, height, width), value),)


class MaskComposite:
    FUNCTION = "combine"
    RETURN_TYPES = ("MASK",)
    RETURN_NAMES = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        place = ("INT", {"default": 0, "min": 0, "max": 16384, "step": 1})
        masks = {"destination": ("MASK", {}), "source": ("MASK", {})}
        return {"required": {**masks, "x": place, "y": place, "operation": (["multiply", "add", "subtract"], {})}}

    def combine(
        self, destination: torch.Tensor, source: torch.Tensor, x: int, y: int, operation: str
    ) -> tuple[torch.Tensor]:
        assert operation == "add"
        output = destination.clone()
        output[:, y : y + source.shape[1], x : x + source.shape[2]] += source
        return (output.clamp(0, 1),)


class VAEEncode:
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"pixels": ("IMAGE", {}), "vae": ("VAE", {})}}

    def encode(self, pixels: torch.Tensor, vae: Any) -> tuple[Any]:
        return ({"samples": vae.encode(pixels[:, :, :, :3])},)


class VAEDecode:
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"samples": ("LATENT", {}), "vae": ("VAE", {})}}

    def decode(self, samples: Any, vae: Any) -> tuple[Any]:
        return (vae.decode(samples["samples"]),)


class _OnlyDescribed:
    """It takes ComfyUI to run this node."""

    FUNCTION = "run"


class KSampler(_OnlyDescribed):
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": ("MODEL", {}),
                "seed": ("INT", SEED),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
                "cfg": ("FLOAT", CFG),
                "sampler_name": (SAMPLERS, {}),
                "scheduler": (SCHEDULERS, {}),
                "positive": ("CONDITIONING", {}),
                "negative": ("CONDITIONING", {}),
                "latent_image": ("LATENT", {}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }


class RandomNoise(_OnlyDescribed):
    RETURN_TYPES = ("NOISE",)
    RETURN_NAMES = ("NOISE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"noise_seed": ("INT", SEED)}}


class KSamplerSelect(_OnlyDescribed):
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"sampler_name": (SAMPLERS, {})}}


class CFGGuider(_OnlyDescribed):
    RETURN_TYPES = ("GUIDER",)
    RETURN_NAMES = ("GUIDER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": ("MODEL", {}),
                "positive": ("CONDITIONING", {}),
                "negative": ("CONDITIONING", {}),
                "cfg": ("FLOAT", CFG),
            }
        }


class SamplerCustomAdvanced(_OnlyDescribed):
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        kinds = {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS"}
        return {"required": {name: (kind, {}) for name, kind in (*kinds.items(), ("latent_image", "LATENT"))}}


NATIVE_NODES: dict[str, type] = {
    node.__name__: node
    for node in (
        *(LoadImage, PreviewImage, SaveImage, CLIPTextEncode, SolidMask, MaskComposite, VAEEncode, VAEDecode),
        *(KSampler, RandomNoise, KSamplerSelect, CFGGuider, SamplerCustomAdvanced),
    )
}
