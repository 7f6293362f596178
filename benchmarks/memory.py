"""Peak and time of a step within budgets: `python benchmarks/memory.py [--variants klein-9b dev] [--budgets 6 8 12]`.

Random weights, made block by block; each case runs in a process of its own. For every variant: bf16, fp8 and nf4 with
all blocks on the device; fp8 with all of them streamed; what the planner chooses within each budget; the same for a
step of LoRA training; and the autoencoder at once, in strips, and in strips through host memory. Beside the peak stands
the planner's estimate. Cases that do not fit the device are left out. On a CPU it runs the tiny model, without peaks.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from machine import machine_facts

GIB = 2**30
RANK = 32
NUM_WARMUPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", help="default: klein-9b dev, on a CPU tiny")
    parser.add_argument("--budgets", nargs="+", type=float, default=[6.0, 8.0, 12.0, 16.0, 24.0], help="GiB")
    parser.add_argument("--size", type=int, help="side of the picture in pixels; default: the variant's own")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--only", nargs="+", choices=("sample", "train", "decode"), default=["sample", "train", "decode"]
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = torch.device(options.device).type == "cuda"
    variants = options.variants or (["klein-9b", "dev"] if is_gpu else ["tiny"])
    total = torch.cuda.get_device_properties(options.device).total_memory if is_gpu else None
    results = []
    print(f"{'case':58}{'ms':>10}{'peak GiB':>10}{'estimate':>10}{'ratio':>8}")
    for case in [case for variant in variants for case in cases(variant, options)]:
        found = run_case(case, total)
        results.append(case | found)
        print(row(case["name"], found), flush=True)
    measured = [result for result in results if result.get("peak_bytes")]
    worst = max((abs(r["estimate_bytes"] / r["peak_bytes"] - 1) for r in measured), default=None)
    summary = {"benchmark": "memory", "device": options.device, "cases": results, "worst_estimate_error": worst}
    if is_gpu:
        summary["gpu"] = torch.cuda.get_device_name(options.device)
    print(json.dumps(summary | machine_facts()))


def cases(variant: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured of a variant."""
    common = {"variant": variant, "device": options.device, "size": options.size, "repeats": options.repeats}
    found: list[dict[str, Any]] = []
    for kind in [kind for kind in ("sample", "train") if kind in options.only]:
        for precision in ("bf16", "fp8", "nf4"):
            found.append({"name": f"{variant}, {kind}, {precision} resident", "precision": precision, "kind": kind})
        found.append({"name": f"{variant}, {kind}, fp8 streamed", "precision": "fp8", "kind": kind, "streamed": "all"})
        for budget in options.budgets if variant != "tiny" else ():
            name = f"{variant}, {kind}, within {budget:g} GiB"
            found.append({"name": name, "precision": "auto", "kind": kind, "budget": budget})
    if "decode" in options.only:
        for side in (1024, 2048, 4096) if variant != "tiny" else (64, 128):
            for tiling in ("whole", "strips", "host"):
                found.append({"name": f"{variant}, decode {side}x{side}, {tiling}", "kind": "decode", "tiling": tiling})
                found[-1]["side"] = side
    return [common | case for case in found]


def run_case(case: dict[str, Any], total: int | None) -> dict[str, Any]:
    """Measures a case in a new process; says why where it did not run."""
    plan = plan_of(case)
    if isinstance(plan, str):
        return {"skipped": plan}
    if total is not None and plan[1] > 0.95 * total:
        return {"skipped": "larger than the device", "estimate_bytes": plan[1]}
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["no output"])[-1][:200], "estimate_bytes": plan[1]}
    return json.loads(done.stdout.splitlines()[-1])


