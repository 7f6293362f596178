"""The pictures of the templates and of the help pages: `python tests/nodes/pictures.py` makes them anew.

Workflows of the tiny model are run for them; of the others the graph is drawn.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executor import API, Executor
from flux2_kit import NODE_CLASS_MAPPINGS
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.nodes import host
from flux2_kit.nodes.latents import ASPECTS, picture_size
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "example_workflows"
HELP = ROOT / "web" / "docs" / "pictures"
SIDE = 512
"""Of a template's picture, in pixels; the browser of templates shows squares."""
MARGIN = 12
DARK, LIGHT, BLUE = "#1b1e24", "#dfe4ee", "#5b9bd5"
COLORS = {"FLUX2_DIT": "#b39ddb", "FLUX2_AE": "#ff6e6e", "FLUX2_TEXT_ENCODER": "#ffd500", "CONDITIONING": "#ffa931"}
COLORS |= {"LATENT": "#ff9cf9", "IMAGE": "#64b5f6", "INT": "#29b6a8", "STRING": "#77cc77"}

executor = Executor(NODE_CLASS_MAPPINGS)


def main() -> None:
    HELP.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("INPUT", "OUTPUT", "MODELS", "TEMP"):
            setattr(host, f"FALLBACK_{name}_DIR", Path(folder) / name.lower())
        _, (four,) = run("text_to_image_tiny")
        save(TEMPLATES / "text_to_image_tiny.jpg", grid(four, 2))
        save(HELP / "sample.jpg", row(four, 96))

        _, (before, after) = run("reference_edit_tiny")
        save(TEMPLATES / "reference_edit_tiny.jpg", steps([before[0]], after[0]))
        _, (before, changed, inpainted) = run("image_to_image_tiny")
        save(TEMPLATES / "image_to_image_tiny.jpg", ways(before[0], [changed[0], inpainted[0]]))
        save(HELP / "image_to_image.jpg", row([before[0], changed[0], inpainted[0]], 128))
        _, (first, second, after) = run("multi_reference_edit_tiny")
        save(TEMPLATES / "multi_reference_edit_tiny.jpg", steps([first[0], second[0]], after[0]))
        save(HELP / "references.jpg", row([first[0], second[0], after[0]], 128))

        outputs, (curves, _, before, after) = run("train_lora_tiny")
        lora = next(str(value[1]) for value in outputs.values() if len(value) == 5)
        save(TEMPLATES / "train_lora_tiny.jpg", training(before, after, curves[0]))
        save(HELP / "train.jpg", row([*before[:2], *after[:2]], 96))
        (sheet,) = to_pictures(outputs["1"][1])
        save(HELP / "contact_sheet.jpg", shrink(sheet, 640))

        api = read("lora_stack_tiny")
        next(node for node in api.values() if "lora_name" in node["inputs"])["inputs"]["lora_name"] = lora
        _, (before, after) = run("lora_stack_tiny", api)
        save(TEMPLATES / "lora_stack_tiny.jpg", steps([before[0]], after[0]))
    for variant, subtitle in (
        ("klein-4b", "4 steps, Apache-2.0"),
        ("klein-base-9b", "50 steps, CFG 4"),
        ("dev", "structured prompt, 50 steps"),
    ):
        assert variant in VARIANTS
        name = f"text_to_image_{variant}"
        save(TEMPLATES / f"{name}.jpg", graph(name, f"FLUX.2 {variant}", subtitle))
    save(
        TEMPLATES / "low_vram_klein-9b.jpg", graph("low_vram_klein-9b", "Low VRAM", "klein-9b in 8 GiB: fp8, streamed")
    )
    save(TEMPLATES / "native_sampler_tiny.jpg", graph("native_sampler_tiny", "Native nodes", "KSampler on our models"))
    save(HELP / "aspect_ratios.png", aspect_ratios())


def read(name: str) -> API:
    return json.loads((TEMPLATES / "api" / f"{name}.json").read_text(encoding="utf-8"))


def run(name: str, api: API | None = None) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Every node's outputs, and the pictures of the nodes that show some."""
    executor.images = {}
    outputs = executor.run(api or read(name))
    return outputs, [to_pictures(images) for images in executor.images.values()]


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in (images * 255).round().to(torch.uint8).numpy().astype(np.uint8)]


def save(path: Path, image: Image.Image) -> None:
    image.convert("RGB").save(path, **({"quality": 88} if path.suffix == ".jpg" else {"optimize": True}))
    print(path.relative_to(ROOT), image.size, path.stat().st_size)


