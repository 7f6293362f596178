"""Loads networks as a plan of `memory` says, lets them take turns on the device, and lowers their share where the plan
was too hopeful."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .acceleration import Acceleration, accelerate
from .autoencoder import Flux2Autoencoder
from .autoencoder_memory import Tiling
from .checkpoint import DiTReader, is_quantised_layer, load_autoencoder, load_dit
from .command_errors import is_out_of_memory
from .device_memory import GIB, available_host_bytes, device_budget, has_bf16
from .dit import Flux2DiT
from .fp8 import E4M3
from .lora import LoraSetting, apply_loras
from .memory import (
    AutoencoderPrecision,
    FileFacts,
    MemoryNeeds,
    MemoryPlan,
    MemoryRequest,
    NetworkPlan,
    PlainPrecision,
    PlanPrecision,
    WeightPrecision,
    describe,
    plan_memory,
    weight_format,
)
from .model_files import ModelFiles
from .pipeline import Flux2Pipeline, SamplingConfig, encode_fitted, fit_references
from .reference_cache import reference_caches
from .reference_store import ReferenceStore
from .residency import Residence
from .sampling import StepCallback
from .state_dict import COMFYUI_DIT_PREFIX
from .streaming import BlockStreamer, stream_dit, stream_text_encoder
from .tensor_source import TensorSource
from .text_encoder import TextEncoder, load_text_encoder
from .variants import VARIANTS, TextEncoderConfig, Variant

logger = logging.getLogger(__name__)

NAMES: dict[torch.dtype | None, PlainPrecision] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
DTYPES: dict[WeightPrecision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
NUM_RETRIES = 2
"""How often less is tried after the device ran out of memory."""

Component = Literal["dit", "text_encoder", "autoencoder"]
Result = TypeVar("Result")


class PlacedDiT:
    """A DiT that is where its plan says.

    Args:
        device: where it runs.
        streamer: of its blocks, where not all are resident.
        limit: at most so many blocks are ever resident; None: all.
    """

    def __init__(
        self,
        *,
        dit: Flux2DiT,
        device: torch.device,
        streamer: BlockStreamer | None = None,
        limit: int | None = None,
    ) -> None:
        self.dit = dit
        self.device = device
        self.residence = Residence(dit, device, streamer=streamer, limit=limit)

    @property
    def streamer(self) -> BlockStreamer | None:
        """None while all blocks are resident, and were from the beginning."""
        return self.residence.streamer

    def lower(self) -> bool:
        """Leaves half as many blocks on the device as before, and says so; False where none is left to leave it."""
        before, num_blocks = self.residence.num_resident, self.residence.num_blocks
        if before == 0:
            return False
        self.residence.set_limit(before // 2)
        release(self.device)
        logger.warning(
            "the device ran out of memory: from now on %d of %d blocks stay on it, not %d; the others are streamed",
            before // 2,
            num_blocks,
            before,
        )
        return True

    def run(self, work: Callable[[], Result]) -> Result:
        """Does some work with the DiT, with fewer of its blocks on the device where that runs out of memory."""
        return retry(work, iter(self.lower, False), self.device) if self.device.type != "cpu" else work()


def retry(work: Callable[[], Result], lower: Iterator[bool], device: torch.device) -> Result:
    """Does some work, up to twice more after it ran out of memory, each time after one more step of ``lower``."""
    for _ in range(NUM_RETRIES):
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, where the error no longer holds the tensors of what failed.
        release(device)
        if not next(lower, False):
            break
    return work()


def release(device: torch.device) -> None:
    """Gives freed memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def dit_facts(path: Path, variant: Variant) -> FileFacts:
    """What a DiT's file holds, by its header."""
    reader = DiTReader(path, variant.name)
    blocks = [name for name in reader.names if is_quantised_layer(name) and len(reader.shapes[name]) > 1]
    plain = NAMES.get(reader.dtype, "fp32")
    is_fp8 = sum(reader.has_fp8(name) for name in blocks) * 2 > len(blocks)
    runs_as = E4M3 if is_fp8 else reader.dtype
    table = reader.source.table
    prefix = COMFYUI_DIT_PREFIX if f"{COMFYUI_DIT_PREFIX}{blocks[0]}" in table else ""
    as_it_runs = all(prefix + name in table and reader.source.dtype(prefix + name) == runs_as for name in blocks)
    return FileFacts(precision="fp8" if is_fp8 else plain, plain=plain, can_stream=as_it_runs)


