"""The node that writes structured prompts."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from . import host

NUM_COLORS = 4
DEFAULT_COLORS = ("#1d3557", "#e63946", "#f1faee", "#ffb703")
COLOR = re.compile(r"#?(?:([0-9a-f]{3})|([0-9a-f]{6})(?:ff)?)", re.IGNORECASE)
"""A colour as pickers and people write it; one that is not opaque is none."""
SEPARATOR = "/"
SUBJECT_PARTS = ("description", "position", "action")
TEXTS = ("style", "lighting", "mood", "background", "composition")
CAMERA = {"camera_angle": "angle", "camera_lens": "lens", "depth_of_field": "depth_of_field"}
"""Widgets and the keys in the JSON's camera."""


class PromptJSON:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Writes a structured prompt as JSON, with the fields that Black Forest Labs recommend for FLUX.2. Fields that "
        "are left empty are left out."
    )
    SEARCH_ALIASES = (
        "json prompt",
        "structured prompt",
        "prompt builder",
        "color palette",
        "hex color",
        "color picker",
    )
    FUNCTION = "write"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("prompt",)
    OUTPUT_TOOLTIPS = ("The JSON, for the prompt of FLUX.2 Encode Prompt.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind = "COLOR" if host.has_color_widget() else "STRING"
        return {
            "required": {
                "scene": _text("The picture as a whole, in a sentence.", multiline=True),
                "subjects": _text(
                    f"One subject a line: what it is {SEPARATOR} where it is {SEPARATOR} what it does. The last two "
                    f"may be left out. Write {SEPARATOR} with spaces around it.",
                    multiline=True,
                ),
                "style": _text("Such as: product photograph, oil painting, flat vector illustration."),
                "lighting": _text("Such as: soft light from a window on the left, golden hour."),
                "mood": _text("Such as: calm, tense, playful."),
                "background": _text("What is behind the subjects."),
                "composition": _text("Such as: rule of thirds, centered, much empty space on the right."),
                "camera_angle": _text("Such as: eye level, low angle, from above."),
                "camera_lens": _text("Such as: 35 mm, 85 mm portrait lens, macro."),
                "depth_of_field": _text("What is sharp, such as: shallow, only the eyes; or everything."),
                "num_colors": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": NUM_COLORS,
                        "tooltip": "How many of the colors below make the palette, from the first on. 0: no palette.",
                    },
                ),
                **{
                    f"color_{number}": (
                        kind,
                        {
                            "default": default,
                            "tooltip": f"Color {number} of the palette, in hexadecimal such as {default}.",
                        },
                    )
                    for number, default in enumerate(DEFAULT_COLORS, start=1)
                },
                "more": _text(
                    'Further keys as a JSON object, such as {"text": "OPEN LATE", "camera": {"ISO": "200"}}.',
                    multiline=True,
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        subjects: str | None = None,
        num_colors: int | None = None,
        color_1: str | None = None,
        color_2: str | None = None,
        color_3: str | None = None,
        color_4: str | None = None,
        more: str | None = None,
    ) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            read_subjects(subjects or "")
            colors = (color_1, color_2, color_3, color_4)[: num_colors or 0]
            read_colors([DEFAULT_COLORS[0] if color is None else color for color in colors])
            if num_colors is not None and not 0 <= num_colors <= NUM_COLORS:
                raise ValueError(f"num_colors is {num_colors}; it must lie in 0..{NUM_COLORS}")
            read_more(more or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def write(cls, unique_id: str | None = None, **widgets: Any) -> tuple[str]:
        # Non-ASCII letters stand as they are: an escape takes several of the encoder's tokens.
        prompt = json.dumps(structured_prompt(widgets), ensure_ascii=False)
        host.show_text(prompt, unique_id)
        return (prompt,)


def structured_prompt(widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not empty, in the order and with the names of Black Forest Labs' prompting guide.

    Source: https://docs.bfl.ai/guides/usecases_t2i_json_prompting

    Raises:
        ValueError: a field cannot be read, a key is given twice, or all are empty.
    """
    colors = [widgets[f"color_{number}"] for number in range(1, widgets["num_colors"] + 1)]
    texts = {name: widgets[name].strip() for name in ("scene", *TEXTS, *CAMERA)}
    fields: dict[str, Any] = {
        "scene": texts["scene"],
        "subjects": read_subjects(widgets["subjects"]),
        "style": texts["style"],
        "color_palette": read_colors(colors),
        **{name: texts[name] for name in TEXTS[1:]},
        "camera": {key: texts[name] for name, key in CAMERA.items() if texts[name]},
    }
    filled = {name: value for name, value in fields.items() if value}
    _add(filled, read_more(widgets["more"]), "")
    if not filled:
        raise ValueError("all fields of the prompt are empty; write at least the scene or a subject")
    return filled


def read_subjects(text: str) -> list[dict[str, str]]:
    """A subject for each line that is not empty.

    Raises:
        ValueError: a line has too many parts, or does not begin with what the subject is.
    """
    subjects = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in re.split(rf"(?:^|\s){re.escape(SEPARATOR)}(?=\s|$)", line)]
        if len(parts) > len(SUBJECT_PARTS) or not parts[0]:
            raise ValueError(
                f"line {number} of subjects is {line.strip()!r}; write one subject a line as "
                f"{f' {SEPARATOR} '.join(SUBJECT_PARTS)}, where the last two may be left out"
            )
        named = zip(SUBJECT_PARTS, parts, strict=False)
        subjects.append({name: part for name, part in named if part})
    return subjects


def read_colors(colors: list[str]) -> list[str]:
    """Colours as ``#rrggbb``.

    Raises:
        ValueError: one is no colour in hexadecimal, or is transparent.
    """
    palette = []
    for number, color in enumerate(colors, start=1):
        found = COLOR.fullmatch(color.strip())
        if found is None:
            raise ValueError(f"color_{number} is {color!r}; write it in hexadecimal as #rrggbb, such as #e63946")
        short, full = found.groups()
        palette.append(f"#{full or ''.join(digit * 2 for digit in short)}".lower())
    return palette


def read_more(text: str) -> dict[str, Any]:
    """The keys of a JSON object; none where the text is empty.

    Raises:
        ValueError: it is no JSON object.
    """
    if not text.strip():
        return {}
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'more is no JSON ({error}); write an object such as {{"text": "OPEN LATE"}}') from None
    if not isinstance(found, dict):
        raise ValueError(f'more is a JSON {type(found).__name__}; write an object such as {{"text": "OPEN LATE"}}')
    return found


def _add(fields: dict[str, Any], more: Mapping[str, Any], path: str) -> None:
    """Adds keys, inside of objects too; what a widget says already is not replaced."""
    for key, value in more.items():
        before = fields.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            _add(before, value, f"{path}{key}.")
        elif key in fields:
            raise ValueError(f"more sets {path}{key}, which the node has a field for; empty one of the two")
        else:
            fields[key] = value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is none of JSON's values")


def _text(tooltip: str, *, multiline: bool = False) -> tuple[str, dict[str, Any]]:
    return ("STRING", {"default": "", "tooltip": tooltip, **({"multiline": True} if multiline else {})})
