"""One forward of the DiT and one denoise loop: `python benchmarks/dit.py --variant tiny --device cpu --peer diffusers`.

Random weights, the same ones on both sides; text as long as the variant takes it. The denoise loop has the variant's
steps and guidance, without text encoder and autoencoder; the peer's is that of its pipeline: transformer and scheduler,
both halves of guidance one after the other, and for dev, which embeds guidance, one. Its transformer runs in the plain
type, in eager mode or with compile_repeated_blocks (--peer_compile), whatever precision ours has.

Both sides run in one process, in turns (A B A B ...), so that what else the machine does falls on both. Peaks are those
of tensors on a GPU, beside the weights; on a CPU they are not measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from machine import machine_facts

DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "nf4": "bfloat16", "fp32": "float32"}
"""The plain type beside each precision."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--size", type=int, help="side of picture and references in pixels; default: the variant's own")
    parser.add_argument("--references", type=int, default=0)
    parser.add_argument(
        "--num_steps", type=int, help="of the denoise loop; 0 leaves it out; default: the variant's own"
    )
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true", help="of our blocks")
    parser.add_argument("--peer_compile", action="store_true", help="of the peer's blocks")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=("diffusers",))
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    is_gpu = torch.device(options.device).type == "cuda"
    options.precision = options.precision or ("bf16" if is_gpu else "fp32")
    with torch.inference_mode():
        result = measure(options, is_gpu)
    print(json.dumps({"benchmark": "dit", **vars(options), **result, **machine_facts()}))


