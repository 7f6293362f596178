"""Settings of LoRA training. Every default stands here or in the settings of a part, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..flux2_core.memory_request import AutoencoderPrecision
from .adapters import AdapterConfig
from .metrics import LogWith
from .optimizers import OptimizerConfig, ScheduleConfig, check_schedule
from .timesteps import TimestepConfig

Precision = Literal["no", "fp16", "bf16"]
BasePrecision = Literal["auto", "bf16", "fp8", "nf4"]
Checkpointing = Literal["auto", "none", "blocks", "offload"]
SavePrecision = Literal["fp32", "fp16", "bf16"]

MAX_NAME_BYTES = 200
"""Of a run's name; file systems allow 255, and what is behind it must fit too."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written, when, and how long it is kept."""

    output_dir: Path = Path("output")
    lora_dir: Path | None = None
    """For the LoRAs alone; None: output_dir."""
    output_name: str = "lora"
    """Begins the name of every file."""
    save_precision: SavePrecision = "bf16"
    """Type of the factors in the file. In a bf16 model, fp32 factors would be rounded to the same numbers."""
    save_every_n_steps: int | None = None
    save_every_n_epochs: int | None = None
    save_last_n_steps: int | None = None
    """Of the files saved by steps, those of the last N steps are kept."""
    save_last_n_epochs: int | None = None
    """Of the files saved by epochs, the last N are kept."""
    save_state: bool = False
    """Write the state for `resume` with every save, not only when training is stopped."""
    save_state_on_train_end: bool = False
    metadata_title: str | None = None
    metadata_author: str | None = None
    metadata_description: str | None = None
    metadata_license: str | None = None
    metadata_tags: str | None = None
    training_comment: str | None = None
    no_metadata: bool = False
    """Leave out all metadata but what programs need to read the file."""

    def __post_init__(self) -> None:
        name = self.output_name
        if not name or Path(name).name != name or name in (".", "..") or "\0" in name or "\\" in name:
            raise ValueError(f"output_name is {name!r}; it must be a plain file name without folders")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"output_name has {len(name.encode())} bytes; it may have {MAX_NAME_BYTES}")
        for what in ("save_every_n_steps", "save_every_n_epochs", "save_last_n_steps", "save_last_n_epochs"):
            _at_least_one(what, getattr(self, what))


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is looked at during training."""

    sample_prompts: Path | None = None
    """A file with a prompt a line and options behind it, as for ``flux2 generate --from_file``. The pictures are made
    at the end of the run, and before as often as is asked for."""
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None
    sample_at_first: bool = False
    """Also before the first step: what the base makes."""
    validate_every_n_steps: int | None = None
    """None: ten times in the run. Only with pictures held out for validation."""
    num_validation_sigmas: int = 4
    """Noise levels at which every held-out picture is measured: quantiles of the training density."""
    log_every_n_steps: int = 1
    log_with: LogWith | None = None
    logging_dir: Path | None = None
    log_tracker_name: str | None = None
    wandb_run_name: str | None = None

    def __post_init__(self) -> None:
        for what in ("sample_every_n_steps", "sample_every_n_epochs", "validate_every_n_steps"):
            _at_least_one(what, getattr(self, what))
        _at_least_one("num_validation_sigmas", self.num_validation_sigmas)
        _at_least_one("log_every_n_steps", self.log_every_n_steps)
        if (self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first) and not (
            self.sample_prompts
        ):
            raise ValueError("samples are asked for, but there is no file of prompts; give sample_prompts")
        for what in ("logging_dir", "log_tracker_name", "wandb_run_name"):
            if getattr(self, what) is not None and self.log_with is None:
                raise ValueError(f"{what} is {getattr(self, what)}, which has no effect without log_with; give both")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of LoRA training."""

    seed: int = 0
    """Decides the order, the noise, the noise levels and the first weights."""
    max_train_steps: int = 1600
    """Steps of the optimiser."""
    max_train_epochs: int | None = None
    """Replaces max_train_steps by so many passes over the dataset."""
    gradient_accumulation_steps: int = 1
    mixed_precision: Precision | None = None
    """Precision of the frozen base and of activations; "no" is fp32. None: as in the DiT's file, as when generating.
    The LoRA itself is always trained in fp32."""
    base_precision: BasePrecision = "auto"
    """How the weights of the frozen blocks are kept. fp8 and nf4 (QLoRA) take a half and a quarter of bf16; "auto"
    takes fp8 where plain weights do not fit into the device's memory."""
    text_encoder_precision: BasePrecision = "auto"
    """Of the text encoder, for the prompts of sample pictures; "auto": as in the file."""
    autoencoder_precision: AutoencoderPrecision = "auto"
    """Of the autoencoder, for sample pictures; "auto": as when generating."""
    vram_budget_gib: float | None = None
    """GiB that training may take on the device; what does not fit is streamed. None: what is free."""
    num_streamed_blocks: int | None = None
    """Blocks whose weights stay in host memory and are streamed; None: as few as fit."""
    checkpointing: Checkpointing = "auto"
    """Activations that are computed again in the backward pass instead of kept: "blocks" keeps only what goes into a
    block, "offload" keeps that in host memory. "auto": "blocks", and "offload" where that does not fit; for the tiny
    model "none"."""
    compile: bool = False
    """torch.compile of the blocks: the first steps take some ten seconds longer, the others less."""
    ema_decay: float | None = None
    """Exponential moving average of the LoRA; it is what is saved and sampled. None: the weights themselves."""
    network_weights: Path | None = None
    """A LoRA to start from."""
    dim_from_weights: bool = False
    """Take kind, rank, alpha and layers from network_weights."""
    base_weights: tuple[Path, ...] = ()
    """LoRAs that act on the base while the new one is trained on top of them, which does not hold them."""
    base_weights_multiplier: tuple[float, ...] = ()
    """The strength of each; () is 1."""
    max_bad_steps: int = 10
    """Steps in a row without a finite loss after which training gives up; each is skipped."""
    preflight: bool = True
    """First try the largest batch, so that too little memory shows at once."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv:2402.12354): lora_B learns this much faster."""
    output: OutputConfig = field(default_factory=OutputConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed}; it must lie in 0..{2**63 - 1}")
        for what in ("max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "max_bad_steps"):
            _at_least_one(what, getattr(self, what))
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must lie between 0 and 1, such as 0.999")
        if self.loraplus_lr_ratio is not None and not self.loraplus_lr_ratio > 0:
            raise ValueError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}; it must be above 0, such as 16")
        if self.vram_budget_gib is not None and not self.vram_budget_gib > 0:
            raise ValueError(f"vram_budget is {self.vram_budget_gib}; it must be a number of GiB above 0, such as 12")
        check_schedule(self.optimizer, self.schedule)
        if self.dim_from_weights and self.network_weights is None:
            raise ValueError("dim_from_weights takes the rank from network_weights; give that too")
        if self.dim_from_weights and replace(self.adapter, dropout=0.0, max_norm=None) != AdapterConfig():
            raise ValueError(
                "dim_from_weights takes kind, rank, alpha and layers from network_weights; leave out network_dim, "
                "network_alpha, network_module and the network_args that say them too"
            )
        if self.adapter.max_norm is not None and self.optimizer.is_schedule_free:
            raise ValueError("scale_weight_norms would break the averages of a schedule-free optimiser; use another")
        strengths = self.base_weights_multiplier
        if strengths and len(strengths) != len(self.base_weights):
            raise ValueError(
                f"base_weights_multiplier has {len(strengths)} numbers for {len(self.base_weights)} base_weights; "
                "give one for each, or none"
            )
        if not all(map(math.isfinite, strengths)):
            raise ValueError(f"base_weights_multiplier is {strengths}; they must be finite numbers, such as 0.8")


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be 1 or more")
