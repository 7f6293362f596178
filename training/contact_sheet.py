"""A picture of a dataset as it will be trained, one block for every bucket."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..flux2_core.autoencoder import AutoencoderConfig
from ..flux2_core.images import load_image, open_picture, to_rgb
from .buckets import cover_scale, fit_control, fit_mask, fit_target
from .dataset import Dataset, DatasetItem

SHEET_WIDTH = 1600
THUMBNAIL_SIDE = 208
"""A target has the area of a square of this side, in pixels of the sheet."""
GAP = 12
LINE_HEIGHT = 16
HEADING_SIZE = 15
HEADING_HEIGHT = 34
CAPTION_LINES = 4
MAX_PICTURES = 240
MAX_BUCKETS = 60
MAX_PER_BUCKET = 14
BACKGROUND, INK, FAINT, FRAME = (24, 24, 26), (235, 235, 235), (160, 160, 165), (255, 196, 0)
SHADE = 0.72
"""How far the parts that are cropped off are darkened."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    picture: Image.Image
    lines: tuple[str, ...]
    faint: str


def draw_contact_sheet(
    dataset: Dataset, *, reference_sides: tuple[int, int] = AutoencoderConfig.reference_sides
) -> Image.Image:
    """Draws pictures of every bucket with caption, references and mask, RGB, 1600 px wide.

    What is trained is framed; what is cropped off is dark. Of large buckets some pictures are shown, evenly chosen.

    Args:
        dataset: as it was listed.
        reference_sides: of the autoencoder's config: how references are scaled.

    Raises:
        ValueError: a picture cannot be read.
    """
    groups: dict[tuple[int, tuple[int, int]], list[DatasetItem]] = defaultdict(list)
    for item in dataset.items:
        groups[item.subset, item.bucket].append(item)
    shown = sorted(groups.items(), key=lambda pair: (pair[0][0], -len(pair[1]), pair[0][1]))
    per_bucket = max(1, min(MAX_PER_BUCKET, MAX_PICTURES // max(len(shown), 1)))
    blocks: list[Image.Image] = []
    for (subset, bucket), items in shown[:MAX_BUCKETS]:
        chosen = _choose(items, per_bucket)
        count = f"{len(items)} picture{'s' if len(items) > 1 else ''}"
        heading = f"{dataset.config.subsets[subset].place.name}: {bucket[0]}x{bucket[1]}, {count}"
        if len(chosen) < len(items):
            heading += f", {len(chosen)} shown"
        blocks.append(_draw_block(heading, [_draw_item(dataset, item, reference_sides) for item in chosen]))
    if len(shown) > MAX_BUCKETS:
        blocks.append(_draw_block(f"and {len(shown) - MAX_BUCKETS} more buckets", []))
    shelves = _shelves(blocks)
    heights = [max(block.height for block in shelf) for shelf in shelves]
    sheet = Image.new("RGB", (SHEET_WIDTH, sum(heights) + GAP), BACKGROUND)
    top = 0
    for shelf, height in zip(shelves, heights, strict=True):
        left = 0
        for block in shelf:
            sheet.paste(block, (left, top))
            left += block.width
        top += height
    return sheet


def _shelves(blocks: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Blocks side by side as far as they fit, in their order."""
    shelves: list[list[Image.Image]] = []
    room = 0
    for block in blocks:
        if block.width > room:
            shelves.append([])
            room = SHEET_WIDTH
        shelves[-1].append(block)
        room -= block.width
    return shelves


def _choose(items: Sequence[DatasetItem], count: int) -> list[DatasetItem]:
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _draw_item(dataset: Dataset, item: DatasetItem, reference_sides: tuple[int, int]) -> _Cell:
    subset = dataset.config.subsets[item.subset]
    target = _draw_target(load_image(item.image), item.bucket)
    parts = [(target, "")]
    for number, path in enumerate(item.references, start=1):
        fitted = fit_control(
            load_image(path),
            subset,
            bucket=item.bucket,
            num_references=len(item.references),
            reference_sides=reference_sides,
        )
        parts.append((_thumbnail(fitted), f"image {number}"))
    if item.mask is not None:
        with open_picture(item.mask) as mask:
            parts.append((_thumbnail(to_rgb(fit_mask(mask, item.bucket))), "mask"))
    height = max(part.height for part, _ in parts)
    width = sum(part.width for part, _ in parts) + GAP // 2 * (len(parts) - 1)
    scale = min(1, (SHEET_WIDTH - 3 * GAP) / width)
    row = Image.new("RGB", (width, height), BACKGROUND)
    draw, left = ImageDraw.Draw(row), 0
    for part, label in parts:
        row.paste(part, (left, 0))
        if label:
            _draw_label(draw, label, left)
        left += part.width + GAP // 2
    if scale < 1:
        row = row.resize((round(width * scale), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    notes = [item.name, f"{item.size[0]}x{item.size[1]}"]
    notes += ["validation"] if item.is_validation else []
    caption = item.captions[0] if item.captions[0] else "(no caption)"
    room = max(row.width, THUMBNAIL_SIDE)
    return _Cell(picture=row, lines=_wrap(caption, room, CAPTION_LINES), faint=_wrap(", ".join(notes), room, 1)[0])


def _draw_target(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """The whole picture, dark where it is cropped off, with what is trained framed in it."""
    trained = _thumbnail(fit_target(image, bucket))
    scale = cover_scale(image.size, bucket) * trained.width / bucket[0]
    size = max(trained.width, round(image.width * scale)), max(trained.height, round(image.height * scale))
    whole = image.resize(size, Image.Resampling.LANCZOS)
    whole = Image.blend(whole, Image.new("RGB", size, BACKGROUND), SHADE)
    left, top = (size[0] - trained.width) // 2, (size[1] - trained.height) // 2
    whole.paste(trained, (left, top))
    if size != trained.size:
        edges = (left, top, left + trained.width - 1, top + trained.height - 1)
        ImageDraw.Draw(whole).rectangle(edges, outline=FRAME)
    return whole


def _thumbnail(image: Image.Image) -> Image.Image:
    scale = THUMBNAIL_SIDE / math.sqrt(image.width * image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, left: int) -> None:
    width = _font(12).getlength(text)
    draw.rectangle((left, 0, left + width + 8, LINE_HEIGHT + 2), fill=BACKGROUND)
    draw.text((left + 4, 1), text, font=_font(12), fill=INK)


def _draw_block(heading: str, cells: Sequence[_Cell]) -> Image.Image:
    """A heading over cells in rows."""
    rows: list[list[_Cell]] = []
    left = SHEET_WIDTH  # so that the first cell begins a row
    for cell in cells:
        if left + _cell_width(cell) + GAP > SHEET_WIDTH - GAP:
            rows.append([])
            left = GAP
        rows[-1].append(cell)
        left += _cell_width(cell) + GAP
    heights = [max(cell.picture.height + (len(cell.lines) + 1) * LINE_HEIGHT for cell in row) + 2 * GAP for row in rows]
    heading = _wrap(heading, SHEET_WIDTH - 4 * GAP, 1, HEADING_SIZE)[0]
    widths = [sum(_cell_width(cell) + GAP for cell in row) for row in rows]
    widths.append(math.ceil(_font(HEADING_SIZE).getlength(heading)) + 2 * GAP)
    block = Image.new("RGB", (max(widths) + GAP, HEADING_HEIGHT + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(block)
    draw.text((GAP, GAP), heading, font=_font(HEADING_SIZE), fill=FRAME)
    top = HEADING_HEIGHT + GAP // 2
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for cell in row:
            block.paste(cell.picture, (left, top))
            line_top = top + cell.picture.height + 3
            for text, color in [(cell.faint, FAINT), *((line, INK) for line in cell.lines)]:
                draw.text((left, line_top), text, font=_font(12), fill=color)
                line_top += LINE_HEIGHT
            left += _cell_width(cell) + GAP
        top += height
    return block


def _cell_width(cell: _Cell) -> int:
    return max(cell.picture.width, THUMBNAIL_SIDE)


def _wrap(text: str, width: int, max_lines: int, font_size: int = 12) -> tuple[str, ...]:
    """Lines no wider than ``width`` pixels; the last ends in an ellipsis where text is left out."""
    font = _font(font_size)
    words = text.split()
    lines = [""]
    for word in words:
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        # Words wider than a line, and scripts without spaces, break anywhere.
        for sign in word:
            if lines[-1] and font.getlength(lines[-1] + sign) > width:
                lines.append("")
            lines[-1] += sign
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last + "…"]
    return tuple(lines)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with more than Latin letters, which matplotlib brings; else Pillow's own."""
    try:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    except (OSError, ImportError):
        return ImageFont.load_default(size)
