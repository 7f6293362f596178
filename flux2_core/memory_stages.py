"""The stages of making a picture or of training: what each takes, and which of the ways that fit is the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

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
    TrainingMode,
    adapter_parameters,
    dit_bytes,
    forward_bytes,
    text_encoder_bytes,
    text_encoding_bytes,
    training_bytes,
)
from .memory_request import MemoryPlan, MemoryRequest, NetworkPlan, WeightPrecision
from .reference_memory import Place, cached_step_bytes, first_pass_bytes, reference_cache_bytes
from .streaming import RING_SIZE, streamed_indices

ITEM_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
MASTER_BYTES = 8
"""Of a trained parameter and its gradient, both fp32."""
PINNED_RATE, PAGEABLE_RATE, DISK_RATE = 55e9, 10e9, 2e9
"""Bytes a second to the device: from pinned host memory (measured on an H200), from other memory, from a file."""
FLOPS = 450e12
"""Of the DiT a second, in bf16 on that GPU without compilation."""
UNHIDDEN_SHARE = 0.25
"""Of the time of copies beside the computation, what is counted all the same: other machines copy more slowly."""
STRIPS_SECONDS, HOST_STRIP_COPIES = 0.01, 12
"""What strips add for a megapixel, and how often all that lies in host memory passes through the device."""


class DoesNotFit(Exception):  # noqa: N818 - caught by the planner
    """A budget is too small."""


class Stages:
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
        self._ways: dict[bool, list[list[NetworkPlan]]] = {}
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
        self.tilings: list[tuple[Tiling, int, int]] = [
            (tiling, *self._autoencoding(tiling)) for tiling in _tilings(request)
        ]
        """With their peaks."""

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
        step = training_bytes(variant.dit, request.tokens, how, rank=request.rank, checkpointing=self.checkpointing)
        return request.lora_bytes + step

    def _autoencoding(self, tiling: Tiling) -> tuple[int, int]:
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
        """The fastest plan, None where none fits."""
        if host is not None and self.place == "host":
            host -= self.cache
        plans = self._plans(budget, host, only_resident=only_resident, from_disk=from_disk)
        return min(plans, key=lambda plan: plan.delay_seconds, default=None)

    def _plans(
        self, budget: int | None, host: int | None, *, only_resident: bool, from_disk: bool
    ) -> Iterator[MemoryPlan]:
        """All that fit and of which none is better than another in every way; what changes least comes first."""
        rings = self._rings(only_resident=only_resident, from_disk=from_disk)
        for takes_turns in (False, True):
            for text_encoder in self._text_encoders(budget, host, takes_turns=takes_turns):
                for tiling, on_device, in_host in self.tilings:
                    others = self._others(text_encoder, on_device, takes_turns=takes_turns)
                    used = in_host + (text_encoder.host_bytes if text_encoder is not None else 0)
                    for dit_stays in (True, False) if takes_turns and self.request.rank is None else (True,):
                        room = _room(others, budget, dit_stays=dit_stays)
                        for plans in rings:
                            best = next(
                                (
                                    dit
                                    for dit in plans
                                    if (takes_turns or not dit.is_streamed)
                                    and (
                                        room is None or (dit.device_bytes <= room[0] and dit.resident_bytes <= room[1])
                                    )
                                    and (host is None or dit.host_bytes + used <= host)
                                ),
                                None,
                            )
                            if best is None:
                                continue
                            peaks = [stage.with_dit(best, dit_stays=dit_stays) for stage in others]
                            plan = MemoryPlan(
                                dit=best,
                                text_encoder=text_encoder,
                                takes_turns=takes_turns,
                                dit_stays=dit_stays,
                                tiling=tiling,
                                checkpointing=self.checkpointing,
                                reference_cache=self.place,
                                sampling_bytes=peaks[0],
                                text_encoding_bytes=peaks[1],
                                decoding_bytes=peaks[2],
                            )
                            yield replace(plan, delay_seconds=self._delay(plan, in_host))

    def _rings(self, *, only_resident: bool, from_disk: bool) -> list[list[NetworkPlan]]:
        """Ways to keep the DiT, by size of the ring, the most resident blocks first."""
        number = len(self.weights.blocks)
        residents = range(number, -1, -1)
        if self.request.needs.num_streamed is not None and self.request.needs.num_streamed > 0:
            residents = [number - self.request.needs.num_streamed]
        elif only_resident or not self.can_stream:
            residents = [number]
        if from_disk not in self._ways:
            self._ways[from_disk] = [
                [_streamed(self.weights, self.precision, resident, ring, from_disk=from_disk) for resident in residents]
                for ring in (RING_SIZE, 1)
            ]
        return self._ways[from_disk]

    def _others(self, text_encoder: NetworkPlan | None, autoencoding: int, *, takes_turns: bool) -> list[_Stage]:
        """Sampling, text encoding and decoding without the DiT."""
        request = self.request
        kept = 0 if takes_turns else self.autoencoder_weights
        if text_encoder is not None and not takes_turns and request.rank is None:
            kept += text_encoder.device_bytes
        # An exact cache is kept from one picture to the next.
        cache = self.cache if self.place == "device" and request.reference_cache == "exact" else 0
        text = _Stage()
        if text_encoder is not None:
            own = self._text_activations(text_encoder) + text_encoder.device_bytes
            # In training it works before the DiT is loaded.
            alone = request.rank is not None
            beside = kept - (0 if takes_turns else text_encoder.device_bytes)
            text = _Stage(num_bytes=own if alone else own + beside + cache, has_dit="no" if alone else "resident")
        decoding = _Stage()
        if request.uses_autoencoder:
            kept_then = self.autoencoder_weights if takes_turns else kept
            decoding = _Stage(num_bytes=kept_then + self.state + autoencoding + cache, has_dit="resident")
        return [_Stage(num_bytes=kept + self.activations, has_dit="all"), text, decoding]

    def _delay(self, plan: MemoryPlan, in_host: int) -> float:
        """See `MemoryPlan.delay_seconds`."""
        request, dit, text_encoder = self.request, plan.dit, plan.text_encoder
        tokens = request.tokens
        length = tokens.num_tokens + tokens.num_text_tokens
        hidden = request.variant.dit.hidden_size
        passes, factor = (request.variant.num_steps, 1) if request.rank is None else (2, 2)
        flops = tokens.num_rows * length * (26 * hidden**2 + 4 * length * hidden) * len(self.weights.blocks)
        computing = factor * flops / FLOPS
        copying = dit.streamed_bytes / (DISK_RATE if dit.from_disk else PINNED_RATE)
        hidden_part = computing if dit.ring_size > 1 else 0
        delay = passes * (max(0.0, copying - hidden_part) + UNHIDDEN_SHARE * copying)
        if self.place == "host":
            delay += passes * self.cache / PINNED_RATE
        if text_encoder is not None:
            delay += text_encoder.streamed_bytes / (DISK_RATE if text_encoder.from_disk else PINNED_RATE)
        if not plan.dit_stays:  # before the prompt and before the picture, there and back
            delay += 4 * dit.resident_bytes / PAGEABLE_RATE
        if plan.tiling != "whole":
            width, height = request.size
            delay += STRIPS_SECONDS * width * height / 2**20 + HOST_STRIP_COPIES * in_host / PAGEABLE_RATE
        return delay

    def _text_encoders(
        self, budget: int | None, host: int | None, *, takes_turns: bool
    ) -> Iterator[NetworkPlan | None]:
        """Ways to keep the text encoder, by preference; only one where networks do not take turns.

        Its layers are all resident, where nothing has to leave the device, or all streamed: a layer that leaves for the
        DiT and comes back is copied twice, and one that streams once.
        """
        request = self.request
        if not request.uses_text_encoder:
            yield None
            return
        if request.rank is not None:  # it has the device for itself
            with suppress(DoesNotFit):
                yield self.plan_text_encoder(budget, host)
            return
        for precision in _text_encoder_precisions(request):
            weights = self._text_encoder_weights(precision)
            if not takes_turns:
                yield _place(weights, precision)
                return
            for ring in (RING_SIZE, 1):
                plan = _streamed(weights, precision, 0, ring)
                if budget is not None and plan.device_bytes + self._text_activations(plan) > budget:
                    continue
                if host is None or plan.host_bytes <= host:
                    yield plan
                    return
                if request.text_encoder_file.can_stream and precision == request.text_encoder_file.precision:
                    yield _streamed(weights, precision, 0, ring, from_disk=True)
                    return

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
                    return replace(plan, from_disk=plan.is_streamed, host_bytes=0)
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


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What a stage takes of the device beside the DiT, and what there is of the DiT."""

    num_bytes: int = 0
    has_dit: Literal["no", "resident", "all"] = "no"
    """resident: without the buffers that its other blocks flow through, and only where it stays."""

    def with_dit(self, dit: NetworkPlan, *, dit_stays: bool) -> int:
        """Its peak."""
        if self.has_dit == "all":
            return self.num_bytes + dit.device_bytes
        return self.num_bytes + (dit.resident_bytes if self.has_dit == "resident" and dit_stays else 0)


