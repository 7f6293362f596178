"""Time from a prompt to a PNG with the bundled tiny model: `python benchmarks/e2e.py [--device cpu] [--threads 2]`.

Reported: import, load, and median and spread of one picture with the variant's default steps after a warm-up. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time

from machine import machine_facts

PROMPT = "a large red circle at the top left on a blue background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    start = time.perf_counter()
    import torch
    from flux2_kit.flux2_core.pipeline import GenerateRequest, load_pipeline

    torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    pipeline = load_pipeline("tiny", device=options.device)
    loaded = time.perf_counter()

    samples = []
    for _ in range(options.repeats + 1):
        begin = time.perf_counter()
        image = pipeline.generate(GenerateRequest(prompt=PROMPT)).images[0]
        image.save(io.BytesIO(), format="PNG")
        samples.append(time.perf_counter() - begin)
    first, samples = samples[0], samples[1:]
    median = statistics.median(samples)
    print(f"import {imported - start:.2f} s, load {loaded - imported:.2f} s, first picture {first:.2f} s")
    print(f"one picture of {pipeline.variant.num_steps} steps: median {median:.3f} s, {min(samples):.3f} to ", end="")
    print(f"{max(samples):.3f} s over {len(samples)} runs")
    result = {
        "benchmark": "e2e",
        "variant": pipeline.variant.name,
        "num_steps": pipeline.variant.num_steps,
        "device": options.device,
        "threads": options.threads,
        "dtype": str(pipeline.dit.dtype),
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_picture_s": first,
        "median_s": median,
        "samples_s": samples,
        **machine_facts(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
