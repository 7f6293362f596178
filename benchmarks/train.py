"""One step of LoRA training: `python benchmarks/train.py [--variant tiny] [--device cpu] [--peer diffusers]`.

Random weights; a step is noise, forward, loss, backward, clipping and AdamW, on cached latents and text. The peer is
diffusers' transformer with PEFT on the same layers, in the same plain precision and of the same sizes, as its training
script runs it: it has no fp8 that trains, no streaming, and compiles where we do. Each side has a process of its own,
so that neither sees the other's memory, and both take their steps in turns, so that a busy machine slows both alike;
`--apart` runs one after the other where a device does not hold both. Beside the peak of all memory stands what a step
takes beyond what is there between steps: activations, gradients, copies. The last line is one JSON object.

On a GPU: `--device cuda --variant klein-9b --peer diffusers`, with `--precision fp8`, `--compile`, `--vram_budget 12`.
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

NUM_WARMUPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--precision", choices=("bf16", "fp8", "nf4"), help="of our base; default: plain, as --dtype")
    parser.add_argument("--size", type=int, help="side of the picture in pixels; default: the variant's own")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--checkpointing", choices=("none", "blocks", "offload"), help="default: blocks on a GPU")
    parser.add_argument("--vram_budget", type=float, help="GiB for our side; what does not fit is streamed")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both sides")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
    parser.add_argument("--repeats", type=int, default=3, help="steps a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=("diffusers",))
    parser.add_argument("--apart", action="store_true", help="one side after the other instead of in turns")
    parser.add_argument("--side", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    names = ["ours", *((options.peer,) if options.peer else ())]
    sides: dict[str, Any] = {}
    for group in [[name] for name in names] if options.apart else [names]:
        sides |= run_sides(group, options.rounds)
    print(f"{'':10}{'ms a step':>12}{'spread':>18}{'pictures/s':>12}{'peak GiB':>10}{'step MiB':>10}{'warm-up s':>11}")
    for side, found in sides.items():
        spread = f"{found['fastest_ms']:.1f} to {found['slowest_ms']:.1f}"
        peak = "-" if found["peak_gib"] is None else f"{found['peak_gib']:.2f}"
        rate = 1000 * options.batch_size / found["median_ms"]
        row = f"{side:10}{found['median_ms']:>12.1f}{spread:>18}{rate:>12.2f}{peak:>10}{found['step_mib']:>10.1f}"
        print(f"{row}{found['warmup_s']:>11.1f}")
    result = {"benchmark": "train", **vars(options), "sides": sides, "ours_ms": sides["ours"]["median_ms"]}
    if options.peer:
        result |= {"peer_ms": sides[options.peer]["median_ms"]}
        result["ratio"] = result["peer_ms"] / result["ours_ms"]
    print(json.dumps(result | machine_facts()))


def run_sides(names: list[str], num_rounds: int) -> dict[str, Any]:
    """Lets sides take turns, each in a process of its own."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    found = {name: answer(process) for name, process in processes.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(num_rounds):
        for name, process in processes.items():
            samples[name] += ask(process, "turn")
    for name, process in processes.items():
        found[name] |= ask(process, "end")
        process.wait()
        found[name] |= {
            "median_ms": statistics.median(samples[name]),
            "fastest_ms": min(samples[name]),
            "slowest_ms": max(samples[name]),
            "samples_ms": samples[name],
        }
    return found


def ask(process: subprocess.Popen[str], what: str) -> Any:
    """What a side answers."""
    assert process.stdin is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    return answer(process)