def text_encoder_facts(path: Path) -> FileFacts:
    """What a text encoder's file holds, by its header."""
    source = TensorSource(path, component="text_encoder")
    name = next((name for name in source.names if name.endswith("layers.0.self_attn.q_proj.weight")), None)
    stored = source.dtype(name) if name is not None else None
    plain = NAMES.get(stored, "bf16")
    return FileFacts(precision=plain if stored in NAMES else "fp8", plain=plain, can_stream=stored in NAMES)


def text_encoder_variant(path: Path) -> Variant | None:
    """A variant whose text encoder has the width of this one, by the header of the file."""
    source = TensorSource(path, component="text_encoder")
    name = next((name for name in source.names if name.endswith("embed_tokens.weight")), None)
    width = source.table[name].shape[-1] if name is not None else None
    return next((variant for variant in VARIANTS.values() if variant.text_encoder.hidden_size == width), None)


def autoencoder_precision(path: Path, device: torch.device, asked: AutoencoderPrecision = "auto") -> PlainPrecision:
    """How an autoencoder's weights are kept and computed with.

    Files are often fp32. On a GPU with bf16 "auto" takes that, as diffusers' pipelines and ComfyUI do: half the memory,
    and three quarters of the time of a picture of 1024x1024 (measured on an H200). Elsewhere it is the file's own.
    """
    if asked != "auto":
        return asked
    source = TensorSource(path, component="autoencoder")
    name = next((name for name in source.names if name.endswith("decoder.conv_in.weight")), None)
    stored = NAMES.get(source.dtype(name), "bf16") if name is not None else "bf16"
    return "bf16" if stored == "fp32" and has_bf16(device) else stored


def place_autoencoder(path: Path, device: torch.device, asked: AutoencoderPrecision = "auto") -> Flux2Autoencoder:
    """Loads an autoencoder in its `autoencoder_precision`."""
    return load_autoencoder(path, dtype=DTYPES[autoencoder_precision(path, device, asked)], device=device)


def place_dit(
    path: Path, variant: Variant, plan: NetworkPlan, device: torch.device, *, facts: FileFacts | None = None
) -> PlacedDiT:
    """Loads a DiT to where a plan says.

    Args:
        facts: of the file, where they are known.

    Raises:
        ValueError: as `load_dit`; the file does not hold the weights as they run, where they are to stream from it.
    """
    settings = _load_settings(plan, facts or dit_facts(path, variant))
    first = torch.device("cpu") if plan.is_streamed else device
    dit, _ = load_dit(path, variant.name, device=first, **settings)
    streamer = None
    if plan.is_streamed:
        streamer = stream_dit(
            dit,
            device,
            num_resident=plan.num_resident,
            ring_size=plan.ring_size,
            file=path if plan.from_disk else None,
        )
    return PlacedDiT(dit=dit, device=device, streamer=streamer)


def place_text_encoder(
    path: Path,
    config: TextEncoderConfig,
    plan: NetworkPlan,
    device: torch.device,
    *,
    facts: FileFacts | None = None,
    tokenizer: Path | None = None,
    last_tokenizer_directories: Sequence[Path] = (),
) -> tuple[TextEncoder, BlockStreamer | None]:
    """Loads a text encoder to where a plan says; as `place_dit`."""
    encoder = load_text_encoder(
        path,
        config,
        tokenizer=tokenizer,
        device="cpu" if plan.is_streamed else device,
        last_tokenizer_directories=last_tokenizer_directories,
        **_load_settings(plan, facts or text_encoder_facts(path)),
    )
    if not plan.is_streamed:
        return encoder, None
    return encoder, stream_text_encoder(
        encoder,
        device,
        num_resident=plan.num_resident,
        ring_size=plan.ring_size,
        file=path if plan.from_disk else None,
    )


