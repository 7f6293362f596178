"""The planner: which weights stay on the device, in which precision, within a budget of bytes (pure functions).

The order of preference follows measurements (one picture of 1024x1024 with the 9B model on an H200; a step takes 165 ms
with bf16 weights on the device, 159 ms with fp8 weights there, and at least 155 ms, the time of the copies, with fp8
weights that are all streamed; bf16 weights take twice as long to copy, nf4 has to be multiplied out for every product):

1. the file's own precision, all on the device: nothing is lost;
2. fp8, as many blocks on the device as fit, the others streamed from host memory beside the computation;
3. the file's own weights, streamed: from host memory, and from the file where that is short too;
4. nf4, which is less exact, where nothing else fits.

A precision that is asked for is not changed: only how much of it stays on the device. The text encoder runs once a
prompt, so streaming costs it a fraction of a second: "auto" keeps its precision. Where it does not fit beside the DiT,
all of it is streamed, and the DiT stays: what leaves for another network and comes back is copied twice. Of all that
fits, the plan with the least `MemoryPlan.delay_seconds` is taken, so that more memory is never slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from .device_memory import GIB
from .memory_estimates import TrainingMode
from .memory_request import (
    AutoencoderPrecision,
    FileFacts,
    MemoryNeeds,
    MemoryPlan,
    MemoryRequest,
    NetworkPlan,
    PlainPrecision,
    PlanPrecision,
    WeightPrecision,
)
from .memory_stages import DoesNotFit, Stages, weight_format
from .reference_memory import Place

__all__ = [
    "GIB",
    "AutoencoderPrecision",
    "FileFacts",
    "MemoryNeeds",
    "MemoryPlan",
    "MemoryRequest",
    "NetworkPlan",
    "PlainPrecision",
    "PlanPrecision",
    "WeightPrecision",
    "describe",
    "in_words",
    "least_plan",
    "plan_memory",
    "plan_text_encoder",
    "weight_format",
]


def plan_memory(request: MemoryRequest, budget_bytes: int | None, host_bytes: int | None = None) -> MemoryPlan:
    """The fastest way to run within a budget, see the top of this file.

    Args:
        budget_bytes: what tensors may take on the device; None: as much as there is need for.
        host_bytes: free host memory; None: enough.

    Raises:
        ValueError: it cannot be done; says the least that works.
    """
    slow: MemoryPlan | None = None
    for precision, only_resident, disk in _candidates(request):
        for checkpointing in _checkpointing_modes(request):
            tried = [Stages(request, precision, checkpointing, place) for place in _places(request)]
            plans = [
                stages.plan(budget_bytes, host_bytes, only_resident=only_resident, from_disk=disk) for stages in tried
            ]
            plan = min((plan for plan in plans if plan), key=lambda plan: plan.delay_seconds, default=None)
            if plan is None:
                continue
            if only_resident and plan.is_slow:
                slow = slow or plan
                continue
            # Exact weights that leave too little space for pictures give way to smaller ones that leave enough.
            is_faster = precision == "fp8" and not plan.is_slow
            return plan if slow is None or is_faster else slow
    if slow is not None:
        return slow
    raise ValueError(_refusal(request, budget_bytes, host_bytes))


def plan_text_encoder(request: MemoryRequest, budget_bytes: int | None, host_bytes: int | None = None) -> NetworkPlan:
    """The text encoder alone, of a request that uses it; as `plan_memory`."""
    stages = Stages(replace(request, rank=None), "bf16", None)
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
    # Activations of plain weights are smaller than those of fp8: they may fit where fp8 does not.
    yield file.precision, False, False
    if file.can_stream:
        yield file.precision, False, True
    yield "nf4", False, False


def _checkpointing_modes(request: MemoryRequest) -> tuple[TrainingMode | None, ...]:
    if request.rank is None:
        return (None,)
    if request.checkpointing != "auto":
        return (request.checkpointing,)
    # Streamed blocks do not stay on the device for the backward pass.
    keeps_activations = request.variant.name == "tiny" and not request.needs.num_streamed
    return ("none", "blocks") if keeps_activations else ("blocks", "offload")


def _places(request: MemoryRequest) -> tuple[Place | None, ...]:
    """Where a cache of references may go, the faster first."""
    if request.reference_cache == "off":
        return (None,)
    return ("device",) if request.device_type == "cpu" else ("device", "host")


def least_plan(request: MemoryRequest) -> MemoryPlan | None:
    """The plan that takes the least of the device, with enough host memory; in the precision that is asked for."""
    plans: list[MemoryPlan] = []
    for precision, only_resident, disk in _candidates(request):
        for checkpointing, place in product(_checkpointing_modes(request), _places(request)):
            stages = Stages(request, precision, checkpointing, place)
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