def answer(process: subprocess.Popen[str]) -> Any:
    """The next JSON line of a side; what else it prints is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("{", "[")):
            return json.loads(line)
    raise SystemExit(f"a side ended early, with exit code {process.wait()}")


def serve(options: argparse.Namespace) -> None:
    """One side: answers every "turn" with times of steps in milliseconds, and "end" with the peaks of memory."""
    import torch

    torch.set_num_threads(options.threads)
    is_gpu = torch.device(options.device).type == "cuda"
    if is_gpu:
        torch.cuda.set_device(options.device)  # whose memory is counted
    options.dtype = options.dtype or ("bf16" if is_gpu else "fp32")
    options.checkpointing = options.checkpointing or ("blocks" if is_gpu else "none")

    def wait() -> None:
        if is_gpu:
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step = {"ours": our_step, "diffusers": diffusers_step}[options.side](options)
    for _ in range(NUM_WARMUPS):
        step()
    wait()
    print(json.dumps({"warmup_s": time.perf_counter() - begin}), flush=True)
    before = 0
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for line in sys.stdin:
        if line.strip() == "end":
            break
        samples = []
        for _ in range(options.repeats):
            wait()
            begin = time.perf_counter()
            step()
            wait()
            samples.append(1000 * (time.perf_counter() - begin))
        print(json.dumps(samples), flush=True)
    if is_gpu:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peaks = {"peak_gib": peak / 2**30, "reserved_gib": reserved / 2**30, "step_mib": (peak - before) / 2**20}
    else:
        peaks = {"peak_gib": peak_of_process(), "step_mib": peak_of_step(step) / 2**20}
    print(json.dumps(peaks), flush=True)


def peak_of_step(step: Callable[[], None]) -> int:
    """Bytes that a step on the CPU has at most beyond what is there before it, by torch's own count."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events: Any = profiled.profiler
    peak = live = 0
    for event in sorted(events.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_of_process() -> float | None:
    """Peak resident memory of this process in GiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def make_inputs(options: argparse.Namespace) -> dict:
    """Cached latents and text of one batch, on the device."""
    import torch
    from flux2_kit.flux2_core.variants import get_variant

    variant = get_variant(options.variant)
    side = (options.size or variant.default_size) // 16
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(options.batch_size, 128, side, side, generator=generator)
    text = torch.randn(
        options.batch_size, variant.text_encoder.max_tokens, variant.dit.context_dim, generator=generator
    )
    return {
        "variant": variant,
        "dtype": dtype,
        "latents": latents.to(options.device),
        "text": text.to(options.device, dtype),
    }


def make_our_dit(options: argparse.Namespace, dtype: Any) -> Any:
    """A DiT of random weights in the precision that is asked for, as a budget places it."""
    import torch
    from flux2_kit.flux2_core.dit import Flux2DiT
    from flux2_kit.flux2_core.variants import get_variant

    if options.precision is None and options.vram_budget is None:
        with torch.device(options.device):
            torch.set_default_dtype(dtype)
            dit = Flux2DiT(get_variant(options.variant).dit).requires_grad_(False)
            torch.set_default_dtype(torch.float32)
        dit.checkpointing = options.checkpointing
        return dit
    if dtype != torch.bfloat16:
        raise SystemExit("--precision and --vram_budget take bf16 activations: give --dtype bf16")
    from memory import make_dit, plan_of

    size = options.size or get_variant(options.variant).default_size
    case = {"variant": options.variant, "device": options.device, "size": size, "kind": "train"}
    case |= {"precision": options.precision or "auto", "budget": options.vram_budget}
    case |= {"batch_size": options.batch_size, "rank": options.rank}
    found = plan_of(case)
    if isinstance(found, str):
        raise SystemExit(found)
    plan, _ = found
    dit = make_dit(case, plan)
    dit.checkpointing = plan.checkpointing if options.vram_budget else options.checkpointing
    return dit


def our_step(options: argparse.Namespace) -> Callable[[], None]:
    """A step as `training.lora_recipe` takes it."""
    import torch
    from flux2_kit.training.adapters import AdapterConfig, TrainableAdapters
    from flux2_kit.training.flow_matching import training_attention, velocity_losses
    from flux2_kit.training.optimizer_step import GuardedStep
    from flux2_kit.training.optimizers import OptimizerConfig, make_optimizer

    inputs = make_inputs(options)
    dit = make_our_dit(options, inputs["dtype"])
    adapters = TrainableAdapters(dit, AdapterConfig(rank=options.rank), generator=torch.Generator().manual_seed(0))
    adapters.to(dit.device)
    adapters.attach()
    if options.compile:
        from flux2_kit.flux2_core.compilation import compile_blocks

        compile_blocks(dit)
    parameters = list(adapters.parameters())
    optimizer = make_optimizer(adapters.parameter_groups(1e-4), OptimizerConfig())
    end_step = GuardedStep(optimizer, parameters, 1.0, None, fp16=False)
    latents = inputs["latents"]
    num_tokens = latents.shape[-2] * latents.shape[-1] + inputs["text"].shape[1]

    def step() -> None:
        noise = torch.randn_like(latents)
        sigma = torch.rand(options.batch_size, device=latents.device)
        with adapters.cast_once(dit.dtype), training_attention(dit, num_tokens):
            loss = velocity_losses(dit, latents, inputs["text"], noise, sigma).mean()
            end_step.backward(loss)
        end_step(loss.detach())

    return step


def diffusers_step(options: argparse.Namespace) -> Callable[[], None]:
    """The same with diffusers and PEFT, as their training script does it."""
    import diffusers
    import peft
    import torch
    from flux2_kit.flux2_core.latents import image_ids, text_ids

    inputs = make_inputs(options)
    config = inputs["variant"].dit
    with torch.device(options.device):
        torch.set_default_dtype(inputs["dtype"])
        model = diffusers.Flux2Transformer2DModel(
            num_layers=config.num_double_blocks,
            num_single_layers=config.num_single_blocks,
            attention_head_dim=sum(config.rope_axes),
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            axes_dims_rope=config.rope_axes,
            guidance_embeds=config.has_guidance_embedder,
        ).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    if options.checkpointing != "none":
        model.enable_gradient_checkpointing()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    ]
    model.add_adapter(peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if options.compile:
        model.compile_repeated_blocks(dynamic=True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    latents = inputs["latents"]
    device, side = latents.device, latents.shape[-1]
    ids, words = image_ids(side, side).to(device), text_ids(inputs["text"].shape[1]).to(device)
    guidance = torch.ones(options.batch_size, device=device) if config.has_guidance_embedder else None
    tokens = latents.flatten(2).transpose(1, 2)

    def step() -> None:
        noise = torch.randn_like(tokens)
        sigma = torch.rand(options.batch_size, device=device)
        noisy = (1 - sigma[:, None, None]) * tokens + sigma[:, None, None] * noise
        with torch.autocast(device.type, inputs["dtype"], enabled=inputs["dtype"] != torch.float32):
            velocity = model(
                hidden_states=noisy.to(inputs["dtype"]),
                encoder_hidden_states=inputs["text"],
                timestep=sigma,
                img_ids=ids,
                txt_ids=words,
                guidance=guidance,
                return_dict=False,
            )[0]
        torch.nn.functional.mse_loss(velocity.float(), noise - tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