def _load_settings(plan: NetworkPlan, facts: FileFacts) -> dict[str, Any]:
    """What loads the precision of a plan."""
    quantised = weight_format(plan.precision)
    if quantised is not None:
        return {"precision": quantised, "dtype": DTYPES[facts.plain]}
    return {"dtype": DTYPES[plan.precision]}


def place_pipeline(
    files: ModelFiles,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device,
    precision: PlanPrecision = "auto",
    text_encoder_precision: PlanPrecision = "auto",
    autoencoder_dtype: AutoencoderPrecision = "auto",
    vram_budget_gib: float | None = None,
    needs: MemoryNeeds | None = None,
    loras: Sequence[LoraSetting] = (),
    acceleration: Acceleration | None = None,
) -> Flux2Pipeline:
    """Loads a pipeline by a plan, which it logs; arguments and errors are those of `pipeline.load_pipeline`."""
    request = MemoryRequest(
        variant=files.variant,
        precision=precision_of(precision, dtype),
        text_encoder_precision=precision_of(text_encoder_precision, dtype),
        dit_file=dit_facts(files.dit, files.variant),
        text_encoder_file=text_encoder_facts(files.text_encoder),
        autoencoder_precision=autoencoder_precision(files.autoencoder, device, autoencoder_dtype),
        needs=needs or MemoryNeeds(),
        lora_bytes=lora_bytes(loras),
        device_type=device.type,
    )
    plan = plan_memory(request, device_budget(device, vram_budget_gib), available_host_bytes())
    log_plan(plan, request, device, vram_budget_gib)
    pipeline = PlacedPipeline(
        files, request, plan, device, tokenizer=tokenizer, loras=loras, acceleration=acceleration or Acceleration()
    )
    if not plan.takes_turns:
        pipeline.load_all()
    return pipeline


def lora_bytes(loras: Sequence[LoraSetting]) -> int:
    """What the factors of LoRAs take as they run, in 16 bits."""
    parts = (part for setting in loras for parts in setting.lora.layers.values() for part in parts)
    return 2 * sum(tensor.numel() for part in parts for tensor in part.tensors().values())


def precision_of(precision: PlanPrecision, dtype: torch.dtype | None) -> PlanPrecision:
    """The precision that both options ask for.

    Raises:
        ValueError: they contradict each other.
    """
    if dtype is None:
        return precision
    if precision == "auto":
        return NAMES[dtype]
    if precision != NAMES[dtype]:
        raise ValueError(
            f"the precision {precision} and the type {NAMES[dtype]} contradict each other; leave one of them out"
        )
    return precision


def log_plan(plan: MemoryPlan, request: MemoryRequest, device: torch.device, vram_budget_gib: float | None) -> None:
    """Says how a network will run, where there was something to decide."""
    if device.type != "cuda" and vram_budget_gib is None and request.precision == "auto":
        return
    logger.info("%s: %s", request.variant.name, describe(plan))
    if plan.dit.from_disk or (plan.text_encoder is not None and plan.text_encoder.from_disk):
        free = available_host_bytes()
        logger.warning(
            "host memory (%s GiB free) cannot hold the weights: they are read from disk in every step, which is slow",
            "?" if free is None else f"{free / GIB:.1f}",
        )


