"""The example workflows as a test reads them: which run on the bundled model, and what their pictures should show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfyui_install import ROOT
from comfyui_server import API
from flux2_kit.nodes.host import BUNDLED
from flux2_kit.training.tiny.evaluate import judge_styles
from flux2_kit.training.tiny.pictures import COLORS, KINDS, POSITIONS, SIZES, Scene
from PIL import Image

FOLDER = ROOT / "example_workflows"
NAMES = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.json"))


def read_api(name: str) -> API:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def is_tiny(prompt: API) -> bool:
    """Whether it needs no file but the bundled ones."""
    names = [
        value
        for node in prompt.values()
        for key, value in node["inputs"].items()
        if key in ("dit_name", "ae_name", "text_encoder_name")
    ]
    return bool(names) and all(name == BUNDLED for name in names)


TINY_NAMES = [name for name in NAMES if is_tiny(read_api(name))]


def find(prompt: API, class_type: str) -> list[str]:
    """Ids of the nodes of a class."""
    return [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]


def find_one(prompt: API, class_type: str) -> str:
    (node_id,) = find(prompt, class_type)
    return node_id


def output_nodes(prompt: API) -> list[str]:
    """Ids of the nodes that show or save pictures."""
    return find(prompt, "SaveImage") + find(prompt, "PreviewImage")


def upstream(prompt: API, node_id: str) -> list[str]:
    """The node and all it depends on, the nearest first."""
    found = [node_id]
    for current in found:
        for value in prompt[current]["inputs"].values():
            if is_link(value) and value[0] not in found:
                found.append(value[0])
    return found


def prompt_behind(prompt: API, node_id: str) -> str | None:
    """The text that a picture was made from, None where no sampler made it or a node composed the text."""
    for sampler in upstream(prompt, node_id):
        inputs = prompt[sampler]["inputs"]
        link = inputs.get("positive", inputs.get("conditioning"))
        if is_link(link):
            for encoder in upstream(prompt, link[0]):
                text = prompt[encoder]["inputs"].get("prompt", prompt[encoder]["inputs"].get("text"))
                if text is not None:
                    return text if isinstance(text, str) else None
        if prompt[sampler]["class_type"] == "Flux2KitTrainLoRA":
            return None
    return None


def asked_for(text: str) -> dict[str, str]:
    """Attributes of a `Scene` that a prompt names without doubt; of an edit, those that it changes."""
    words = re.findall(r"\w+", text.lower())
    asked: dict[str, str] = {}
    for name, known in (("kind", KINDS), ("size", SIZES)):
        named = {word for word in words if word in known}
        if len(named) == 1:
            asked[name] = named.pop()
    if match := re.search(r"at the ((?:top|bottom)? ?\b(?:left|right|center|top|bottom))\b", text.lower()):
        assert match[1] in POSITIONS
        asked["position"] = match[1]
    if match := re.search(r"(\w+) background|background (\w+)", text.lower()):
        asked["background"] = match[1] if match[1] in COLORS else match[2]
    others = [word for word in words if word in COLORS]
    if "background" in asked:
        others.remove(asked["background"])
    if len(others) == 1:
        asked["color"] = others[0]
    return asked


def scenes(images: list[Image.Image]) -> list[tuple[Scene, str]]:
    """What each picture shows, and in which style, after the exact judge of the tiny model's domain."""
    stacked = np.stack([np.asarray(image) for image in images])
    return judge_styles(torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255)


def assert_shows(images: list[Image.Image], wanted: dict[str, str]) -> None:
    """Every picture has every attribute."""
    for scene, _ in scenes(images):
        shown = {name: getattr(scene, name) for name in wanted}
        assert shown == wanted, scene


def is_link(value: Any) -> bool:
    """Whether an API input is ``[node id, output index]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def pack_file(*parts: str) -> Path:
    return ROOT.joinpath(*parts)
