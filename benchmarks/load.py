"""Time and peak memory of loading a DiT: `python benchmarks/load.py [--gib 1] [--cold] [--peer diffusers]`.

A checkpoint with klein's widths and as many blocks as fit the size is written, then loaded in a fresh process, which
reads every weight once. Reported are the time from file to the last weight read, and the growth of the resident set
over that of the imported library, per byte of the tensors kept; its limit is 1.15 on a CPU. The peer is diffusers'
`from_pretrained` of the same weights in its own layout; both take turns. ``--cold`` drops the file from the system's
cache before. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import machine_facts

LIMIT = 1.15
REPEATS = 5
HIDDEN = 2048


def small_variant(num_single_blocks: int):
    from flux2_kit.flux2_core.variants import VARIANTS

    klein = VARIANTS["klein-4b"]
    config = replace(
        klein.dit, hidden_size=HIDDEN, num_heads=HIDDEN // 128, num_double_blocks=2, num_single_blocks=num_single_blocks
    )
    return replace(klein, dit=config)


def write_checkpoint(path: Path, gib: float, layout: str, precision: str) -> int:
    """Returns the number of single blocks."""
    import torch
    from flux2_kit.flux2_core.checkpoint import save_dit
    from flux2_kit.flux2_core.dit import Flux2DiT
    from flux2_kit.flux2_core.files import write_safetensors
    from flux2_kit.flux2_core.state_dict import convert

    # A double block has 26 hidden^2 parameters, a single one 13 hidden^2.
    num_single_blocks = max(1, math.ceil((gib * 2**30 / 2 - 2 * 26 * HIDDEN**2) / (13 * HIDDEN**2)))
    variant = small_variant(num_single_blocks)
    with torch.device("meta"):
        dit = Flux2DiT(variant.dit)
    dit = dit.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.02)
    if precision == "bf16":
        save_dit(path, dit, variant, layout)
        return num_single_blocks
    tensors = {}
    for name, tensor in convert(dit.state_dict(), "dit", "bfl", layout).items():
        tensors[name] = tensor
        if "blocks" in name and tensor.dim() == 2:
            tensors[name] = (tensor.float() / 1e-3).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.tensor(1e-3)
    write_safetensors(path, tensors, {"flux2_kit.variant": variant.name})
    return num_single_blocks


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def load_once(side: str, path: Path, num_single_blocks: int, device: str) -> dict[str, float]:
    """Runs in a process of its own; samples the resident set while it loads and reads."""
    load = {"ours": our_loading, "diffusers": diffusers_loading}[side](path, num_single_blocks, device)
    before = peak = resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    parameters = list(load().parameters())
    wait(device)
    loaded = time.perf_counter()
    for parameter in parameters:
        parameter.sum()
    wait(device)
    read = time.perf_counter()
    done.set()
    sampler.join()
    peak = max(peak, resident_bytes())
    kept = sum(parameter.nbytes for parameter in parameters)
    return {"load_s": loaded - start, "read_s": read - loaded, "peak_bytes": peak - before, "tensor_bytes": kept}


def wait(device: str) -> None:
    """Returns when the device is done."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def our_loading(path: Path, num_single_blocks: int, device: str) -> Callable[[], Any]:
    """What loads with this package, which is imported before."""
    import torch
    from flux2_kit.flux2_core.checkpoint import load_dit

    torch.empty(1, device=device)  # CUDA is there, as it is when a program loads its second network
    variant = small_variant(num_single_blocks)
    return lambda: load_dit(path, device=device, variants={variant.name: variant})[0]


def diffusers_loading(path: Path, num_single_blocks: int, device: str) -> Callable[[], Any]:
    """What loads the same weights with diffusers."""
    import diffusers
    import torch

    torch.empty(1, device=device)
    model = diffusers.Flux2Transformer2DModel
    return lambda: model.from_pretrained(path, torch_dtype=torch.bfloat16).to(device)


