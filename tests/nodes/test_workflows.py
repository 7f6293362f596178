"""Every example workflow fits the node schemas, and those of the tiny model run."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from flux2_kit.training.metrics import read_metrics

FOLDER = Path(__file__).parents[2] / "example_workflows"
NAMES = [
    *("text_to_image_tiny", "reference_edit_tiny", "multi_reference_edit_tiny", "lora_stack_tiny", "train_lora_tiny"),
    *("native_sampler_tiny", "image_to_image_tiny"),
    *("text_to_image_klein-4b", "text_to_image_klein-base-9b", "text_to_image_dev", "low_vram_klein-9b"),
]


def read(name: str) -> tuple[dict, dict]:
    """UI and API JSON."""
    return json.loads((FOLDER / f"{name}.json").read_text()), json.loads((FOLDER / "api" / f"{name}.json").read_text())


def test_the_list_is_complete():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(NAMES)


def test_files_are_as_described():
    from workflows import written

    for path, text in written().items():
        assert path.read_text() == text, f"{path.name} is out of date: run python tests/nodes/workflows.py"


@pytest.mark.parametrize("name", NAMES)
def test_ui_and_api_say_the_same(name, executor):
    ui, api = read(name)
    assert from_ui(ui, executor.node_classes) == api


def from_ui(ui: dict, node_classes: dict) -> dict:
    """What the front end would queue."""
    sources = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    api = {}
    for node in ui["nodes"]:
        if node["type"] not in node_classes:
            assert node["type"] == "MarkdownNote"
            continue
        schema = node_classes[node["type"]].INPUT_TYPES()
        linked = {entry["name"]: entry["link"] for entry in node["inputs"]}
        widgets = {entry["widget"]["name"] for entry in node["inputs"] if "widget" in entry}
        values, inputs = list(node["widgets_values"]), {}
        for key, (kind, *rest) in {**schema.get("required", {}), **schema.get("optional", {})}.items():
            if key not in linked or key in widgets:
                inputs[key] = values.pop(0)
            if key in linked:
                if linked[key] is not None:
                    inputs[key] = sources[linked[key]]
                continue
            if rest and rest[0].get("control_after_generate"):
                assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
            assert isinstance(kind, list) or kind.isupper()
        assert not values, node["type"]
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api


@pytest.mark.parametrize("name", NAMES)
def test_links_agree_on_both_ends(name):
    ui, _ = read(name)
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert len(nodes) == len(ui["nodes"]) and ui["last_node_id"] == max(nodes)
    for link_id, source, source_slot, target, target_slot, kind in ui["links"]:
        output, entry = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert link_id in output["links"] and entry["link"] == link_id
        assert output["type"] == entry["type"] == kind
        assert nodes[source]["order"] < nodes[target]["order"]
        assert nodes[source]["pos"][0] <= nodes[target]["pos"][0], "read from left to right"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps(name):
    ui, _ = read(name)
    boxes = [[*node["pos"], *node["size"], node["type"]] for node in ui["nodes"]]
    boxes = [(x, y - 30, x + width, y + height, kind) for x, y, width, height, kind in boxes]  # with the title bar
    for one, other in combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)
    groups = [group["bounding"] for group in ui["groups"]]
    for one, other in combinations(sorted(groups), 2):
        assert one[0] + one[2] <= other[0]
    for left, top, right, bottom, kind in boxes:
        assert any(
            x <= left and y <= top and right <= x + width and bottom <= y + height for x, y, width, height in groups
        ), kind


@pytest.mark.parametrize("name", NAMES)
def test_the_server_would_accept_it(name, executor, host, monkeypatch):
    _, api = read(name)
    present = {
        component: [node["inputs"][key] for node in api.values() if key in node["inputs"]]
        for component, key in (("dit", "dit_name"), ("autoencoder", "ae_name"), ("text_encoder", "text_encoder_name"))
    }
    monkeypatch.setattr(host, "model_names", lambda component: present[component])
    assert executor.validate(api) == []


def shortened(api: dict, num_steps: int = 2) -> dict:
    for node in api.values():
        if "num_steps" in node["inputs"]:
            node["inputs"]["num_steps"] = num_steps
    return api


def test_text_to_image_runs(executor):
    api = shortened(read("text_to_image_tiny")[1])
    outputs = executor.run(api)
    (images,) = executor.images.values()
    assert images.shape == (4, 64, 64, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0
    latent = next(outputs[node_id][0] for node_id, node in api.items() if node["class_type"] == "Flux2KitSample")
    assert latent["samples"].shape == (4, 128, 4, 4) and latent["samples"].dtype == torch.float32


def test_reference_edit_runs_and_a_second_queue_does_nothing_twice(executor):
    api = shortened(read("reference_edit_tiny")[1])
    executor.run(api)
    first = executor.images
    assert all(images.shape == (1, 64, 64, 3) for images in first.values()) and len(first) == 2
    assert set(executor.executed) == set(api)

    executor.run(api)
    assert {api[node_id]["class_type"] for node_id in executor.executed} == {"PreviewImage", "SaveImage"}


def test_a_lora_is_trained_applied_and_changes_the_picture(executor, host, tmp_path, monkeypatch):
    from flux2_kit.nodes.host import bundled_path

    monkeypatch.setattr(host, "bundled_path", bundled_path)  # random weights learn nothing in so few steps
    for name in ("INPUT", "OUTPUT", "MODELS", "TEMP"):
        monkeypatch.setattr(host, f"FALLBACK_{name}_DIR", tmp_path / name.lower())
    api = shortened(read("train_lora_tiny")[1])
    ids = {node["class_type"]: node_id for node_id, node in api.items()}
    api[ids["Flux2KitTrainLoRA"]]["inputs"] |= {"max_train_steps": 8, "sample_every_n_steps": 4}
    outputs = executor.run(api)
    curves, samples, before, after = executor.images.values()
    assert curves.shape[3] == 3 and samples.shape == (2, 64, 64, 3)
    assert before.shape == after.shape == (4, 64, 64, 3) and (after - before).abs().mean() > 0.01
    _, name, _, _, steps = outputs[ids["Flux2KitTrainLoRA"]]
    assert (Path(name), steps) == (Path("flux2_kit/tiny_style.safetensors"), 8)
    records = read_metrics(tmp_path / "output" / "flux2_kit" / "tiny_style" / "tiny_style-metrics.jsonl")
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    executor.run(api)
    assert {api[node_id]["class_type"] for node_id in executor.executed} == {"PreviewImage", "SaveImage"}


def test_a_reference_changes_the_picture(executor):
    api = shortened(read("reference_edit_tiny")[1])
    executor.run(api)
    edited = list(executor.images.values())[-1]
    sample = next(node for node in api.values() if "references" in node["inputs"])
    del sample["inputs"]["references"]
    executor.run(api)
    assert not torch.equal(list(executor.images.values())[-1], edited)
