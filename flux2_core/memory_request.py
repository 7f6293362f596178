"""What the planner of `memory` is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .autoencoder import PIXELS_PER_LATENT
from .autoencoder_memory import Tiling
from .memory_estimates import TokenCounts, TrainingMode
from .reference_memory import Place
from .variants import Variant

PlainPrecision = Literal["bf16", "fp16", "fp32"]
AutoencoderPrecision = Literal["auto", "bf16", "fp16", "fp32"]
WeightPrecision = Literal["bf16", "fp16", "fp32", "fp8", "nf4"]
PlanPrecision = Literal["auto", "bf16", "fp16", "fp32", "fp8", "nf4"]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file of weights holds, as far as it matters to memory."""

    precision: WeightPrecision = "bf16"
    """Of most weights; never nf4."""
    plain: PlainPrecision = "bf16"
    """Of weights that are not fp8; the type of the activations."""
    can_stream: bool = True
    """Whether blocks can be read from the file as they run, in its own precision."""


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What the work is like, as far as it matters to memory."""

    width: int | None = None
    """Pixels; None: the variant's default."""
    height: int | None = None
    reference_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of references, in pixels, as they are encoded."""
    reference_cache: Literal["off", "exact", "approximate"] | None = None
    """Whether references are computed once for all steps, see `reference_cache`; None: as the variant does."""
    num_images: int = 1
    """Pictures at once; in training, samples of a batch."""
    uses_cfg: bool | None = None
    """Whether a negative prompt runs beside the prompt; None: as the variant does by default."""
    tile_autoencoder: bool = False
    """Tile in any case."""
    num_streamed: int | None = None
    """Exactly so many blocks are streamed; None leaves it to the plan."""


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """What has to fit."""

    variant: Variant
    precision: PlanPrecision = "auto"
    text_encoder_precision: PlanPrecision = "auto"
    dit_file: FileFacts = FileFacts()
    text_encoder_file: FileFacts = FileFacts()
    autoencoder_precision: PlainPrecision = "bf16"
    needs: MemoryNeeds = MemoryNeeds()
    lora_bytes: int = 0
    """Factors of live LoRAs, in the type of the activations."""
    rank: int | None = None
    """Rank of the LoRA that is trained on all Linears of the blocks; None: pictures are made."""
    checkpointing: Literal["auto", "none", "blocks", "offload"] = "auto"
    """For training: what is kept for the backward pass."""
    optimizer_bytes: int = 8
    """For training: state of the optimiser (and averages) for each parameter; two fp32 moments by default."""
    uses_text_encoder: bool = True
    uses_autoencoder: bool = True
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        for name, value in (("precision", self.precision), ("text encoder's", self.text_encoder_precision)):
            if value not in get_args(PlanPrecision):
                raise ValueError(f"the {name} precision is {value!r}; allowed are {', '.join(get_args(PlanPrecision))}")
        number = self.variant.dit.num_double_blocks + self.variant.dit.num_single_blocks
        if self.needs.num_streamed is not None and not 0 <= self.needs.num_streamed <= number:
            raise ValueError(
                f"{self.needs.num_streamed} blocks cannot be streamed: {self.variant.name} has {number}; give 0 to "
                f"{number}"
            )
        if self.needs.num_streamed and self.rank is not None and self.checkpointing == "none":
            raise ValueError(
                "streamed blocks can be trained only with checkpointing, since their weights do not stay on the device "
                "for the backward pass; set checkpointing to blocks or offload, or stream no blocks"
            )

    @property
    def tokens(self) -> TokenCounts:
        """What a forward pass of the DiT runs on."""
        width, height = self.size
        sizes = ((width, height), *self.needs.reference_sizes)
        num_tokens = sum((w // PIXELS_PER_LATENT) * (h // PIXELS_PER_LATENT) for w, h in sizes)
        uses_cfg = self.variant.cfg_scale != 1 if self.needs.uses_cfg is None else self.needs.uses_cfg
        num_rows = self.needs.num_images * (2 if uses_cfg and self.rank is None else 1)
        return TokenCounts(
            num_rows=num_rows, num_tokens=num_tokens, num_text_tokens=self.variant.text_encoder.max_tokens
        )

    @property
    def num_reference_tokens(self) -> int:
        """Of `tokens`, those of references."""
        sizes = self.needs.reference_sizes
        return sum((width // PIXELS_PER_LATENT) * (height // PIXELS_PER_LATENT) for width, height in sizes)

    @property
    def reference_cache(self) -> Literal["off", "exact", "approximate"]:
        """How references are cached, if there are any."""
        if not self.needs.reference_sizes or self.rank is not None:
            return "off"
        return self.needs.reference_cache or self.variant.reference_cache

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        default = self.variant.default_size
        return self.needs.width or default, self.needs.height or default


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """How a network of blocks is kept."""

    precision: WeightPrecision
    num_blocks: int
    num_resident: int
    """Blocks that stay on the device while the network is in use."""
    ring_size: int
    """Device buffers that the other blocks flow through; 0 where all are resident."""
    from_disk: bool = False
    """Whether the other blocks are read from the file, not kept in host memory."""
    resident_bytes: int
    """Weights that stay on the device."""
    device_bytes: int
    """The same, with the buffers."""
    streamed_bytes: int
    """Copied to the device in every pass."""
    host_bytes: int
    """Of what is streamed, in host memory."""

    @property
    def is_streamed(self) -> bool:
        return self.num_resident < self.num_blocks


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where everything goes, and what it is estimated to take."""

    dit: NetworkPlan
    text_encoder: NetworkPlan | None
    """None where it is not used."""
    takes_turns: bool
    """Whether networks leave the device while another one works."""
    dit_stays: bool
    """Whether the DiT's resident blocks stay on the device while other networks work."""
    tiling: Tiling
    """How pictures run through the autoencoder."""
    checkpointing: TrainingMode | None
    """For training."""
    reference_cache: Place | None = None
    """Where keys and values of references are kept; None where there are none."""
    text_encoding_bytes: int
    """Peak on the device in each stage."""
    sampling_bytes: int
    """Of sampling, or of a training step."""
    decoding_bytes: int
    """Of the autoencoder, references included."""
    delay_seconds: float = 0.0
    """What the lack of memory adds to a picture or a training step, by the figures of one GPU: to compare plans by."""

    @property
    def is_slow(self) -> bool:
        """Whether activations or resident weights go to host memory and back."""
        return self.tiling == "host" or not self.dit_stays

    @property
    def peak_bytes(self) -> int:
        """The largest of the three."""
        return max(self.text_encoding_bytes, self.sampling_bytes, self.decoding_bytes)
