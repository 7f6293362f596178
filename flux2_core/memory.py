"""The planner: which weights stay on the device, in which precision, within a budget of bytes (pure functions).

The order of preference follows measurements (one picture of 1024x1024 with the 9B model on an H200; a step takes 165 ms
with bf16 weights on the device, 159 ms with fp8 weights there, and at least 155 ms, the time of the copies, with fp8
weights that are all streamed; bf16 weights take twice as long to copy, nf4 has to be multiplied out for every product):

1. the file's own precision, all on the device: nothing is lost;
2. fp8, as many blocks on the device as fit, the others streamed from host memory beside the computation;
3. where host memory is short too, the file's own weights, streamed from the file;
4. nf4, which is less exact, where nothing else fits.

A precision that is asked for is not changed: only how much of it stays on the device. The text encoder runs once a
prompt, so streaming costs it a fraction of a second: "auto" keeps its precision. Networks that do not fit beside each
other take turns on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from .autoencoder import PIXELS_PER_LATENT
from .autoencoder_memory import (
    Tiling,
    autoencoder_bytes,
    decoding_bytes,
    encoding_bytes,
    host_strip_bytes,
    strip_bytes,
)
from .linear import FORMATS, WeightFormat
from .memory_estimates import (
    Computation,
    NetworkBytes,
    TokenCounts,
    TrainingMode,
    adapter_parameters,
    dit_bytes,
    forward_bytes,
    text_encoder_bytes,
    text_encoding_bytes,
    training_bytes,
)
from .reference_memory import Place, cached_step_bytes, first_pass_bytes, reference_cache_bytes
from .streaming import RING_SIZE, streamed_indices
from .variants import Variant

GIB = 2**30
PlainPrecision = Literal["bf16", "fp16", "fp32"]
WeightPrecision = Literal["bf16", "fp16", "fp32", "fp8", "nf4"]
PlanPrecision = Literal["auto", "bf16", "fp16", "fp32", "fp8", "nf4"]
ITEM_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
MASTER_BYTES = 8
"""Of a trained parameter and its gradient, both fp32."""


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
    device_bytes: int
    """Weights and buffers on the device."""
    host_bytes: int
    """Of the streamed blocks in host memory."""

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
    """Whether the DiT stays on the device while the autoencoder works."""
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

    @property
    def peak_bytes(self) -> int:
        """The largest of the three."""
        return max(self.text_encoding_bytes, self.sampling_bytes, self.decoding_bytes)


class DoesNotFit(Exception):  # noqa: N818 - caught within this module
    """A budget is too small."""


def plan_memory(request: MemoryRequest, budget_bytes: int | None, host_bytes: int | None = None) -> MemoryPlan:
    """The fastest way to run within a budget, see the top of this file.

    Args:
        budget_bytes: what tensors may take on the device; None: as much as there is need for.
        host_bytes: free host memory; None: enough.

    Raises:
        ValueError: it cannot be done; says the least that works.
    """
    for precision, only_resident, disk in _candidates(request):
        for checkpointing, place in product(_checkpointing_modes(request), _places(request)):
            tried = _Stages(request, precision, checkpointing, place)
            plan = tried.plan(budget_bytes, host_bytes, only_resident=only_resident, from_disk=disk)
            if plan is not None:
                return plan
    raise ValueError(_refusal(request, budget_bytes, host_bytes))


def plan_text_encoder(request: MemoryRequest, budget_bytes: int | None, host_bytes: int | None = None) -> NetworkPlan:
    """The text encoder alone, of a request that uses it; as `plan_memory`."""
    stages = _Stages(replace(request, rank=None), "bf16", None)
    try:
        plan = stages.plan_text_encoder(budget_bytes, host_bytes)
    except DoesNotFit:
        there = "any amount" if budget_bytes is None else in_words(budget_bytes)
        raise ValueError(
            f"the text encoder of {request.variant.name} does not fit into {there} of the device's memory; free some, "
            "raise the budget, or choose a smaller precision"
        ) from None
    assert plan is not None, "the request uses it"
    return plan


def describe(plan: MemoryPlan) -> str:
    """One line, such as "fp8, 21 of 32 blocks resident, about 9.8 GiB"."""
    dit, text_encoder = plan.dit, plan.text_encoder
    parts = [dit.precision]
    if dit.is_streamed:
        source = ", the others from disk" if dit.from_disk else ""
        parts.append(f"{dit.num_resident} of {dit.num_blocks} blocks resident{source}")
    else:
        parts.append(f"all {dit.num_blocks} blocks resident")
    if text_encoder is not None and text_encoder.is_streamed:
        parts.append(f"text encoder streamed{' from disk' if text_encoder.from_disk else ''}")
    if plan.tiling != "whole":
        parts.append("pictures in strips" + (" through host memory" if plan.tiling == "host" else ""))
    if plan.reference_cache == "host":
        parts.append("references cached in host memory")
    if plan.checkpointing not in (None, "none"):
        parts.append(f"checkpointing {plan.checkpointing}")
    return f"{', '.join(parts)}, about {in_words(plan.peak_bytes)}"


def in_words(num_bytes: int) -> str:
    """A size for people, such as "9.8 GiB"."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / 2**20:.1f} MiB"