def plan_of(case: dict[str, Any]) -> Any:
    """The plan of a case and its estimate in bytes; of decoding without a plan; a text where it does not fit."""
    import torch
    from flux2_kit.flux2_core.autoencoder_memory import (
        autoencoder_bytes,
        decoding_bytes,
        host_strip_bytes,
        strip_bytes,
    )
    from flux2_kit.flux2_core.memory import MemoryNeeds, MemoryRequest, plan_memory
    from flux2_kit.flux2_core.variants import get_variant

    variant, is_cuda = get_variant(case["variant"]), torch.device(case["device"]).type == "cuda"
    if case["kind"] == "decode":
        config, side = variant.autoencoder, case["side"]
        count: Callable[..., int] = {
            "whole": decoding_bytes,
            "strips": lambda *args, **kw: strip_bytes(*args, decodes=True, **kw)[0],
            "host": lambda *args, **kw: host_strip_bytes(*args, decodes=True, **kw),
        }[case["tiling"]]
        return None, autoencoder_bytes(config, 2) + count(config, side, side, 2, is_cuda=is_cuda)
    number = variant.dit.num_double_blocks + variant.dit.num_single_blocks
    request = MemoryRequest(
        variant=variant,
        precision=case["precision"],
        needs=MemoryNeeds(
            width=case["size"],
            height=case["size"],
            uses_cfg=False,
            num_images=case.get("batch_size", 1),
            num_streamed=number if case.get("streamed") else None,
        ),
        rank=case.get("rank", RANK) if case["kind"] == "train" else None,
        checkpointing="blocks" if case["kind"] == "train" and not case.get("budget") else "auto",
        uses_text_encoder=False,
        uses_autoencoder=False,
        device_type="cuda" if is_cuda else "cpu",
    )
    try:
        plan = plan_memory(request, round(case["budget"] * GIB) if case.get("budget") else None)
    except ValueError as error:
        return str(error)
    return plan, plan.sampling_bytes


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Median and spread of a step in milliseconds, its peak of device memory, and the estimate of that."""
    import torch

    plan, estimate = plan_of(case)
    is_gpu = torch.device(case["device"]).type == "cuda"
    step = {"sample": sampling_step, "train": training_step, "decode": decoding_step}[case["kind"]](case, plan)
    samples = []
    for repeat in range(NUM_WARMUPS + case["repeats"]):
        if is_gpu:
            torch.cuda.synchronize()
            if repeat == 1:  # after what is made once
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        step()
        if is_gpu:
            torch.cuda.synchronize()
        samples.append(1000 * (time.perf_counter() - begin))
    samples = samples[NUM_WARMUPS:]
    found = {
        "median_ms": statistics.median(samples),
        "fastest_ms": min(samples),
        "slowest_ms": max(samples),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
        "estimate_bytes": estimate,
    }
    if plan is not None:
        from flux2_kit.flux2_core.memory import describe

        found |= {"plan": describe(plan), "num_resident": plan.dit.num_resident, "precision": plan.dit.precision}
    return found


def make_dit(case: dict[str, Any], plan: Any) -> Any:
    """A DiT of random weights, placed by a plan; never as a whole in any memory before."""
    import torch
    from flux2_kit.flux2_core.dit import Flux2DiT
    from flux2_kit.flux2_core.linear import Linear
    from flux2_kit.flux2_core.memory import weight_format
    from flux2_kit.flux2_core.streaming import stream_dit, streamed_indices
    from flux2_kit.flux2_core.variants import get_variant

    device = torch.device(case["device"])
    with torch.device("meta"):
        dit = Flux2DiT(get_variant(case["variant"]).dit).bfloat16().requires_grad_(False).eval()

    def fill(module: Any) -> None:
        module.to_empty(device=device)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1)

    blocks = [*dit.double_blocks, *dit.single_blocks]
    streamed = streamed_indices(len(blocks), plan.dit.num_resident)
    quantised = weight_format(plan.dit.precision)
    with torch.no_grad():
        for name, child in dit.named_children():
            if name not in ("double_blocks", "single_blocks"):
                fill(child)
        for index, block in enumerate(blocks):
            fill(block)
            for layer in block.modules():
                if isinstance(layer, Linear) and quantised:
                    layer.quantise(quantised)
            if index in streamed:
                block.to("cpu")
    if streamed:
        stream_dit(dit, device, num_resident=plan.dit.num_resident, ring_size=plan.dit.ring_size)
    return dit


def make_inputs(case: dict[str, Any], dit: Any) -> dict[str, Any]:
    """Noisy latents and a text embedding, on the device."""
    import torch
    from flux2_kit.flux2_core.variants import get_variant

    variant = get_variant(case["variant"])
    side = (case["size"] or variant.default_size) // 16
    text = torch.randn(1, variant.text_encoder.max_tokens, variant.dit.context_dim, device=dit.device, dtype=dit.dtype)
    return {"latents": torch.randn(1, 128, side, side, device=dit.device), "text": text}


def sampling_step(case: dict[str, Any], plan: Any) -> Callable[[], None]:
    """One forward pass, as the denoise loop makes it."""
    import torch
    from flux2_kit.flux2_core.latents import image_ids, latents_to_tokens, text_ids

    dit = make_dit(case, plan)
    inputs = make_inputs(case, dit)
    side = inputs["latents"].shape[-1]
    tokens = latents_to_tokens(inputs["latents"]).to(dit.dtype)
    ids, words = image_ids(side, side).to(dit.device), text_ids(inputs["text"].shape[1]).to(dit.device)
    sigma = torch.full((1,), 0.5, device=dit.device)
    guidance = torch.full((1,), 4.0, device=dit.device) if dit.config.has_guidance_embedder else None

    @torch.inference_mode()
    def step() -> None:
        dit(tokens, ids, inputs["text"], words, sigma, guidance)

    return step


def training_step(case: dict[str, Any], plan: Any) -> Callable[[], None]:
    """Noise, forward, backward, clipping and AdamW, as `training.lora_recipe` does it."""
    import torch
    from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
    from flux2_kit.training.flow_matching import velocity_losses
    from flux2_kit.training.optimizers import OptimizerConfig, make_optimizer

    dit = make_dit(case, plan)
    dit.checkpointing = plan.checkpointing
    adapters = TrainableAdapters(dit, AdapterConfig(rank=RANK), generator=torch.Generator().manual_seed(0))
    adapters.to(dit.device)
    adapters.attach()
    parameters = list(adapters.parameters())
    optimizer = make_optimizer(adapters.parameter_groups(1e-4), OptimizerConfig())
    inputs = make_inputs(case, dit)
    latents = inputs["latents"]

    def step() -> None:
        noise, sigma = torch.randn_like(latents), torch.rand(1, device=latents.device)
        velocity_losses(dit, latents, inputs["text"], noise, sigma).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding_step(case: dict[str, Any], plan: Any) -> Callable[[], None]:
    """One picture of a random autoencoder in bf16."""
    import torch
    from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
    from flux2_kit.flux2_core.variants import get_variant

    with torch.device(case["device"]):
        autoencoder = Flux2Autoencoder(get_variant(case["variant"]).autoencoder).bfloat16().eval()
    side = case["side"] // 16
    latents = torch.randn(1, autoencoder.config.packed_channels, side, side, device=case["device"])
    store = torch.device("cpu") if case["tiling"] == "host" else None

    @torch.inference_mode()
    def step() -> None:
        if case["tiling"] == "whole":
            autoencoder.decode(latents)
        else:
            autoencoder.decode_tiled(latents, store=store)

    return step


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "skipped" in found:
        return f"{name:58}  {found['skipped']}"
    name += f" ({found['precision']}, {found['num_resident']} resident)" if "within" in name else ""
    estimate, peak = found["estimate_bytes"], found["peak_bytes"]
    columns = f"{name:58}{found['median_ms']:>10.1f}"
    columns += f"{peak / GIB:>10.2f}" if peak else f"{'-':>10}"
    return columns + f"{estimate / GIB:>10.2f}" + (f"{estimate / peak:>8.2f}" if peak else f"{'-':>8}")


if __name__ == "__main__":
    main()
