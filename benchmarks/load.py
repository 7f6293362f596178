"""Peak memory and time of loading a DiT: `python benchmarks/load.py [--gib 1] [--layout diffusers] [--precision fp8]`.

A checkpoint with klein's widths and as many blocks as fit the size is written, then loaded in a fresh process, which
reads every weight once. Reported is the growth of the resident set over that of the imported library, per byte of the
tensors kept; the limit is 1.15. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

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


def load_once(path: Path, num_single_blocks: int) -> dict[str, float]:
    """Runs in a process of its own; samples the resident set while it loads and reads."""
    from flux2_kit.flux2_core.checkpoint import load_dit

    variant = small_variant(num_single_blocks)
    before = peak = resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    dit, _ = load_dit(path, variants={variant.name: variant})
    loaded = time.perf_counter()
    for parameter in dit.parameters():
        parameter.sum()
    read = time.perf_counter()
    done.set()
    sampler.join()
    peak = max(peak, resident_bytes())
    kept = sum(parameter.nbytes for parameter in dit.parameters())
    return {"load_s": loaded - start, "read_s": read - loaded, "peak_bytes": peak - before, "tensor_bytes": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the weights in bf16")
    parser.add_argument("--layout", choices=("bfl", "diffusers", "comfyui"), default="bfl")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="as stored; fp8 is kept as bf16")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load_once(Path(options.child[0]), int(options.child[1]))))
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "klein-4b.safetensors"
        num_single_blocks = write_checkpoint(path, options.gib, options.layout, options.precision)
        command = [sys.executable, __file__, "--child", str(path), str(num_single_blocks)]
        samples = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(options.repeats)
        ]
    ratios = [sample["peak_bytes"] / sample["tensor_bytes"] for sample in samples]
    print(f"{'run':>4} {'load s':>8} {'read s':>8} {'peak MiB':>9} {'ratio':>6}")
    for index, (sample, ratio) in enumerate(zip(samples, ratios, strict=True)):
        peak = sample["peak_bytes"] / 2**20
        print(f"{index:>4} {sample['load_s']:>8.2f} {sample['read_s']:>8.2f} {peak:>9.0f} {ratio:>6.3f}")
    result = {
        "benchmark": "load",
        "gib": options.gib,
        "layout": options.layout,
        "precision": options.precision,
        "tensor_bytes": samples[0]["tensor_bytes"],
        "ratio_max": max(ratios),
        "limit": LIMIT,
        "within_limit": max(ratios) <= LIMIT,
        "samples": samples,
        **machine_facts(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