def blank(width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.new("RGB", (width, height), DARK)


def large(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def shrink(image: Image.Image, width: int) -> Image.Image:
    image = image.crop((0, 0, image.width, min(image.height, image.width)))
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def row(images: list[Image.Image], side: int) -> Image.Image:
    canvas = blank(len(images) * (side + 4) - 4, side)
    for index, image in enumerate(images):
        canvas.paste(large(image, side), (index * (side + 4), 0))
    return canvas


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    side = (SIDE - 4 * (columns - 1)) // columns
    canvas = blank()
    for index, image in enumerate(images):
        canvas.paste(large(image, side), (index % columns * (side + 4), index // columns * (side + 4)))
    return canvas


def steps(before: list[Image.Image], after: Image.Image) -> Image.Image:
    """What there was, small, above what became of it."""
    canvas, small, big = blank(), 144, 312
    left = (SIDE - len(before) * small - (len(before) - 1) * MARGIN) // 2
    for index, image in enumerate(before):
        canvas.paste(large(image, small), (left + index * (small + MARGIN), MARGIN))
    draw, middle = ImageDraw.Draw(canvas), SIDE // 2
    draw.polygon([(middle - 12, 164), (middle + 12, 164), (middle, 180)], fill=LIGHT)
    canvas.paste(large(after, big), ((SIDE - big) // 2, SIDE - big - MARGIN))
    return canvas


def ways(before: Image.Image, after: list[Image.Image]) -> Image.Image:
    """What there was, small, above the several things that became of it."""
    canvas, small = blank(), 200
    big = (SIDE - (len(after) + 1) * MARGIN) // len(after)
    canvas.paste(large(before, small), ((SIDE - small) // 2, MARGIN))
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(after):
        left = MARGIN + index * (big + MARGIN)
        middle = left + big // 2
        draw.polygon([(middle - 12, small + 24), (middle + 12, small + 24), (middle, small + 40)], fill=LIGHT)
        canvas.paste(large(image, big), (left, SIDE - big - MARGIN))
    return canvas


def training(before: list[Image.Image], after: list[Image.Image], curves: Image.Image) -> Image.Image:
    canvas, side = blank(), 120
    for top, images in ((MARGIN, before), (MARGIN + side + 24, after)):
        for index, image in enumerate(images):
            canvas.paste(large(image, side), (MARGIN // 2 + index * (side + 6), top))
    middle = SIDE // 2
    draw = ImageDraw.Draw(canvas)
    draw.polygon([(middle - 10, 137), (middle + 10, 137), (middle, 151)], fill=LIGHT)
    height = SIDE - 2 * side - 60
    plot = curves.resize((round(curves.width * height / curves.height), height), Image.Resampling.LANCZOS)
    plot = plot.crop((0, 0, min(plot.width, SIDE - 2 * MARGIN), height))
    canvas.paste(plot, ((SIDE - plot.width) // 2, SIDE - height - MARGIN))
    return canvas


def graph(name: str, title: str, subtitle: str) -> Image.Image:
    """A title above the nodes of the workflow, where they stand on the page."""
    canvas = blank()
    draw = ImageDraw.Draw(canvas)
    draw.text((SIDE / 2, 84), title, fill=LIGHT, font=ImageFont.load_default(46), anchor="mm")
    draw.text((SIDE / 2, 132), subtitle, fill=BLUE, font=ImageFont.load_default(24), anchor="mm")
    page = json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))
    boxes = [group["bounding"] for group in page["groups"]]
    width = max(x + w for x, _, w, _ in boxes) - boxes[0][0]
    height = max(h for *_, h in boxes)
    scale = min((SIDE - 2 * MARGIN) / width, 300 / height)
    left, top = (SIDE - width * scale) / 2, 176 + (SIDE - 176 - MARGIN - height * scale) / 2

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - boxes[0][0]) * scale, top + (y - boxes[0][1]) * scale

    def box(x: float, y: float, w: float, h: float, fill: str) -> None:
        draw.rounded_rectangle((*place(x, y), *place(x + w, y + h)), 4, fill=fill)

    for bounding in boxes:
        box(*bounding, fill="#262b34")
    nodes = {node["id"]: node for node in page["nodes"]}
    for _, source, _, target, _, kind in page["links"]:
        start, end = nodes[source], nodes[target]
        a = place(start["pos"][0] + start["size"][0], start["pos"][1] + 30)
        b = place(end["pos"][0], end["pos"][1] + 30)
        draw.line((a, b), fill=COLORS.get(kind, LIGHT), width=2)
    for node in page["nodes"]:
        (x, y), (w, h) = node["pos"], node["size"]
        box(x, y - 30, w, h + 30, fill="#4a5364")
        box(x, y - 30, w, 30, fill=BLUE)
    return canvas


def aspect_ratios() -> Image.Image:
    """The shapes at one megapixel, to one scale; they must be readable in a narrow panel."""
    names = [name for name, (wide, high) in ASPECTS.items() if wide >= high]
    columns, width, height, scale = 3, 132, 132, 0.07
    canvas = blank(columns * width, math.ceil(len(names) / columns) * height)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for index, name in enumerate(names):
        wide, high = picture_size(name, 1.0)
        middle, bottom = (index % columns + 0.5) * width, (index // columns + 1) * height
        box = (middle - wide * scale / 2, bottom - 50 - high * scale, middle + wide * scale / 2, bottom - 50)
        draw.rectangle(box, fill=BLUE)
        draw.text((middle, bottom - 36), name, fill=LIGHT, font=font, anchor="mm")
        draw.text((middle, bottom - 15), f"{wide}x{high}", fill=LIGHT, font=font, anchor="mm")
    return canvas


if __name__ == "__main__":
    main()
