"""Encoding and decoding of a picture: `python benchmarks/ae.py [--size 1024] [--dtype bf16] [--peer diffusers]`.

The autoencoder of FLUX.2 with random weights; the peer, diffusers' AutoencoderKLFlux2, has the same ones. Both take
turns, first encoding, then decoding; peaks of memory are measured before, in a process for each side. ``--tiled`` runs
ours in strips, which give the same numbers, and diffusers in its tiles, which do not. The last line is one JSON object.
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

TASKS = ("encode", "decode")
ENCODER_WIDTHS = {"full": (128, 256, 512, 512), "tiny": (16, 24, 32, 48)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--widths", choices=("full", "tiny"), default="full", help="tiny: a few channels, for CI")
    parser.add_argument("--tiled", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=("diffusers",))
    parser.add_argument("--peak_of", nargs=2, metavar=("SIDE", "TASK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps(peak_gib(options, *options.peak_of)))
        return

    sides = ("ours", *((options.peer,) if options.peer else ()))
    peaks = {(side, task): run_peak(side, task) for side in sides for task in TASKS}
    samples = measure(options, sides)
    result: dict[str, Any] = {
        "benchmark": "ae",
        **{name: value for name, value in vars(options).items() if name != "peak_of"},
    }
    print(f"{'':20}{'ms':>10}{'spread':>20}{'peak GiB':>10}")
    for task in TASKS:
        found: dict[str, Any] = {}
        for side in sides:
            times = samples[side, task]
            median, peak = statistics.median(times), peaks[side, task]
            shown = "-" if peak is None else f"{peak:.2f}"
            print(f"{task:8}{side:12}{median:>10.1f}{f'{min(times):.1f} to {max(times):.1f}':>20}{shown:>10}")
            name = "ours" if side == "ours" else "peer"
            found |= {f"{name}_ms": median, f"{name}_peak_gib": peak, f"{name}_samples_ms": times}
        if options.peer:
            found["ratio"] = found["peer_ms"] / found["ours_ms"]
        result[task] = found
    print(json.dumps(result | machine_facts()))


def measure(options: argparse.Namespace, sides: tuple[str, ...]) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every repeat, by side and task."""
    import torch

    works = {side: make_side(options, side) for side in sides}
    samples: dict[tuple[str, str], list[float]] = {(side, task): [] for side in sides for task in TASKS}
    with torch.inference_mode():
        for task in TASKS:
            for repeat in range(options.repeats + 1):
                for side in sides:
                    begin = time.perf_counter()
                    works[side][task]()
                    if repeat:  # the first one warms up
                        samples[side, task].append(1000 * (time.perf_counter() - begin))
    return samples


def run_peak(side: str, task: str) -> float | None:
    """Peak of one side, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak_of", side, task]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def peak_gib(options: argparse.Namespace, side: str, task: str) -> float | None:
    """GiB with weights: of tensors on a GPU, and otherwise what the process takes on top of the imported libraries."""
    import torch
    from flux2_kit.flux2_core import autoencoder

    if side == "diffusers":
        import diffusers

        assert diffusers.AutoencoderKLFlux2 and autoencoder  # imported, lazily as it is
    before = peak_of_process()
    works = make_side(options, side)
    with torch.inference_mode():
        if torch.device(options.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            works[task]()
            return torch.cuda.max_memory_allocated() / 2**30
        works[task]()
    after = peak_of_process()
    return None if before is None or after is None else after - before


def peak_of_process() -> float | None:
    """Peak resident memory of this process in GiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def make_side(options: argparse.Namespace, side: str) -> dict[str, Callable[[], object]]:
    """Encoding and decoding by one side; each returns when its result is there."""
    import torch
    from flux2_kit.flux2_core.autoencoder import AutoencoderConfig, Flux2Autoencoder, arrange_channels

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    widths = ENCODER_WIDTHS[options.widths]
    config = AutoencoderConfig(
        encoder_widths=widths, decoder_widths=widths, num_norm_groups=32 if options.widths == "full" else 8
    )
    ours = Flux2Autoencoder(config).requires_grad_(False).eval()
    images = (torch.rand(1, 3, options.size, options.size) * 2 - 1).to(device)
    latents = torch.randn(1, config.packed_channels, options.size // 16, options.size // 16, device=device)

    def waits(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    if side == "ours":
        ours.to(device)
        for network in (ours.encoder, ours.decoder):
            network.to(dtype)
        arrange_channels(ours)
        encode, decode = (ours.encode_tiled, ours.decode_tiled) if options.tiled else (ours.encode, ours.decode)
        return {"encode": waits(lambda: encode(images)), "decode": waits(lambda: decode(latents))}

    import diffusers
    from flux2_kit.flux2_core.state_dict import convert

    theirs: Any = diffusers.AutoencoderKLFlux2(
        block_out_channels=widths, norm_num_groups=config.num_norm_groups, layers_per_block=config.num_res_blocks
    ).eval()
    theirs.load_state_dict(convert(ours.state_dict(), "autoencoder", "bfl", "diffusers"), strict=True)
    del ours
    theirs.to(device, dtype).requires_grad_(False)
    if options.tiled:
        theirs.enable_tiling()
    # The unpacked latents; packing and normalising them is the pipeline's work in diffusers, and takes no time.
    unpacked = torch.randn(1, config.latent_channels, options.size // 8, options.size // 8, device=device, dtype=dtype)
    return {
        "encode": waits(lambda: theirs.encode(images.to(dtype)).latent_dist.mode()),
        "decode": waits(lambda: theirs.decode(unpacked).sample.float()),
    }


if __name__ == "__main__":
    main()