def measure(options: argparse.Namespace, is_gpu: bool) -> dict[str, Any]:
    """Times both sides, prints the table, and gives what the JSON object says."""
    inputs = make_inputs(options)
    dit = our_dit(options, inputs)
    works: dict[str, dict[str, Callable[[], Any]]] = {"ours": our_work(dit, inputs)}
    if options.peer:
        works[options.peer] = peer_work(peer_model(options, inputs, dit), inputs)
    if options.precision in ("fp8", "nf4"):
        quantise(dit, options.precision)
    result: dict[str, Any] = {"variant_steps": inputs["num_steps"]}
    print(f"{'':22}{'median ms':>12}{'spread':>22}{'first ms':>12}{'peak GiB':>10}")
    for kind in ("forward", "denoise"):
        if kind == "denoise" and not inputs["num_steps"]:
            continue
        repeats = options.repeats if kind == "forward" else max(3, options.repeats // 4)
        found = alternate({side: work[kind] for side, work in works.items()}, repeats, is_gpu)
        for side, row in found.items():
            spread = f"{row['fastest_ms']:.2f} to {row['slowest_ms']:.2f}"
            peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            name = f"{side}, {kind}"
            print(f"{name:22}{row['median_ms']:>12.2f}{spread:>22}{row['first_ms']:>12.1f}{peak:>10}")
        summary: dict[str, Any] = {"sides": found, "ours_ms": found["ours"]["median_ms"]}
        if options.peer:
            summary["peer_ms"] = found[options.peer]["median_ms"]
            summary["ratio"] = summary["peer_ms"] / summary["ours_ms"]
            ours, theirs = (work[kind]().double() for work in works.values())
            summary["distance"] = float((ours - theirs).norm() / theirs.norm())
            print(f"{kind}: ours is {summary['ratio']:.2f} times as fast, results differ by {summary['distance']:.1e}")
        result[kind] = summary
    # What a person waits for stands at the top: the loop where it was run.
    result |= {key: value for key, value in result.get("denoise", result["forward"]).items() if key != "sides"}
    if options.peer:
        import diffusers

        result["diffusers"] = diffusers.__version__
    return result


def alternate(works: dict[str, Callable[[], Any]], repeats: int, is_gpu: bool) -> dict[str, dict[str, Any]]:
    """Runs all sides in turns; the first call of each is told apart, and one more warms up."""
    import torch

    samples: dict[str, list[float]] = {side: [] for side in works}
    peaks: dict[str, float | None] = dict.fromkeys(works)
    for _ in range(repeats + 2):
        for side, work in works.items():
            if is_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                work()
                end.record()
                end.synchronize()
                samples[side].append(begin.elapsed_time(end))
                peaks[side] = (torch.cuda.max_memory_allocated() - before) / 2**30
            else:
                start = time.perf_counter()
                work()
                samples[side].append(1000 * (time.perf_counter() - start))
    return {
        side: {
            "median_ms": statistics.median(values[2:]),
            "fastest_ms": min(values[2:]),
            "slowest_ms": max(values[2:]),
            "first_ms": values[0],
            "peak_gib": peaks[side],
            "samples_ms": values[2:],
        }
        for side, values in samples.items()
    }


def make_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """Noise, text and references on the device, and what the variant says about sampling."""
    import torch
    from flux2_kit.flux2_core.latents import image_ids, latents_to_tokens, reference_tokens, text_ids
    from flux2_kit.flux2_core.schedule import sigma_schedule
    from flux2_kit.flux2_core.variants import get_variant

    variant = get_variant(options.variant)
    dtype = getattr(torch, DTYPES[options.precision])
    side = (options.size or variant.default_size) // 16
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, as_type: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(options.device, as_type)

    noise = random(1, 128, side, side, as_type=torch.float32)
    references = [random(1, 128, side, side) for _ in range(options.references)]
    tokens, ids = latents_to_tokens(noise).to(dtype), image_ids(side, side)
    if references:
        extra, extra_ids = reference_tokens(references)
        tokens, ids = torch.cat((tokens, extra), dim=1), torch.cat((ids, extra_ids))
    num_text = variant.text_encoder.max_tokens
    num_steps = variant.num_steps if options.num_steps is None else options.num_steps
    return {
        "variant": variant,
        "dtype": dtype,
        "device": options.device,
        "noise": noise,
        "references": references,
        "tokens": tokens,
        "ids": ids.to(options.device),
        "text": random(1, num_text, variant.dit.context_dim),
        "negative": random(1, num_text, variant.dit.context_dim),
        "text_ids": text_ids(num_text).to(options.device),
        "guidance": variant.guidance,
        "num_steps": num_steps,
        "sigmas": sigma_schedule(num_steps, side * side) if num_steps else None,
    }


def our_dit(options: argparse.Namespace, inputs: dict[str, Any]) -> Any:
    """Ours with random weights in the plain type."""
    import torch
    from flux2_kit.flux2_core.acceleration import Acceleration, accelerate
    from flux2_kit.flux2_core.dit import Flux2DiT

    with torch.inference_mode(False), torch.device(options.device):
        torch.manual_seed(0)
        torch.set_default_dtype(inputs["dtype"])
        dit = Flux2DiT(inputs["variant"].dit).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    accelerate(dit, Acceleration(attention=options.attention, compile=options.compile))
    return dit


def quantise(dit: Any, precision: str) -> None:
    """Quantises the Linears of the blocks, after the peer took the weights."""
    from flux2_kit.flux2_core.linear import Linear

    for block in dit.blocks:
        for layer in block.modules():
            if isinstance(layer, Linear):
                layer.quantise(precision)  # pyright: ignore[reportArgumentType]


def our_work(dit: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A forward pass as it is within a generation, and a generation."""
    import torch
    from flux2_kit.flux2_core.sampling import denoise

    variant, guidance = inputs["variant"], inputs["guidance"]
    sigma = torch.full((1,), 0.7, device=inputs["device"])
    vector = None if guidance is None else torch.full((1,), guidance, device=inputs["device"])
    prepared = dit.prepare(inputs["ids"], inputs["text"], inputs["text_ids"], vector)

    def loop() -> Any:
        return denoise(
            dit,
            inputs["noise"],
            inputs["text"],
            inputs["sigmas"],
            references=inputs["references"],
            guidance=guidance,
            cfg_scale=variant.cfg_scale,
            negative_text=inputs["negative"] if variant.cfg_scale != 1 else None,
        )

    return {"forward": lambda: dit.velocity(inputs["tokens"], sigma, prepared), "denoise": loop}


def peer_model(options: argparse.Namespace, inputs: dict[str, Any], dit: Any) -> Any:
    """diffusers' transformer with our weights, in the same memory where they are laid out alike."""
    import diffusers
    import torch
    from flux2_kit.flux2_core.state_dict import convert

    config = inputs["variant"].dit
    with torch.inference_mode(False), torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(
            num_layers=config.num_double_blocks,
            num_single_layers=config.num_single_blocks,
            attention_head_dim=sum(config.rope_axes),
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            axes_dims_rope=config.rope_axes,
            guidance_embeds=config.has_guidance_embedder,
        ).eval()
        model.load_state_dict(convert(dit.state_dict(), "dit", "bfl", "diffusers"), assign=True)
    if options.peer_compile:
        model.compile_repeated_blocks(fullgraph=True)
    return model.requires_grad_(False)


def peer_work(model: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A forward pass, and the loop of diffusers' pipelines with their scheduler."""
    import diffusers
    import torch

    device, dtype, variant = inputs["device"], inputs["dtype"], inputs["variant"]
    num_tokens = inputs["noise"].shape[2] * inputs["noise"].shape[3]
    guidance = None if inputs["guidance"] is None else torch.full((1,), inputs["guidance"], device=device)
    extra = inputs["tokens"][:, num_tokens:]

    def forward(tokens: torch.Tensor, text: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=level,
            img_ids=inputs["ids"],
            txt_ids=inputs["text_ids"],
            guidance=guidance,
            return_dict=False,
        )[0]

    def loop() -> torch.Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
        scheduler.set_timesteps(sigmas=inputs["sigmas"][:-1].float().numpy(), device=device)
        state = inputs["noise"].flatten(2).transpose(1, 2).to(dtype)
        for level in scheduler.timesteps:
            tokens = torch.cat((state, extra), dim=1) if extra.shape[1] else state
            sigma = level.expand(1).to(dtype) / 1000
            velocity = forward(tokens, inputs["text"], sigma)[:, :num_tokens]
            if variant.cfg_scale != 1:
                negative = forward(tokens, inputs["negative"], sigma)[:, :num_tokens]
                velocity = negative + variant.cfg_scale * (velocity - negative)
            state = scheduler.step(velocity, level, state, return_dict=False)[0]
        return state.transpose(1, 2).unflatten(2, inputs["noise"].shape[2:])

    sigma = torch.full((1,), 0.7, device=device)
    return {"forward": lambda: forward(inputs["tokens"], inputs["text"], sigma), "denoise": loop}


if __name__ == "__main__":
    main()
