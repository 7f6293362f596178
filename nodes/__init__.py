"""The ComfyUI nodes. An id stands in saved workflows: it is never renamed."""

from __future__ import annotations

from .bridges import Sigmas, ToCLIP, ToModel, ToVAE
from .conditioning import EncodePrompt, EncodeReference
from .datasets import CacheDataset
from .files import ConvertLoRA, InspectFile
from .latents import EmptyLatent, EncodeImage
from .loaders import LoadAutoencoder, LoadDiT, LoadTextEncoder
from .lora import ApplyLoRA, SaveMergedDiT
from .prompts import PromptJSON
from .sampling import Decode, Sample
from .training import TrainLoRA

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "Flux2KitLoadDiT": LoadDiT,
    "Flux2KitLoadAE": LoadAutoencoder,
    "Flux2KitLoadTextEncoder": LoadTextEncoder,
    "Flux2KitEncodePrompt": EncodePrompt,
    "Flux2KitEncodeReference": EncodeReference,
    "Flux2KitSample": Sample,
    "Flux2KitDecode": Decode,
    "Flux2KitApplyLoRA": ApplyLoRA,
    "Flux2KitSaveMergedDiT": SaveMergedDiT,
    "Flux2KitCacheDataset": CacheDataset,
    "Flux2KitTrainLoRA": TrainLoRA,
    "Flux2KitEmptyLatent": EmptyLatent,
    "Flux2KitPromptJSON": PromptJSON,
    "Flux2KitInspectFile": InspectFile,
    "Flux2KitConvertLoRA": ConvertLoRA,
    "Flux2KitToModel": ToModel,
    "Flux2KitToVAE": ToVAE,
    "Flux2KitToCLIP": ToCLIP,
    "Flux2KitSigmas": Sigmas,
    "Flux2KitEncodeImage": EncodeImage,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "Flux2KitLoadDiT": "Load FLUX.2 DiT",
    "Flux2KitLoadAE": "Load FLUX.2 AE",
    "Flux2KitLoadTextEncoder": "Load FLUX.2 Text Encoder",
    "Flux2KitEncodePrompt": "FLUX.2 Encode Prompt",
    "Flux2KitEncodeReference": "FLUX.2 Encode Reference",
    "Flux2KitSample": "FLUX.2 Sample",
    "Flux2KitDecode": "FLUX.2 Decode",
    "Flux2KitApplyLoRA": "FLUX.2 Apply LoRA",
    "Flux2KitSaveMergedDiT": "FLUX.2 Save Merged DiT",
    "Flux2KitCacheDataset": "FLUX.2 Cache Dataset",
    "Flux2KitTrainLoRA": "FLUX.2 Train LoRA",
    "Flux2KitEmptyLatent": "FLUX.2 Empty Latent",
    "Flux2KitPromptJSON": "FLUX.2 Prompt (JSON)",
    "Flux2KitInspectFile": "FLUX.2 Inspect File",
    "Flux2KitConvertLoRA": "FLUX.2 Convert LoRA",
    "Flux2KitToModel": "FLUX.2 to MODEL",
    "Flux2KitToVAE": "FLUX.2 to VAE",
    "Flux2KitToCLIP": "FLUX.2 to CLIP",
    "Flux2KitSigmas": "FLUX.2 Sigmas",
    "Flux2KitEncodeImage": "FLUX.2 Encode Image",
}