class PlacedPipeline(Flux2Pipeline):
    """A pipeline whose networks are loaded when they are first needed and leave the device for each other.

    A network that leaves goes to host memory where that has room for it, and is loaded again otherwise.
    """

    def __init__(
        self,
        files: ModelFiles,
        request: MemoryRequest,
        plan: MemoryPlan,
        device: torch.device,
        *,
        tokenizer: Path | None = None,
        loras: Sequence[LoraSetting] = (),
        acceleration: Acceleration,
    ) -> None:
        self.variant = files.variant
        self.files, self.request, self.plan, self.device = files, request, plan, device
        self.lowers = device.type != "cpu"
        """Whether running out of memory is answered by leaving less on the device: without one that frees nothing."""
        self._tokenizer, self._loras, self._acceleration = tokenizer, tuple(loras), acceleration
        self._takes_turns, self._dit_stays = plan.takes_turns, plan.dit_stays
        self._tiling: Tiling = plan.tiling
        # Not by network: one that was freed for another is loaded again from the same file.
        self._known_references = ReferenceStore()
        self._networks: dict[Component, Any] = {}
        self._away: set[Component] = set()
        self._dit: PlacedDiT | None = None
        self._text_streamer: BlockStreamer | None = None

    @property
    def dit(self) -> Flux2DiT:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Loaded when it is first asked for; on the device only while it has its turn."""
        return self._network("dit")

    @property
    def text_encoder(self) -> TextEncoder:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `dit`."""
        return self._network("text_encoder")

    @property
    def autoencoder(self) -> Flux2Autoencoder:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `dit`."""
        return self._network("autoencoder")

    def load_all(self) -> None:
        """Loads all networks, small to large, so that a file of another kind is told early."""
        order: tuple[Component, ...] = ("autoencoder", "text_encoder", "dit")
        for name in order:
            self._network(name)

    def encode_prompt(self, prompt: str) -> Tensor:
        def work() -> Tensor:
            self._use("text_encoder")
            return Flux2Pipeline.encode_prompt(self, prompt)

        return self._retry(work, self._lower_text_encoder())

    def encode_references(
        self,
        references: Sequence[Image.Image],
        *,
        resize: bool = True,
        tiled: bool = False,
        store: torch.device | None = None,
    ) -> list[Tensor]:
        fitted = fit_references(references, self.variant.autoencoder, resize=resize)
        known = self._known_references.get_all(fitted, tiled=self._strips(tiled, store)[0])
        if known is not None:
            return known  # the autoencoder need not even be there

        def work() -> list[Tensor]:
            self._use("autoencoder")
            is_tiled, where = self._strips(tiled, store)
            known = self.known_references()
            return encode_fitted(self.autoencoder, fitted, tiled=is_tiled, store=where, known=known)

        return self._retry(work, self._lower_autoencoder())

    def known_references(self) -> ReferenceStore:
        return self._known_references

    def sample(
        self,
        sampling: SamplingConfig,
        text: Tensor,
        *,
        negative_text: Tensor | None = None,
        references: Sequence[Tensor] = (),
        initial: Tensor | None = None,
        mask: Tensor | None = None,
        on_step: StepCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Tensor:
        def work() -> Tensor:
            self._use("dit")
            return Flux2Pipeline.sample(
                self,
                sampling,
                text,
                negative_text=negative_text,
                references=references,
                initial=initial,
                mask=mask,
                on_step=on_step,
                should_stop=should_stop,
            )

        return self._retry(work, self._lower_dit())

    def decode(self, latents: Tensor, *, tiled: bool = False, store: torch.device | None = None) -> list[Image.Image]:
        def work() -> list[Image.Image]:
            self._use("autoencoder")
            is_tiled, where = self._strips(tiled, store)
            return Flux2Pipeline.decode(self, latents, tiled=is_tiled, store=where)

        return self._retry(work, self._lower_autoencoder())

    def _strips(self, tiled: bool, store: torch.device | None) -> tuple[bool, torch.device | None]:
        """Whether pictures run in strips, and where these are kept."""
        store = torch.device("cpu") if store is None and self._tiling == "host" else store
        return tiled or store is not None or self._tiling != "whole", store

    def _network(self, name: Component) -> Any:
        if name not in self._networks:
            loads = {"dit": self._load_dit, "text_encoder": self._load_text_encoder, "autoencoder": self._load_ae}
            self._networks[name] = loads[name]()
        return self._networks[name]

    def _load_dit(self) -> Flux2DiT:
        self._dit = place_dit(self.files.dit, self.variant, self.plan.dit, self.device, facts=self.request.dit_file)
        apply_loras(self._dit.dit, self._loras)
        accelerate(self._dit.dit, self._acceleration)
        reference_caches(self._dit.dit).place = self.plan.reference_cache
        return self._dit.dit

    def _load_text_encoder(self) -> TextEncoder:
        assert self.plan.text_encoder is not None, "planned for pictures"
        encoder, self._text_streamer = place_text_encoder(
            self.files.text_encoder,
            self.variant.text_encoder,
            self.plan.text_encoder,
            self.device,
            facts=self.request.text_encoder_file,
            tokenizer=self._tokenizer,
        )
        return encoder

    def _load_ae(self) -> Flux2Autoencoder:
        return place_autoencoder(self.files.autoencoder, self.device, self.request.autoencoder_precision)

    def _use(self, name: Component) -> None:
        """Brings a network onto the device, after the others have left where they have to."""
        others: list[Component] = [other for other in self._networks if other != name and self._takes_turns]
        if "dit" in others:
            reference_caches(self.dit).leave_device()
        for other in others:
            if other == "dit" and self._dit_stays:
                if self._dit is not None and self._dit.streamer is not None:
                    self._dit.streamer.unload()
            elif other == "text_encoder" and self._text_streamer is not None and not self._text_streamer.num_resident:
                self._text_streamer.unload()  # nothing else of it is on the device
            elif other not in self._away:
                self._leave(other)
        network = self._network(name)
        if name in self._away:
            network.to(self.device)
            self._away.discard(name)

    def _leave(self, name: Component) -> None:
        network = self._networks[name]
        module: Any = network.model if isinstance(network, TextEncoder) else network
        tensors = (*module.parameters(), *module.buffers())
        num_bytes = sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")
        free = available_host_bytes()
        if free is None or num_bytes <= free:
            module.to("cpu")
            self._away.add(name)
        else:
            self._forget(name)
        release(self.device)

    def _forget(self, name: Component) -> None:
        """Frees a network; it is loaded again when it is used again."""
        logger.info("%s leaves memory, since host memory is short, and is loaded again when it is needed", name)
        streamer = self._text_streamer if name == "text_encoder" else None
        if name == "dit" and self._dit is not None:
            streamer, self._dit = self._dit.streamer, None
        if name == "text_encoder":
            self._text_streamer = None
        if streamer is not None:
            streamer.close()
        del self._networks[name]

    def _retry(self, work: Callable[[], Result], lower: Iterator[bool]) -> Result:
        return retry(work, lower, self.device) if self.lowers else work()

    def _others_leave(self) -> bool:
        """Networks take turns from now on, if they did not already."""
        if self._takes_turns:
            return False
        self._takes_turns = True
        logger.warning("the device ran out of memory: from now on networks leave it for each other")
        return True

    def _lower_dit(self) -> Iterator[bool]:
        if self._others_leave():
            yield True
        caches = reference_caches(self.dit)
        if caches.place == "device":
            caches.clear()
            caches.place = "host"
            logger.warning("the device ran out of memory: from now on references are cached in host memory")
            yield True
        while self._dit is not None and self._dit.lower():
            yield True

    def _lower_text_encoder(self) -> Iterator[bool]:
        if self._others_leave():
            yield True
        if self._text_streamer is None:
            self._text_streamer = stream_text_encoder(self.text_encoder, self.device, num_resident=0)
        elif self._text_streamer.num_resident:
            self._text_streamer.set_num_resident(0)
        else:
            return
        logger.warning("the device ran out of memory: from now on all layers of the text encoder are streamed")
        yield True

    def _lower_autoencoder(self) -> Iterator[bool]:
        if self._tiling == "whole":
            self._tiling = "strips"
            logger.warning("the device ran out of memory: from now on pictures are encoded and decoded in strips")
            yield True
        if self._tiling == "strips" or self._dit_stays:
            self._tiling, self._takes_turns, self._dit_stays = "host", True, False
            logger.warning(
                "the device ran out of memory: from now on the autoencoder has it for itself, and keeps strips in host "
                "memory"
            )
            yield True