def weight_format(precision: WeightPrecision) -> WeightFormat | None:
    """The format of a precision, None for plain weights."""
    return next((known for known in FORMATS if known == precision), None)


def _candidates(request: MemoryRequest) -> Iterator[tuple[WeightPrecision, bool, bool]]:
    """Precisions by preference; whether all blocks have to be resident, and whether the others come from the file."""
    file, asked = request.dit_file, request.precision
    if asked != "auto":
        yield asked, False, False
        if asked == file.precision and file.can_stream:
            yield asked, False, True
        return
    if request.needs.num_streamed:
        yield file.precision, False, False
        if file.can_stream:
            yield file.precision, False, True
        return
    yield file.plain, True, False
    if file.plain == "fp32":
        yield "bf16", True, False
    yield "fp8", False, False
    if file.can_stream:
        yield file.precision, False, True
    yield "nf4", False, False


def _checkpointing_modes(request: MemoryRequest) -> tuple[TrainingMode | None, ...]:
    if request.rank is None:
        return (None,)
    if request.checkpointing != "auto":
        return (request.checkpointing,)
    return ("none", "blocks") if request.variant.name == "tiny" else ("blocks", "offload")


def _places(request: MemoryRequest) -> tuple[Place | None, ...]:
    """Where a cache of references may go, the faster first."""
    if request.reference_cache == "off":
        return (None,)
    return ("device",) if request.device_type == "cpu" else ("device", "host")


