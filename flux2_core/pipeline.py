"""From a prompt to pictures: the numbered steps that command line, nodes and previews share."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from PIL import Image
from torch import Tensor

from .autoencoder import PIXELS_PER_LATENT, AutoencoderConfig, Flux2Autoencoder
from .dit import Flux2DiT
from .images import (
    check_picture_side,
    fit_picture,
    fit_reference,
    image_to_tensor,
    initial_size,
    tensor_to_images,
)
from .latents import MAX_SEED, seed_noise
from .reference_cache import ReferenceCacheMode, reference_caches
from .reference_store import ReferenceStore, reference_store
from .sampling import StepCallback, denoise
from .schedule import check_strength, sigma_schedule
from .text_encoder import TextEncoder
from .variants import Variant, get_variant

if TYPE_CHECKING:
    from .acceleration import Acceleration
    from .lora import LoraSetting
    from .memory import AutoencoderPrecision, MemoryNeeds, PlanPrecision

logger = logging.getLogger(__name__)

MAX_REFERENCES = 10
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What decides a picture besides prompt and references. None stands for the variant's own default."""

    width: int | None = None
    """Pixels, a multiple of 16; None: `Variant.default_size`."""
    height: int | None = None
    """Pixels, a multiple of 16; None: `Variant.default_size`."""
    num_steps: int | None = None
    """Euler steps; None: `Variant.num_steps`."""
    cfg_scale: float | None = None
    """Classifier-free guidance; 1 switches it off; None: `Variant.cfg_scale`."""
    guidance: float | None = None
    """Embedded guidance (dev only); None: `Variant.guidance`."""
    flow_shift: float | None = None
    """Replaces the shift that follows from size and steps (exp of the empirical mu)."""
    seed: int = 0
    num_images: int = 1
    """Pictures from one seed: image i takes the i-th noise sample."""
    resize_references: bool = True
    """Scale large references down by the rule of the reference implementation; otherwise only crop them to 16."""
    tile_autoencoder: bool = False
    """Encode and decode in strips: the same picture in less memory."""
    reference_cache: ReferenceCacheMode = "auto"
    """Whether references are computed once for all steps: auto where the variant was trained for it (klein-9b-kv);
    approximate on others, which is faster and less exact."""
    strength: float = 1.0
    """How much of an initial picture is made anew: the last part of the schedule, see `schedule.sigma_schedule`."""

    def __post_init__(self) -> None:
        if self.num_steps is not None and not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"the number of steps is {self.num_steps}; it must lie in 1..{MAX_STEPS}")
        for name, value in (("cfg_scale", self.cfg_scale), ("guidance", self.guidance)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a finite number, 0 or more")
        if self.flow_shift is not None and not (math.isfinite(self.flow_shift) and self.flow_shift > 0):
            raise ValueError(f"flow_shift is {self.flow_shift}; it must be a finite number above 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"the seed is {self.seed}; it must lie in 0..{MAX_SEED}")
        if self.num_images < 1:
            raise ValueError(f"the number of images is {self.num_images}; it must be at least 1")
        check_strength(self.strength)
        if self.reference_cache not in get_args(ReferenceCacheMode):
            modes = ", ".join(get_args(ReferenceCacheMode))
            raise ValueError(f"reference_cache is {self.reference_cache!r}; allowed are {modes}")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                check_picture_side(name, side)

    def resolved(self, variant: Variant) -> SamplingConfig:
        """The same with every None and auto replaced by the variant's default.

        Raises:
            ValueError: an explicit setting that this variant has no input for.
        """
        if self.guidance is not None and variant.guidance is None:
            raise ValueError(
                f"guidance is {self.guidance}, but {variant.name} has no guidance embedder; "
                "use cfg_scale, or leave it out"
            )
        modes = ("auto", "off", "exact" if variant.reference_cache == "exact" else "approximate")
        if self.reference_cache not in modes:
            raise ValueError(
                f"reference_cache is {self.reference_cache}, which {variant.name} does not do; it does "
                f"{', '.join(modes)}"
            )
        return replace(
            self,
            width=self.width or variant.default_size,
            height=self.height or variant.default_size,
            num_steps=self.num_steps or variant.num_steps,
            cfg_scale=variant.cfg_scale if self.cfg_scale is None else self.cfg_scale,
            guidance=variant.guidance if self.guidance is None else self.guidance,
            reference_cache=variant.reference_cache if self.reference_cache == "auto" else self.reference_cache,
        )

    def sized_like(self, size: tuple[int, int], variant: Variant) -> SamplingConfig:
        """The same with each side that is open taken from a picture to start from.

        Args:
            size: of the picture (width, height); a larger one than the variant's default counts scaled down to it.
        """
        width, height = initial_size(*size, variant.default_size**2)
        return replace(self, width=self.width or width, height=self.height or height)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One call of `Flux2Pipeline.generate`."""

    prompt: str
    negative_prompt: str = ""
    references: tuple[Image.Image, ...] = ()
    """Pictures of any size and mode; prompts call them image 1, image 2, ..."""
    initial_image: Image.Image | None = None
    """What to start from, as far as `SamplingConfig.strength` leaves it; a size that is open follows it."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `Flux2Pipeline.generate` returns."""

    images: list[Image.Image]
    latents: Tensor
    """``[B, 128, H/16, W/16]``, fp32."""
    sampling: SamplingConfig
    """The settings that were used, without None but for inputs the variant lacks."""


@dataclass(kw_only=True)
class Flux2Pipeline:
    """The three networks of one variant. Every step can be called alone; `generate` runs them all."""

    variant: Variant
    dit: Flux2DiT
    autoencoder: Flux2Autoencoder
    text_encoder: TextEncoder

    def generate(
        self,
        request: GenerateRequest,
        *,
        on_step: StepCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Generation:
        """Makes pictures from a prompt and up to ten references.

        Raises:
            ValueError: a request that this variant cannot carry out.
            Stopped: `should_stop` answered True.
        """
        # 1. Settings: the variant fills what was left open, an initial picture the size.
        sampling = request.sampling
        if request.initial_image is not None:
            sampling = sampling.sized_like(request.initial_image.size, self.variant)
        sampling = sampling.resolved(self.variant)
        assert sampling.width and sampling.height and sampling.num_steps and sampling.cfg_scale is not None

        # 2. Prompt and negative prompt to text embeddings.
        text = self.encode_prompt(request.prompt)
        negative = self.encode_prompt(request.negative_prompt) if sampling.cfg_scale != 1 else None

        # 3. References and the initial picture to latents.
        references = self.encode_references(
            request.references, resize=sampling.resize_references, tiled=sampling.tile_autoencoder
        )
        initial = None
        if request.initial_image is not None:
            initial = self.encode_initial(request.initial_image, sampling)

        # 4. Noise to latents.
        latents = self.sample(
            sampling,
            text,
            negative_text=negative,
            references=references,
            initial=initial,
            on_step=on_step,
            should_stop=should_stop,
        )

        # 5. Latents to pictures.
        images = self.decode(latents, tiled=sampling.tile_autoencoder)
        return Generation(images=images, latents=latents, sampling=sampling)

    def encode_prompt(self, prompt: str) -> Tensor:
        """Text embedding ``[1, L, C]``; a prompt that was cut logs a warning with the number of tokens lost."""
        return encode_prompt(self.text_encoder, prompt)

    def encode_references(
        self,
        references: Sequence[Image.Image],
        *,
        resize: bool = True,
        tiled: bool = False,
        store: torch.device | None = None,
    ) -> list[Tensor]:
        """Latents ``[1, 128, h_i, w_i]`` of each reference; a picture that was encoded before is not encoded again."""
        return encode_references(
            self.autoencoder, references, resize=resize, tiled=tiled, store=store, known=self.known_references()
        )

    def encode_initial(self, image: Image.Image, sampling: SamplingConfig) -> Tensor:
        """Latents ``[1, 128, H/16, W/16]`` of a picture to start from, brought to the size of resolved settings."""
        assert sampling.width and sampling.height
        fitted = fit_picture(image, sampling.width, sampling.height)
        return self.encode_references([fitted], resize=False, tiled=sampling.tile_autoencoder)[0]

    def known_references(self) -> ReferenceStore:
        """Latents of the references so far."""
        return reference_store(self.autoencoder)

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
        """Latents ``[num_images, 128, H/16, W/16]`` from the noise of the seed, see `sample_latents`."""
        return sample_latents(
            self.dit,
            self.variant,
            sampling,
            text,
            negative_text=negative_text,
            references=references,
            initial=initial,
            mask=mask,
            on_step=on_step,
            should_stop=should_stop,
        )

    def decode(self, latents: Tensor, *, tiled: bool = False, store: torch.device | None = None) -> list[Image.Image]:
        """RGB pictures of latents ``[B, 128, h, w]``."""
        return decode_latents(self.autoencoder, latents, tiled=tiled, store=store)


def encode_prompt(text_encoder: TextEncoder, prompt: str) -> Tensor:
    """Text embedding ``[1, L, C]``; warns with the number of tokens lost where the prompt was too long."""
    encoding = text_encoder.encode([prompt])
    num_cut = encoding.num_cut[0]
    if num_cut:
        logger.warning(
            "the prompt is %d tokens longer than the %d that the model takes; its end was cut",
            num_cut,
            text_encoder.config.max_tokens,
        )
    return encoding.embeddings


def encode_references(
    autoencoder: Flux2Autoencoder,
    references: Sequence[Image.Image],
    *,
    resize: bool = True,
    tiled: bool = False,
    store: torch.device | None = None,
    known: ReferenceStore | None = None,
) -> list[Tensor]:
    """Pictures of any size and mode to latents ``[1, 128, h_i, w_i]``.

    Args:
        autoencoder: its config says to which area references are scaled down.
        references: at most ten.
        resize: False keeps their size but for the crop to multiples of 16.
        tiled, store, known: as in `encode_fitted`.
    """
    fitted = fit_references(references, autoencoder.config, resize=resize)
    return encode_fitted(autoencoder, fitted, tiled=tiled, store=store, known=known)


@torch.inference_mode()
def encode_fitted(
    autoencoder: Flux2Autoencoder,
    fitted: Sequence[Image.Image],
    *,
    tiled: bool = False,
    store: torch.device | None = None,
    known: ReferenceStore | None = None,
) -> list[Tensor]:
    """Pictures of `fit_references` to latents ``[1, 128, h_i, w_i]``.

    Args:
        tiled: encode in strips, which takes less memory.
        store: where they are kept between layers; None: where the weights are.
        known: latents of pictures of this autoencoder. What is found there is not encoded, what is not is added; all
            are in host memory then, otherwise where the weights are.
    """
    latents: list[Tensor] = []
    for picture in fitted:
        found = known.get(picture, tiled=tiled) if known is not None else None
        if found is None:
            image = image_to_tensor(picture)
            found = autoencoder.encode_tiled(image, store=store) if tiled else autoencoder.encode(image)
            found = known.put(picture, found, tiled=tiled) if known is not None else found
        latents.append(found)
    return latents


def fit_references(
    references: Sequence[Image.Image], config: AutoencoderConfig, *, resize: bool = True
) -> list[Image.Image]:
    """References as they are encoded: scaled down where there is need, and cropped.

    Raises:
        ValueError: there are too many, or one is too small or too long.
    """
    check_num_references(len(references))
    single, several = config.reference_sides
    max_pixels = (single if len(references) == 1 else several) ** 2 if resize else None
    return [fit_reference(image, max_pixels) for image in references]


def check_num_references(num_references: int) -> None:
    """Refuses more references than the model takes."""
    if num_references > MAX_REFERENCES:
        raise ValueError(f"{num_references} references were given; at most {MAX_REFERENCES} are allowed, give fewer")


@torch.inference_mode()
def decode_latents(
    autoencoder: Flux2Autoencoder, latents: Tensor, *, tiled: bool = False, store: torch.device | None = None
) -> list[Image.Image]:
    """Latents ``[B, 128, h, w]`` to RGB pictures, one at a time: memory does not grow with the batch.

    Args:
        tiled: decode in strips, which takes less memory.
        store: where they are kept between layers; None: where the weights are.
    """
    check_latents(latents, autoencoder.config.packed_channels, "the input of the decoder")
    images: list[Image.Image] = []
    for row in latents.split(1):
        picture = autoencoder.decode_tiled(row, store=store) if tiled else autoencoder.decode(row)
        images += tensor_to_images(picture)
    return images


def sample_latents(
    dit: Flux2DiT,
    variant: Variant,
    sampling: SamplingConfig,
    text: Tensor,
    *,
    negative_text: Tensor | None = None,
    references: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    initial: Tensor | None = None,
    mask: Tensor | None = None,
    on_step: StepCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Runs the denoise loop from the noise of the seed and returns latents ``[num_images, 128, H/16, W/16]``, fp32.

    Args:
        initial: latents of a picture to start from, one or one for each; required where the strength is below 1.
        mask: which part of it is made anew, ``[1 or num_images, 1, H/16, W/16]`` in 0..1, see `sampling.denoise`.
    """
    sampling = sampling.resolved(variant)
    assert sampling.width and sampling.height and sampling.num_steps and sampling.cfg_scale is not None
    check_num_references(len(references))
    num_images = sampling.num_images if noise is None else noise.shape[0]
    for latents in references:
        check_latents(latents, variant.dit.in_channels, "a reference", num_images)
    check_text(text, variant, num_images)
    if sampling.cfg_scale != 1:
        if negative_text is None:
            raise ValueError(
                f"cfg_scale is {sampling.cfg_scale}, but there is no negative prompt; give one (it may be empty), or "
                "set it to 1"
            )
        check_text(negative_text, variant, num_images)
        if negative_text.shape[1] != text.shape[1]:
            raise ValueError(
                f"the prompt has {text.shape[1]} tokens and the negative prompt {negative_text.shape[1]}; encode both "
                "with one text encoder, or set cfg_scale 1"
            )
    if noise is None:
        noise = seed_noise(sampling.seed, sampling.num_images, sampling.height, sampling.width)
    check_initial(initial, mask, sampling, noise)
    num_tokens = (sampling.height // PIXELS_PER_LATENT) * (sampling.width // PIXELS_PER_LATENT)
    try:
        return denoise(
            dit,
            noise,
            text,
            sigma_schedule(sampling.num_steps, num_tokens, sampling.flow_shift, strength=sampling.strength),
            references=references,
            reference_cache=sampling.reference_cache,
            guidance=sampling.guidance,
            cfg_scale=sampling.cfg_scale,
            negative_text=negative_text,
            initial=initial,
            mask=mask,
            on_step=on_step,
            should_stop=should_stop,
        )
    finally:
        if references:
            reference_caches(dit).settle(dit.device)


def check_initial(initial: Tensor | None, mask: Tensor | None, sampling: SamplingConfig, noise: Tensor) -> None:
    """Refuses a strength or mask without a picture to start from, and pictures or masks of another size or number.

    Raises:
        ValueError: with what belongs together.
    """
    if initial is None:
        if sampling.strength != 1 or mask is not None:
            what = "a mask" if mask is not None else f"a strength (denoise) of {sampling.strength:g}"
            raise ValueError(f"{what} was given without a picture to start from; give one, or leave it out")
        return
    for name, tensor, num_channels in (("the initial latents", initial, noise.shape[1]), ("the mask", mask, 1)):
        if tensor is None:
            continue
        wanted = (num_channels, *noise.shape[2:])
        if tensor.shape[1:] != wanted or tensor.shape[0] not in (1, noise.shape[0]):
            raise ValueError(
                f"{name} have shape {list(tensor.shape)}, and {noise.shape[0]} pictures of {sampling.width}x"
                f"{sampling.height} px need [1 or {noise.shape[0]}, {', '.join(map(str, wanted))}]; bring them to that "
                "size, or leave width and height open"
            )
    if mask is not None and not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("the mask has values outside of 0..1; 1 makes anew, 0 keeps")


def check_text(text: Tensor, variant: Variant, num_images: int) -> None:
    """Refuses an embedding of another model's text encoder, or of another number of prompts than pictures."""
    wanted = variant.dit.context_dim
    if text.dim() != 3 or text.shape[-1] != wanted:
        raise ValueError(
            f"the text embedding has shape {tuple(text.shape)}; {variant.name} needs {wanted} channels. "
            f"Encode the prompt with the text encoder of {variant.name} ({variant.text_encoder.tokenizer_id})."
        )
    if text.shape[0] not in (1, num_images):
        raise ValueError(f"{text.shape[0]} prompts were given for {num_images} pictures; give one, or one for each")


def check_latents(latents: Tensor, num_channels: int, name: str, num_images: int | None = None) -> None:
    """Refuses latents of another model, or of a reference that is neither one for all pictures nor one for each."""
    if latents.dim() != 4 or latents.shape[1] != num_channels:
        raise ValueError(
            f"{name} has latents of shape {tuple(latents.shape)}; FLUX.2 needs [batch, {num_channels}, height / "
            f"{PIXELS_PER_LATENT}, width / {PIXELS_PER_LATENT}]. Encode or sample with a FLUX.2 model."
        )
    if num_images is not None and latents.shape[0] not in (1, num_images):
        raise ValueError(
            f"{name} is a batch of {latents.shape[0]} latents for {num_images} pictures; give one, or one for each"
        )


def load_pipeline(
    variant: str | None = None,
    *,
    dit: str | os.PathLike[str] | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    precision: PlanPrecision = "auto",
    text_encoder_precision: PlanPrecision = "auto",
    autoencoder_dtype: AutoencoderPrecision = "auto",
    vram_budget_gib: float | None = None,
    needs: MemoryNeeds | None = None,
    loras: Sequence[LoraSetting] = (),
    acceleration: Acceleration | None = None,
) -> Flux2Pipeline:
    """Loads the three networks, or lets them take turns on the device where it cannot hold them all.

    Args:
        variant: a name of `variants.VARIANTS`, or "auto" to tell from the DiT file. None: "auto" where a DiT is given,
            else the bundled tiny model.
        dit, autoencoder, text_encoder: files or folders; where one is not given it is looked up by variant
            (`weights.find_weights`).
        tokenizer: for a text encoder file that has none beside it.
        models_dir: ComfyUI's models folder, searched before the Hugging Face cache.
        dtype: type of the plain weights of DiT and text encoder, and so of the activations; None keeps that of the
            files. With the precision "auto" nothing is quantised then.
        device: where the networks run.
        precision: how the weights of the DiT's blocks are kept; "auto" decides by the budget, see `memory`.
        text_encoder_precision: likewise for the layers of the text encoder.
        autoencoder_dtype: of the autoencoder; "auto" takes the file's, and bf16 for an fp32 file on a GPU that has it.
        vram_budget_gib: GiB that tensors may take on the device. None: what is free on a CUDA device, less a reserve;
            elsewhere there is no limit.
        needs: what the pictures will be like; None: one of the variant's default size.
        loras: live on the DiT from the beginning.
        acceleration: the DiT's attention kernel and torch.compile; None: the defaults.

    Raises:
        ValueError: weights that are missing, damaged, or of another model; a budget that is too small.
    """
    from .detect import resolve_variant
    from .model_files import find_model_files
    from .placement import place_pipeline
    from .tensor_source import TensorSource

    if variant is None:
        variant = "auto" if dit is not None else "tiny"
    if variant == "auto" and dit is None:
        raise ValueError("the variant 'auto' is told from a DiT file, but none was given; give one or name the variant")
    if variant == "auto" and dit is not None:
        resolved = resolve_variant(TensorSource(dit, component="dit"))
    else:
        resolved = get_variant(variant)
    files = find_model_files(
        resolved,
        dit=dit,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        models_dir=Path(models_dir) if models_dir is not None else None,
    )
    return place_pipeline(
        files,
        tokenizer=Path(tokenizer) if tokenizer else None,
        dtype=dtype,
        device=torch.device(device),
        precision=precision,
        text_encoder_precision=text_encoder_precision,
        autoencoder_dtype=autoencoder_dtype,
        vram_budget_gib=vram_budget_gib,
        needs=needs,
        loras=loras,
        acceleration=acceleration,
    )