def _room(stages: list[_Stage], budget: int | None, *, dit_stays: bool) -> tuple[int, int] | None:
    """What is left for the DiT: for all of it, and for its resident blocks; None for no limit."""
    if budget is None:
        return None
    left = {stage.has_dit: 2**62 for stage in stages}
    for stage in stages:
        left[stage.has_dit] = min(left[stage.has_dit], budget - stage.num_bytes)
    if left.get("no", 0) < 0 or (not dit_stays and left.get("resident", 0) < 0):
        return -1, -1
    return left["all"], left.get("resident", 2**62) if dit_stays else 2**62


def _fitting(weights: NetworkBytes, precision: WeightPrecision, room: int | None) -> list[NetworkPlan]:
    """All blocks on the device, or as many as leave space for the ring; the fastest first, down to the smallest."""
    plans = [_place(weights, precision)]
    number = len(weights.blocks)
    for ring in (RING_SIZE, 1):
        fitting = [0]
        if room is not None:
            fitting += [n for n in range(1, number) if _streamed(weights, precision, n, ring).device_bytes <= room]
        plans.append(_streamed(weights, precision, max(fitting), ring))
    return plans


def _place(weights: NetworkBytes, precision: WeightPrecision) -> NetworkPlan:
    return _streamed(weights, precision, len(weights.blocks), 0)


def _streamed(
    weights: NetworkBytes, precision: WeightPrecision, num_resident: int, ring_size: int, *, from_disk: bool = False
) -> NetworkPlan:
    """A network with so many resident blocks; with all of them there is no ring, and nothing to read from disk."""
    streamed = streamed_indices(len(weights.blocks), num_resident) if num_resident < len(weights.blocks) else []
    ring_size = min(ring_size, len(streamed))
    on_host = weights.host_outer if streamed else 0
    resident = weights.total - on_host - sum(weights.blocks[index] for index in streamed)
    copied = sum(weights.slots[index] for index in streamed)
    return NetworkPlan(
        precision=precision,
        num_blocks=len(weights.blocks),
        num_resident=num_resident,
        ring_size=ring_size,
        from_disk=from_disk and bool(streamed),
        resident_bytes=resident,
        device_bytes=resident + ring_size * max((weights.slots[index] for index in streamed), default=0),
        streamed_bytes=copied,
        host_bytes=0 if from_disk else copied + on_host,
    )


def weight_format(precision: WeightPrecision) -> WeightFormat | None:
    """The format of a precision, None for plain weights."""
    return next((known for known in FORMATS if known == precision), None)