class _Stages:
    """The three stages of a request in one precision of the DiT."""

    def __init__(
        self,
        request: MemoryRequest,
        precision: WeightPrecision,
        checkpointing: TrainingMode | None,
        place: Place | None = None,
    ) -> None:
        self.request = request
        self.place: Place | None = place
        self.precision: WeightPrecision = precision
        self.checkpointing: TrainingMode | None = checkpointing
        self.can_stream = checkpointing != "none"
        config = request.variant.dit
        plain = precision if precision in ITEM_BYTES else request.dit_file.plain
        self.item_bytes = ITEM_BYTES[plain]
        self.weights = dit_bytes(config, weight_format(precision), self.item_bytes)
        self.state = 0
        """Adapters in training, their gradients and the optimiser's state: they stay whatever works."""
        if request.rank is not None:
            self.state = adapter_parameters(config, request.rank) * (MASTER_BYTES + request.optimizer_bytes)
        self.cache = 0
        """Keys and values of references, wherever they are."""
        if place is not None:
            rows = 1 if request.reference_cache == "exact" else request.tokens.num_rows
            self.cache = reference_cache_bytes(config, request.num_reference_tokens, rows, self.item_bytes)
        self.activations = self.state + self._sampling() + (self.cache if place == "device" else 0)
        self.autoencoder_weights = 0
        if request.uses_autoencoder:
            item_bytes = ITEM_BYTES[request.autoencoder_precision]
            self.autoencoder_weights = autoencoder_bytes(request.variant.autoencoder, item_bytes)

    def _sampling(self) -> int:
        """Activations and gradients of the DiT."""
        request, variant = self.request, self.request.variant
        how = Computation(
            item_bytes=self.item_bytes,
            weight_format=weight_format(self.precision),
            is_cuda=request.device_type == "cuda",
            is_adapted=request.lora_bytes > 0 or request.rank is not None,
        )
        if self.place is not None:
            number = request.num_reference_tokens
            tokens = replace(request.tokens, num_tokens=request.tokens.num_tokens - number)
            is_exact = request.reference_cache == "exact"
            first = first_pass_bytes(variant.dit, tokens, number, how, is_exact=is_exact)
            return request.lora_bytes + max(first, cached_step_bytes(variant.dit, tokens, number, how))
        if request.rank is None:
            return request.lora_bytes + forward_bytes(variant.dit, request.tokens, how)
        assert self.checkpointing is not None
        return training_bytes(variant.dit, request.tokens, how, rank=request.rank, checkpointing=self.checkpointing)

    def autoencoding(self, tiling: Tiling) -> tuple[int, int]:
        """Peaks of the autoencoder's work, weights aside: on the device, and of host memory."""
        request = self.request
        if not request.uses_autoencoder:
            return 0, 0
        config, item_bytes = request.variant.autoencoder, ITEM_BYTES[request.autoencoder_precision]
        is_cuda = request.device_type == "cuda"
        device: list[int] = []
        host = [0]
        for index, size in enumerate((request.size, *request.needs.reference_sizes)):
            decodes = index == 0
            if tiling == "whole":
                count = decoding_bytes if decodes else encoding_bytes
                device.append(count(config, *size, item_bytes, is_cuda=is_cuda))
                continue
            on_device, movable = strip_bytes(config, *size, item_bytes, decodes=decodes, is_cuda=is_cuda)
            if tiling == "host":
                on_device = host_strip_bytes(config, *size, item_bytes, decodes=decodes, is_cuda=is_cuda)
                host.append(movable)
            device.append(on_device)
        return max(device), max(host)

    def plan(self, budget: int | None, host: int | None, *, only_resident: bool, from_disk: bool) -> MemoryPlan | None:
        """The fastest plan, None where it does not fit."""
        request = self.request
        if host is not None and self.place == "host":
            host -= self.cache
            if host < 0:
                return None
        try:
            # 1. Everything at once, where nothing else was asked for.
            text_encoder = self.plan_text_encoder(None, None)
            if not request.needs.num_streamed and not from_disk:
                whole = _place(self.weights, self.precision, self.weights.total)
                plan = self._together(whole, text_encoder, budget)
                if plan is not None:
                    return plan
            # 2. In turns. The DiT first: its stage is the long one.
            room = None if budget is None else budget - self.activations
            dit = self._dit(room, host, only_resident=only_resident, from_disk=from_disk)
            left = None if host is None else host - dit.host_bytes
            return self._in_turns(dit, self.plan_text_encoder(budget, left), budget, left)
        except DoesNotFit:
            return None

    def _together(self, dit: NetworkPlan, text_encoder: NetworkPlan | None, budget: int | None) -> MemoryPlan | None:
        """A plan without any network leaving the device."""
        weights = dit.device_bytes + self.autoencoder_weights
        weights += text_encoder.device_bytes if text_encoder is not None else 0
        # An exact cache is kept from one picture to the next.
        beside = self.cache if self.place == "device" and self.request.reference_cache == "exact" else 0
        tilings: tuple[Tiling, ...] = _tilings(self.request)[:2]
        for tiling in tilings:
            plan = MemoryPlan(
                dit=dit,
                text_encoder=text_encoder,
                takes_turns=False,
                dit_stays=True,
                tiling=tiling,
                checkpointing=self.checkpointing,
                reference_cache=self.place,
                text_encoding_bytes=(
                    weights + beside + self._text_activations(text_encoder) if text_encoder is not None else 0
                ),
                sampling_bytes=weights + self.activations,
                decoding_bytes=weights + beside + self.state + self.autoencoding(tiling)[0]
                if self.request.uses_autoencoder
                else 0,
            )
            if budget is None or plan.peak_bytes <= budget:
                return plan
        return None

    def _in_turns(
        self, dit: NetworkPlan, text_encoder: NetworkPlan | None, budget: int | None, host: int | None
    ) -> MemoryPlan:
        text_bytes = 0
        if text_encoder is not None:
            text_bytes = text_encoder.device_bytes + self._text_activations(text_encoder)
        # The ring is free while the autoencoder works, and what is trained cannot leave.
        beside = dit.device_bytes - dit.ring_size * max(self.weights.slots)
        tilings: tuple[Tiling, ...] = _tilings(self.request)
        ways = (True,) if self.request.rank is not None else (True, False)
        for dit_stays, index in product(ways, range(len(tilings))):
            tiling = tilings[index]
            on_device, in_host = self.autoencoding(tiling)
            decoding = self.autoencoder_weights + self.state + on_device + (beside if dit_stays else 0)
            if not self.request.uses_autoencoder:
                decoding = 0
            if (budget is None or decoding <= budget) and (host is None or in_host <= host):
                return MemoryPlan(
                    dit=dit,
                    text_encoder=text_encoder,
                    takes_turns=True,
                    dit_stays=dit_stays,
                    tiling=tiling,
                    checkpointing=self.checkpointing,
                    reference_cache=self.place,
                    text_encoding_bytes=text_bytes,
                    sampling_bytes=dit.device_bytes + self.activations,
                    decoding_bytes=decoding,
                )
        raise DoesNotFit

    def _dit(self, room: int | None, host: int | None, *, only_resident: bool, from_disk: bool) -> NetworkPlan:
        number = self.request.needs.num_streamed
        if number is not None and number > 0:
            num_resident = len(self.weights.blocks) - number
            plans = [_streamed(self.weights, self.precision, num_resident, ring) for ring in (RING_SIZE, 1)]
        else:
            plans = _fitting(self.weights, self.precision, room)
        for plan in plans:
            if plan.is_streamed and (only_resident or not self.can_stream):
                continue
            if room is not None and plan.device_bytes > room:
                continue
            if from_disk and plan.is_streamed:
                return replace(plan, from_disk=True, host_bytes=0)
            if host is None or plan.host_bytes <= host:
                return plan
        raise DoesNotFit

    def plan_text_encoder(self, budget: int | None, host: int | None) -> NetworkPlan | None:
        """How it is kept while it works; None where it is not used."""
        if not self.request.uses_text_encoder:
            return None
        for precision in _text_encoder_precisions(self.request):
            weights = self._text_encoder_weights(precision)
            activations = self._activations_of_text(weights, precision)
            room = None if budget is None else budget - activations
            file = self.request.text_encoder_file
            for plan in _fitting(weights, precision, room):
                if room is not None and plan.device_bytes > room:
                    continue
                if host is None or plan.host_bytes <= host:
                    return plan
                if file.can_stream and precision == file.precision:
                    return replace(plan, from_disk=True, host_bytes=0)
        raise DoesNotFit

    def _text_encoder_weights(self, precision: WeightPrecision) -> NetworkBytes:
        plain = precision if precision in ITEM_BYTES else self.request.text_encoder_file.plain
        return text_encoder_bytes(self.request.variant.text_encoder, weight_format(precision), ITEM_BYTES[plain])

    def _text_activations(self, plan: NetworkPlan) -> int:
        return self._activations_of_text(self._text_encoder_weights(plan.precision), plan.precision)

    def _activations_of_text(self, weights: NetworkBytes, precision: WeightPrecision) -> int:
        plain = precision if precision in ITEM_BYTES else self.request.text_encoder_file.plain
        dense = precision == "nf4" or (precision == "fp8" and self.request.device_type != "cuda")
        return text_encoding_bytes(self.request.variant.text_encoder, weights, ITEM_BYTES[plain], dense=dense)


