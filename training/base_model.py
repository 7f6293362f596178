"""The frozen base of a training: planned within the device's memory, and loaded as the plan says."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ..flux2_core.device_memory import available_host_bytes, device_budget
from ..flux2_core.lora import LoraSetting, apply_loras
from ..flux2_core.lora_files import read_lora
from ..flux2_core.memory import MemoryNeeds, MemoryPlan, MemoryRequest, plan_memory
from ..flux2_core.placement import (
    NAMES,
    PlacedDiT,
    autoencoder_precision,
    dit_facts,
    log_plan,
    lora_bytes,
    place_dit,
    place_text_encoder,
    precision_of,
    text_encoder_facts,
)
from ..flux2_core.text_encoder import TextEncoder
from .adapters import AdapterConfig
from .cache import CachedDataset
from .config import BasePrecision, TrainConfig
from .loader import largest_batch
from .train_files import TrainFiles

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By the names of settings."""
ADAM_BYTES, ADAM_8BIT_BYTES, EMA_BYTES = 8, 2, 4
"""State of an optimiser for each parameter. Those of which nothing is known count as Adam."""
PIXELS_PER_LATENT = 16


class BaseModel:
    """A plan for a run, and the networks that it places.

    Args:
        precision: of a run that goes on, which "auto" stands for then.

    Raises:
        ValueError: it does not fit, or settings contradict each other.
    """

    def __init__(
        self,
        config: TrainConfig,
        adapter: AdapterConfig,
        dataset: CachedDataset,
        files: TrainFiles,
        device: torch.device,
        precision: BasePrecision | None = None,
    ) -> None:
        self.files, self.device = files, device
        strengths = config.base_weights_multiplier or (1.0,) * len(config.base_weights)
        self.loras = [
            LoraSetting(lora=read_lora(path, files.variant.dit), strength=strength)
            for path, strength in zip(config.base_weights, strengths, strict=True)
        ]
        """That the new LoRA is trained on top of."""
        request = _request(config, adapter, dataset, files, device, precision)
        self.request = replace(request, lora_bytes=lora_bytes(self.loras))
        self.plan: MemoryPlan = plan_memory(
            self.request, device_budget(device, config.vram_budget_gib), available_host_bytes()
        )
        log_plan(self.plan, self.request, device, config.vram_budget_gib)

    @property
    def takes_turns(self) -> bool:
        """Whether the autoencoder is on the device only while it works."""
        return self.plan.takes_turns

    def load_text_encoder(self) -> TextEncoder:
        """For the prompts of sample pictures."""
        assert self.plan.text_encoder is not None and self.files.text_encoder is not None
        encoder, _ = place_text_encoder(
            self.files.text_encoder,
            self.files.variant.text_encoder,
            self.plan.text_encoder,
            self.device,
            facts=self.request.text_encoder_file,
            tokenizer=self.files.tokenizer,
        )
        return encoder

    def load_dit(self) -> PlacedDiT:
        """Frozen, with the checkpointing of the plan and the LoRAs that it is trained with."""
        placed = place_dit(self.files.dit, self.files.variant, self.plan.dit, self.device, facts=self.request.dit_file)
        placed.dit.requires_grad_(False)
        assert self.plan.checkpointing is not None
        placed.dit.checkpointing = self.plan.checkpointing
        apply_loras(placed.dit, self.loras)
        return placed


def _request(
    config: TrainConfig,
    adapter: AdapterConfig,
    dataset: CachedDataset,
    files: TrainFiles,
    device: torch.device,
    precision: BasePrecision | None,
) -> MemoryRequest:
    dtype = DTYPES[config.mixed_precision] if config.mixed_precision is not None else None
    asked = precision if precision is not None and config.base_precision == "auto" else config.base_precision
    facts = dit_facts(files.dit, files.variant)
    if dtype is not None:
        if asked not in ("auto", "fp8", "nf4"):
            precision_of(asked, dtype)
        kept = facts.precision == "fp8" or facts.plain == NAMES[dtype]
        facts = replace(
            facts,
            plain=NAMES[dtype],
            precision=facts.precision if facts.precision == "fp8" else NAMES[dtype],
            can_stream=facts.can_stream and kept,
        )
    draws = largest_batch(dataset)
    item = dataset.items[draws[0].item]
    height, width = (side * PIXELS_PER_LATENT for side in item.latents_size)
    uses_samples = config.monitor.sample_prompts is not None
    request = MemoryRequest(
        variant=files.variant,
        precision=asked,
        text_encoder_precision=config.text_encoder_precision,
        dit_file=facts,
        needs=MemoryNeeds(
            width=width,
            height=height,
            reference_sizes=tuple((PIXELS_PER_LATENT * w, PIXELS_PER_LATENT * h) for h, w in item.reference_sizes),
            num_images=len(draws),
            num_streamed=config.num_streamed_blocks,
        ),
        rank=adapter.rank,
        checkpointing=config.checkpointing,
        optimizer_bytes=_optimizer_bytes(config),
        uses_text_encoder=uses_samples,
        uses_autoencoder=uses_samples,
        device_type=device.type,
    )
    if not uses_samples:
        return request
    assert files.text_encoder is not None and files.autoencoder is not None
    return replace(
        request,
        text_encoder_file=text_encoder_facts(files.text_encoder),
        autoencoder_precision=autoencoder_precision(files.autoencoder, device, config.autoencoder_precision),
    )


def _optimizer_bytes(config: TrainConfig) -> int:
    is_8bit = "8bit" in config.optimizer.optimizer_type.lower()
    return (ADAM_8BIT_BYTES if is_8bit else ADAM_BYTES) + (EMA_BYTES if config.ema_decay is not None else 0)
