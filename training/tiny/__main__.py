"""Makes and evaluates the bundled tiny model: ``python -m flux2_kit.training.tiny make|evaluate|sheet``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ...flux2_core.weights import TINY_FOLDER

SHEET_PROMPTS = (
    "a large red circle at the top left on a blue background",
    "a small white star at the bottom right on a purple background",
    "a medium yellow triangle in the center on a green background",
    "a large black ring at the right on an orange background",
    "a small green cross at the top on a white background",
    "a large orange square at the bottom left on a black background",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux2_kit.training.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="train autoencoder, DiT and text encoder, and write the assets")
    make.add_argument(
        "--work_dir", type=Path, required=True, help="training states are kept here; a second run goes on"
    )
    make.add_argument("--output_dir", type=Path, default=TINY_FOLDER, help="where the assets go (default: the package)")
    make.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    evaluate = commands.add_parser("evaluate", help="measure the bundled model on held-out combinations")
    evaluate.add_argument("--cfg_scale", type=float, default=None, help="instead of the variant's default")
    evaluate.add_argument("--num_steps", type=int, default=None, help="instead of the variant's default")
    evaluate.add_argument("--device", default="cpu")
    sheet = commands.add_parser("sheet", help="draw a contact sheet of example prompts")
    sheet.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.command == "make":
        from .make import make_tiny_model

        options.work_dir.mkdir(parents=True, exist_ok=True)
        make_tiny_model(options.work_dir, options.output_dir, torch.device(options.device))
    elif options.command == "evaluate":
        print(json.dumps(evaluate_bundled(options.cfg_scale, options.num_steps, options.device), indent=2))
    else:
        draw_sheet(options.output)
    return 0


def evaluate_bundled(cfg_scale: float | None, num_steps: int | None, device: str) -> dict[str, object]:
    """All figures of the README, by name."""
    from ...flux2_core.pipeline import SamplingConfig, load_pipeline
    from .evaluate import (
        evaluate,
        held_out_combinations,
        held_out_edits,
        held_out_prompts,
        round_trip_psnr,
        short_prompts,
    )

    pipeline = load_pipeline("tiny", dtype=torch.float32, device=device)
    sampling = SamplingConfig(cfg_scale=cfg_scale, num_steps=num_steps)
    tasks = {
        "text_to_image": held_out_prompts(),
        "one_reference": held_out_edits(),
        "two_references": held_out_combinations(),
    }
    figures: dict[str, object] = {"round_trip_psnr_db": round(round_trip_psnr(pipeline.autoencoder), 2)}
    for name, examples in tasks.items():
        figures[name] = asdict(evaluate(pipeline, examples, sampling))
    short = evaluate(pipeline, short_prompts(), sampling)
    figures["short_prompts"] = {"num_pictures": short.num_pictures, "kind": short.kind, "color": short.color}
    return figures


def draw_sheet(path: Path, *, scale: int = 3, gap: int = 6) -> None:
    """One row of generated pictures, and below each of them what one sentence of editing makes of it, as one PNG."""
    from PIL import Image

    from ...flux2_core.files import write_atomically
    from ...flux2_core.pipeline import GenerateRequest, load_pipeline

    edits = (
        "make the circle green",
        "make the background yellow",
        "turn the triangle into a star",
        "move the ring to the left",
        "make the cross large",
        "make the square purple",
    )
    pipeline = load_pipeline("tiny", dtype=torch.float32)
    first = [pipeline.generate(GenerateRequest(prompt=prompt)).images[0] for prompt in SHEET_PROMPTS]
    second = [
        pipeline.generate(GenerateRequest(prompt=edit, references=(image,))).images[0]
        for edit, image in zip(edits, first, strict=True)
    ]
    side = first[0].width * scale
    sheet = Image.new("RGB", (len(first) * (side + gap) + gap, 2 * (side + gap) + gap), "white")
    for row, images in enumerate((first, second)):
        for column, image in enumerate(images):
            place = (gap + column * (side + gap), gap + row * (side + gap))
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), place)
    write_atomically(path, lambda temporary: sheet.save(temporary))


if __name__ == "__main__":
    sys.exit(main())