def _text_encoder_precisions(request: MemoryRequest) -> tuple[WeightPrecision, ...]:
    asked, file = request.text_encoder_precision, request.text_encoder_file
    if asked != "auto":
        return (asked,)
    # Streamed in its own precision; the others only where neither host memory nor the file will do.
    return (file.plain, "fp8", "nf4")


def _tilings(request: MemoryRequest) -> tuple[Tiling, ...]:
    if request.device_type == "cpu":  # where host memory is the device's
        return ("strips",) if request.needs.tile_autoencoder else ("whole", "strips")
    return ("strips", "host") if request.needs.tile_autoencoder else ("whole", "strips", "host")


def _fitting(weights: NetworkBytes, precision: WeightPrecision, room: int | None) -> list[NetworkPlan]:
    """All blocks on the device, or as many as leave space for the ring; the fastest first, down to the smallest."""
    plans = [_place(weights, precision, weights.total)]
    number = len(weights.blocks)
    for ring in (RING_SIZE, 1):
        fitting = [0]
        if room is not None:
            fitting += [n for n in range(1, number) if _streamed(weights, precision, n, ring).device_bytes <= room]
        plans.append(_streamed(weights, precision, max(fitting), ring))
    return plans


def _place(weights: NetworkBytes, precision: WeightPrecision, device_bytes: int) -> NetworkPlan:
    number = len(weights.blocks)
    return NetworkPlan(
        precision=precision,
        num_blocks=number,
        num_resident=number,
        ring_size=0,
        device_bytes=device_bytes,
        host_bytes=0,
    )