def write_for_diffusers(folder: Path, source: Path, num_single_blocks: int) -> None:
    """Writes a checkpoint of ours as diffusers' folder of a transformer."""
    import diffusers
    import torch
    from flux2_kit.flux2_core.checkpoint import load_dit
    from flux2_kit.flux2_core.files import write_safetensors
    from flux2_kit.flux2_core.state_dict import convert

    variant = small_variant(num_single_blocks)
    config = variant.dit
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(
            num_layers=config.num_double_blocks,
            num_single_layers=config.num_single_blocks,
            attention_head_dim=sum(config.rope_axes),
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            axes_dims_rope=config.rope_axes,
            guidance_embeds=config.has_guidance_embedder,
        )
    folder.mkdir()
    model.save_config(folder)
    dit, _ = load_dit(source, variants={variant.name: variant})
    tensors = convert(dit.state_dict(), "dit", "bfl", "diffusers")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def drop_from_cache(path: Path) -> None:
    """Lets the system forget a file, or the files of a folder, that it has in memory."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the weights in bf16")
    parser.add_argument("--layout", choices=("bfl", "diffusers", "comfyui"), default="bfl")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="as stored; fp8 is kept as bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cold", action="store_true", help="drop the file from the cache before (Linux)")
    parser.add_argument("--peer", choices=("diffusers",))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, path, number = options.child
        print(json.dumps(load_once(side, Path(path), int(number), options.device)))
        return
    if options.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold needs a system that forgets files when it is told to, such as Linux")

    with tempfile.TemporaryDirectory() as folder:
        paths = {"ours": Path(folder) / "klein-4b.safetensors"}
        num_single_blocks = write_checkpoint(paths["ours"], options.gib, options.layout, options.precision)
        if options.peer:
            paths["diffusers"] = Path(folder) / "transformer"
            write_for_diffusers(paths["diffusers"], paths["ours"], num_single_blocks)
        samples = run_in_turn(options, paths, num_single_blocks)
    limit = LIMIT if options.device == "cpu" else None
    result: dict[str, Any] = {"benchmark": "load", "sides": samples, "limit": limit}
    result |= {name: value for name, value in vars(options).items() if name != "child"}
    ratios = [sample["peak_bytes"] / sample["tensor_bytes"] for sample in samples["ours"]]
    result |= {"ratio_max": max(ratios), "within_limit": limit is None or max(ratios) <= limit}
    result |= {f"{'ours' if side == 'ours' else 'peer'}_ms": median_ms(found) for side, found in samples.items()}
    if options.peer:
        result["ratio"] = result["peer_ms"] / result["ours_ms"]
    print_table(samples)
    print(json.dumps(result | machine_facts()))


def run_in_turn(
    options: argparse.Namespace, paths: dict[str, Path], num_single_blocks: int
) -> dict[str, list[dict[str, float]]]:
    """Every repeat of each side, in processes of their own."""
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in paths}
    for repeat in range(options.repeats + 1):
        for side, path in paths.items():
            if options.cold:
                drop_from_cache(path)
            command = [sys.executable, __file__, "--child", side, str(path), str(num_single_blocks)]
            command += ["--device", options.device]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if repeat:  # the first one brings programs and, unless it is dropped, the file into the cache
                samples[side].append(json.loads(output.splitlines()[-1]))
    return samples


def median_ms(samples: list[dict[str, float]]) -> float:
    """From file to the last weight read."""
    return 1000 * statistics.median(sample["load_s"] + sample["read_s"] for sample in samples)


def print_table(samples: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':12}{'load s':>8}{'read s':>8}{'GB/s':>7}{'peak MiB':>10}{'ratio':>7}")
    for side, found in samples.items():
        for sample in found:
            seconds, kept = sample["load_s"] + sample["read_s"], sample["tensor_bytes"]
            peak = sample["peak_bytes"]
            print(f"{side:12}{sample['load_s']:>8.2f}{sample['read_s']:>8.2f}{kept / seconds / 1e9:>7.2f}", end="")
            print(f"{peak / 2**20:>10.0f}{peak / kept:>7.3f}")
        print(f"{side:12}{'median':>8} {median_ms(found):.0f} ms")


if __name__ == "__main__":
    main()
