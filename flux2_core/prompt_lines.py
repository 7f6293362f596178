"""Prompt lines: ``prompt --w 512 --h 512 --d 42 --s 20 --g 4 --fs 3 --n negative --ci reference.png``.

The syntax is that of musubi-tuner's ``--from_file`` and ``--interactive``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

OPTION = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|$)")
"""An option stands at the beginning or after a space; a lone ``--`` and dashes inside words belong to the prompt."""
OPTION_FIELDS: dict[str, tuple[str, type]] = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_steps", int),
    "g": ("cfg_scale", float),
    "l": ("cfg_scale", float),
    "fs": ("flow_shift", float),
    "n": ("negative_prompt", str),
    "ci": ("references", str),
}
"""Field of `PromptLine` that an option sets, and the type of its value."""
KINDS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """One picture that is asked for; None where the line says nothing."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    seed: int | None = None
    num_steps: int | None = None
    cfg_scale: float | None = None
    flow_shift: float | None = None
    references: tuple[str, ...] = ()
    """Paths; every ``--ci`` adds one."""


def prompt_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The lines that ask for pictures with their numbers from 1; blank lines and comments (``#``) are left out."""
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def parse_prompt_line(line: str) -> PromptLine:
    """Reads one line; a line that begins with an option has an empty prompt.

    Raises:
        ValueError: an unknown option, one that is given twice, or a value of another kind.
    """
    matches = list(OPTION.finditer(line))
    ends = [*(match.start() for match in matches[1:]), len(line)][: len(matches)]
    fields: dict[str, Any] = {}
    references: list[str] = []
    for match, end in zip(matches, ends, strict=True):
        name, value = match[1], line[match.end() : end].strip()
        if name not in OPTION_FIELDS:
            raise ValueError(
                f"unknown option --{name}; allowed are {', '.join(f'--{known}' for known in OPTION_FIELDS)}"
            )
        field, kind = OPTION_FIELDS[name]
        if field == "references":
            if not value:
                raise ValueError(f"--{name} has no value; write the path of a picture behind it")
            references.append(value)
        elif field in fields:
            raise ValueError(f"--{name} sets the {field} a second time; write it once")
        else:
            fields[field] = _convert(name, value, kind)
    prompt = line[: matches[0].start()] if matches else line
    return PromptLine(prompt=prompt.strip(), references=tuple(references), **fields)


def _convert(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"--{name} is {value!r}; it must be {KINDS[kind]}") from None