def _streamed(weights: NetworkBytes, precision: WeightPrecision, num_resident: int, ring_size: int) -> NetworkPlan:
    streamed = streamed_indices(len(weights.blocks), num_resident)
    ring_size = min(ring_size, len(streamed))
    resident = sum(weights.blocks) - sum(weights.blocks[index] for index in streamed)
    ring = ring_size * max(weights.slots[index] for index in streamed)
    return NetworkPlan(
        precision=precision,
        num_blocks=len(weights.blocks),
        num_resident=num_resident,
        ring_size=ring_size,
        device_bytes=weights.outer + resident + ring,
        host_bytes=sum(weights.slots[index] for index in streamed),
    )


def least_plan(request: MemoryRequest) -> MemoryPlan | None:
    """The plan that takes the least of the device, with enough host memory; in the precision that is asked for."""
    plans: list[MemoryPlan] = []
    for precision, only_resident, disk in _candidates(request):
        for checkpointing, place in product(_checkpointing_modes(request), _places(request)):
            stages = _Stages(request, precision, checkpointing, place)
            # No budget fits less than this one: every search goes down to the smallest before it gives up.
            low, high = 0, 2**44
            while high - low > 2**20:
                middle = (low + high) // 2
                found = stages.plan(middle, None, only_resident=only_resident, from_disk=disk)
                low, high = (low, middle) if found else (middle, high)
            found = stages.plan(high, None, only_resident=only_resident, from_disk=disk)
            plans += [found] if found is not None else []
    return min(plans, key=lambda plan: plan.peak_bytes, default=None)


def _refusal(request: MemoryRequest, budget: int | None, host: int | None) -> str:
    width, height = request.size
    least = least_plan(request)
    assert least is not None, "with enough memory everything fits"
    what = f"{request.variant.name} at {width}x{height} px"
    if budget is None or least.peak_bytes <= budget:
        free = "?" if host is None else f"{host / GIB:.1f}"
        return (
            f"{what} needs more host memory than the {free} GiB that are free, and {request.precision} weights cannot "
            "be streamed from this file: write a file that holds them with `flux2 quantize`, leave the precision at "
            "auto, or raise the budget of the device"
        )
    unit = GIB // 10 if least.peak_bytes >= GIB // 10 else 2**20 // 10
    needed = in_words((least.peak_bytes // unit + 1) * unit)  # rounded up
    work = f"training with rank {request.rank}" if request.rank is not None else "making pictures"
    return (
        f"{work} with {what} does not fit into {in_words(budget)}: the least that works is {needed} "
        f"({describe(least)}); raise the budget, free device memory, or take a smaller picture or batch"
    )
