"""Makes and evaluates the bundled tiny model, and LoRAs of a style: ``python -m flux2_kit.training.tiny --help``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from ...flux2_core.files import write_atomically
from ...flux2_core.weights import TINY_FOLDER
from .pictures import NUM_HELD_OUT_SCENES

SHEET_PROMPTS = (
    "a large red circle at the top left on a blue background",
    "a small white star at the bottom right on a purple background",
    "a medium yellow triangle in the center on a green background",
    "a large black ring at the right on an orange background",
    "a small green cross at the top on a white background",
    "a large orange square at the bottom left on a black background",
)

NUM_SHOWN = 12
"""Pictures in a row of a style's sheet."""


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
    dataset = commands.add_parser("style-dataset", help="write a dataset of a style that the model does not know")
    dataset.add_argument("output", type=Path, help="folder; its dataset.toml goes to `flux2 cache` and `flux2 train`")
    dataset.add_argument("--edit", action="store_true", help="pairs of a plain reference and the picture in the style")
    style = commands.add_parser("evaluate-style", help="measure a LoRA of the style on held-out scenes")
    style.add_argument("--lora", type=Path, help="default: the model without a LoRA")
    style.add_argument("--edit", action="store_true", help="edits of plain references, not prompts")
    style.add_argument("--num_pictures", type=int, default=NUM_HELD_OUT_SCENES, help="at most; default: %(default)s")
    style.add_argument("--sheet", type=Path, help="draw the first pictures without and with the LoRA, as PNG")
    style.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.command == "make":
        from .make import make_tiny_model

        options.work_dir.mkdir(parents=True, exist_ok=True)
        make_tiny_model(options.work_dir, options.output_dir, torch.device(options.device))
    elif options.command == "evaluate":
        print(json.dumps(evaluate_bundled(options.cfg_scale, options.num_steps, options.device), indent=2))
    elif options.command == "style-dataset":
        from .style_dataset import write_edit_dataset, write_style_dataset

        print((write_edit_dataset if options.edit else write_style_dataset)(options.output))
    elif options.command == "evaluate-style":
        print(json.dumps(evaluate_lora(options), indent=2))
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


def evaluate_lora(options: argparse.Namespace) -> dict[str, object]:
    """Shares of held-out pictures that are in the style and show what was asked for, by name."""
    from ...flux2_core.images import tensor_to_images
    from ...flux2_core.lora import LoraSetting, apply_loras
    from ...flux2_core.lora_files import read_lora
    from ...flux2_core.pipeline import SamplingConfig, load_pipeline
    from .evaluate import generate_batch
    from .pictures import draw_scenes
    from .styles import evaluate_style, held_out_style_edits, held_out_styled_prompts

    examples = (held_out_style_edits() if options.edit else held_out_styled_prompts())[: options.num_pictures]
    shown = examples[:NUM_SHOWN]
    pipeline = load_pipeline("tiny", dtype=torch.float32, device=options.device)

    def generate() -> list[Image.Image]:
        with torch.inference_mode():
            pictures = generate_batch(pipeline, shown, SamplingConfig(num_images=len(shown)))
        return tensor_to_images(pictures * 2 - 1)

    rows = [generate()] if options.sheet else []
    if options.sheet and options.edit:
        rows.insert(0, tensor_to_images(draw_scenes([example.references[0] for example in shown]) * 2 - 1))
    if options.lora is not None:
        apply_loras(pipeline.dit, [LoraSetting(lora=read_lora(options.lora, pipeline.variant.dit))])
        rows += [generate()] if options.sheet else []
    if options.sheet:
        write_rows(options.sheet, rows)
    return asdict(evaluate_style(pipeline, examples))


def draw_sheet(path: Path) -> None:
    """One row of generated pictures, and below each of them what one sentence of editing makes of it, as one PNG."""
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
    write_rows(path, (first, second))


def write_rows(path: Path, rows: Sequence[Sequence[Image.Image]], *, scale: int = 3, gap: int = 6) -> None:
    """Rows of pictures of one size as one PNG."""
    side = rows[0][0].width * scale
    sheet = Image.new("RGB", (len(rows[0]) * (side + gap) + gap, len(rows) * (side + gap) + gap), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            place = (gap + column * (side + gap), gap + row * (side + gap))
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), place)
    write_atomically(path, lambda temporary: sheet.save(temporary))


if __name__ == "__main__":
    sys.exit(main())
