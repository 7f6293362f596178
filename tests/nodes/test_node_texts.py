"""Help pages, translations and the pictures that go with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flux2_kit import NODE_CLASS_MAPPINGS, WEB_DIRECTORY
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = ROOT / WEB_DIRECTORY / "docs"
TEMPLATES = ROOT / "example_workflows"
MAX_BYTES = 60_000
LANGUAGES = ("en", "ja", "zh")
NUMBER = re.compile(r"(?<![A-Za-z_])\d[\d.x]*\d|(?<![A-Za-z_])\d(?!\w)")


def read_texts(language: str) -> dict[str, str]:
    """All texts of a language by their path, such as ``Flux2KitDecode.inputs.ae.name``."""
    content = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return dict(flatten(content))


def flatten(content: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_english_texts_and_lists_are_those_of_the_code():
    from node_texts import written

    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run python tests/nodes/node_texts.py"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_is_complete(language):
    from node_texts import SPECIAL, unescape

    texts, english = read_texts(language), read_texts("en")
    assert list(texts) == list(english)
    for path, text in texts.items():
        assert text.strip() == text != "", path
        plain = re.sub(r"\{'[{}@|]'\}", "", text)
        assert not SPECIAL.search(plain), f"{path}: the front end would read {text!r} as a command"
        assert unescape(text)
    names = [text for path, text in texts.items() if path.endswith("display_name")]
    assert len(set(names)) == len(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_translation_says_what_the_english_text_says(language):
    """As far as that can be seen: it is not English, and has the same numbers."""
    texts, english = read_texts(language), read_texts("en")
    for path, text in texts.items():
        if path.endswith(("tooltip", "description")):
            assert any(ord(letter) > 0x3000 for letter in text), f"{path} is not translated"
            missing = set(NUMBER.findall(english[path])) - set(NUMBER.findall(text))
            assert not missing, f"{path} ({language}) does not say {missing}: translate {english[path]!r} anew"


def test_the_front_end_s_signs_are_escaped():
    from node_texts import escape, unescape

    assert escape("a{b}|@c") == "a{'{'}b{'}'}{'|'}{'@'}c"
    assert unescape(escape("a{b}|@c {'x'}")) == "a{b}|@c {'x'}"


def test_every_node_has_a_page_and_every_picture_is_shown():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODE_CLASS_MAPPINGS)
    shown = set()
    for path in PAGES.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert "\n## Example\n" in text and len(text.split("\n## Example")[0]) > 100, path.name
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            shown.add(path.parent / target)
        for name in re.findall(r"\*(\w+_(?:tiny|dev))\*", text):
            assert (TEMPLATES / f"{name}.json").is_file(), f"{path.name}: there is no template {name}"
    assert shown == set((PAGES / "pictures").iterdir())
    assert all(path.stat().st_size < MAX_BYTES for path in shown)


def test_every_template_has_a_picture():
    names = {path.stem for path in TEMPLATES.glob("*.json")}
    assert {path.stem for path in TEMPLATES.glob("*.jpg")} == names
    for name in names:
        path = TEMPLATES / f"{name}.jpg"
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (512, 512)
        assert path.stat().st_size < MAX_BYTES
