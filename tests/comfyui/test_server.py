"""The pack in a real server, over HTTP and websocket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_server import API, PACK_FOLDER, Server
from comfyui_workflows import (
    FOLDER,
    NAMES,
    TEMPLATES,
    TINY_NAMES,
    asked_for,
    assert_shows,
    find,
    find_one,
    output_nodes,
    pack_file,
    prompt_behind,
    read_api,
    upstream,
)
from flux2_kit import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from PIL import Image

NETWORKS = ("Flux2DiT", "Flux2Autoencoder", "TextEncoder")


def text_to_image(**widgets) -> tuple[API, str]:
    """The simplest workflow and the id of its sampler."""
    prompt = read_api("text_to_image_tiny")
    sample = find_one(prompt, "Flux2KitSample")
    prompt[sample]["inputs"] |= {"num_images": 1, **widgets}
    return prompt, sample


def pixels(server: Server, prompt: API) -> list[bytes]:
    result = server.run(prompt)
    assert result.status == "success", result.messages
    return [image.tobytes() for image in server.images(result, find_one(prompt, "SaveImage"))]


def test_the_pack_loads_without_a_complaint(server):
    log, _, _ = server.log.read_text(encoding="utf-8").partition("To see the GUI go to")
    assert "IMPORT FAILED" not in log and f"custom_nodes/{PACK_FOLDER}" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("node_id", sorted(NODE_CLASS_MAPPINGS))
def test_a_node_is_described(server, node_id):
    described = server.get_json(f"/object_info/{node_id}")[node_id]
    node_class = NODE_CLASS_MAPPINGS[node_id]
    assert described["display_name"] == NODE_DISPLAY_NAME_MAPPINGS[node_id]
    assert described["python_module"] == f"custom_nodes.{PACK_FOLDER}"
    assert described["category"] == node_class.CATEGORY and described["description"] == node_class.DESCRIPTION
    assert described["output_name"] == list(node_class.RETURN_NAMES)
    assert described["output_tooltips"] == list(node_class.OUTPUT_TOOLTIPS)
    schema = node_class.INPUT_TYPES()
    for group in ("required", "optional"):
        inputs = described["input"].get(group, {})
        assert list(inputs) == list(schema.get(group, {}))
        for name, (_, options) in inputs.items():
            assert len(options["tooltip"]) > 10, name


def test_all_nodes_are_listed(server):
    listed = server.get_json("/object_info")
    ours = {node_id for node_id, node in listed.items() if node["python_module"] == f"custom_nodes.{PACK_FOLDER}"}
    assert ours == set(NODE_CLASS_MAPPINGS)


def test_all_templates_are_listed(server):
    assert sorted(server.get_json("/workflow_templates")[PACK_FOLDER]) == TEMPLATES
    for name in TEMPLATES:
        assert server.get_json(f"/api/workflow_templates/{PACK_FOLDER}/{name}.json")["nodes"]
        if (FOLDER / f"{name}.jpg").exists():
            assert server.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.jpg")[:2] == b"\xff\xd8"


def test_help_pages_and_translations_are_served(server):
    for page in pack_file("web", "docs").rglob("*.md"):
        path = page.relative_to(pack_file("web")).as_posix()
        assert server.get(f"/extensions/{PACK_FOLDER}/{path}").decode() == page.read_text(encoding="utf-8")
    # The page of 0.3.75 forgets a pack's texts when it loads another language than English: only this can be tested.
    served = server.get_json("/i18n")
    for folder in pack_file("locales").glob("*/nodeDefs.json"):
        assert set(NODE_CLASS_MAPPINGS) <= set(served[folder.parent.name]["nodeDefs"])


@pytest.mark.parametrize("name", [name for name in TINY_NAMES if not find(read_api(name), "Flux2KitTrainLoRA")])
def test_a_workflow_makes_the_picture_that_it_asks_for(server, name):
    prompt = read_api(name)
    result = server.run(prompt)
    assert result.status == "success", result.messages
    for node_id in output_nodes(prompt):
        images = server.images(result, node_id)
        assert images and all(max(high - low for low, high in image.getextrema()) > 100 for image in images)
        if text := prompt_behind(prompt, node_id):
            assert asked_for(text) or "image" in text, text
            assert_shows(images, asked_for(text))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TINY_NAMES])
def test_a_workflow_with_files_that_are_missing_says_which(server, name):
    status, answer = server.queue(read_api(name))
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert status == 400 and errors
    for error in errors:
        assert error["type"] in ("custom_validation_failed", "value_not_in_list"), error
        assert ".safetensors" in error["details"] and "folder; put the file there" in error["details"]


def test_progress_text_and_previews_arrive(server):
    prompt, sample = text_to_image(seed=11, num_steps=6)
    result = server.run(prompt)
    assert result.steps(sample) == [1, 2, 3, 4, 5, 6]
    (line,) = result.text(sample)
    assert line.startswith("tiny, 64x64, 6 steps, cfg")
    previews = [preview.image for preview in result.previews if preview.node_id == sample]
    assert [image.size for image in previews] == [(512, 512)] * 6
    # A rough picture of what was asked for: a red circle at the top left on blue.
    for place, wanted in (((150, 150), "red"), ((450, 450), "blue")):
        red, _, blue = previews[-1].getpixel(place)
        assert (red > blue) == (wanted == "red"), place


def test_an_unchanged_queue_runs_nothing_again(server):
    prompt, sample = text_to_image(seed=12)
    assert sample in server.run(prompt).executed
    again = server.run(prompt)
    assert set(prompt) - set(find(prompt, "SaveImage")) <= again.cached and sample not in again.executed
    # Another seed samples again and loads nothing.
    prompt[sample]["inputs"]["seed"] = 13
    third = server.run(prompt)
    loaders = {node_id for node_id, node in prompt.items() if node["class_type"].startswith("Flux2KitLoad")}
    assert sample in third.executed and loaders <= third.cached


def test_free_gives_all_memory_back_and_the_picture_comes_back(server):
    prompt, _ = text_to_image(seed=14)
    before = pixels(server, prompt)
    assert set(NETWORKS) <= set(server.networks())
    server.free(unload_models=True, free_memory=True)
    assert server.forgets(server.networks) and server.loaded() == {}
    assert pixels(server, prompt) == before


def test_unloaded_models_come_back_with_the_same_picture_and_no_file_is_read(server):
    prompt, sample = text_to_image(seed=31)
    before = pixels(server, prompt)
    weights = {f"{name}Weights" for name in NETWORKS}
    assert weights <= set(server.loaded()) and all(server.loaded()[name] for name in weights)
    networks = server.networks()
    server.free(unload_models=True)
    assert server.forgets(server.loaded) and server.networks() == networks
    # Another seed first, so that the picture has to be made again.
    prompt[sample]["inputs"]["seed"] = 32
    assert pixels(server, prompt) != before
    assert {"Flux2DiTWeights", "Flux2AutoencoderWeights"} <= set(server.loaded())
    prompt[sample]["inputs"]["seed"] = 31
    result = server.run(prompt)
    assert result.status == "success"
    loaders = {node_id for node_id, node in prompt.items() if node["class_type"].startswith("Flux2KitLoad")}
    assert sample in result.executed and loaders <= result.cached
    assert [image.tobytes() for image in server.images(result, find_one(prompt, "SaveImage"))] == before


def test_another_order_of_pictures_gives_the_same_ones(server):
    """What ran before leaves no trace in a picture."""
    one, two = text_to_image(seed=15)[0], text_to_image(seed=16)[0]
    first = pixels(server, one)
    assert pixels(server, two) != first
    server.free(unload_models=True, free_memory=True)
    assert pixels(server, one) == first


def test_an_uploaded_picture_is_edited(server):
    from flux2_kit.flux2_core.images import tensor_to_images
    from flux2_kit.training.tiny.pictures import Scene, draw_scenes

    scene = Scene(kind="star", size="large", position="center", color="red", background="white")
    (picture,) = tensor_to_images(draw_scenes([scene]) * 2 - 1)
    name = server.upload_image("a star.png", picture)
    prompt = read_api("reference_edit_tiny")
    reference = find_one(prompt, "Flux2KitEncodeReference")
    encoded = prompt[reference]["inputs"]
    (save,) = find(prompt, "SaveImage")
    edit = next(node for node in prompt.values() if node["inputs"].get("references") == [reference, 0])
    text = edit["inputs"]["positive"][0]
    prompt[text]["inputs"]["prompt"] = "make the star blue"
    prompt["upload"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    encoded["image"] = ["upload", 0]
    result = server.run(prompt)
    assert result.status == "success", result.messages
    wanted = {"kind": "star", "color": "blue", "background": "white", "position": "center", "size": "large"}
    assert_shows(server.images(result, save), wanted)


def test_a_program_queues_a_workflow_with_a_prompt_of_its_own(server, tmp_path):
    client, text = FOLDER / "api" / "run.py", "a small green ring at the bottom right on a white background"
    command = [sys.executable, "-I", str(client), str(client.with_name("text_to_image_tiny.json")), "--prompt", text]
    command += ["--seed", "18", "--server", server.url, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert len(paths) == 4 and sorted(paths) == sorted(tmp_path.rglob("*.png"))
    assert_shows([Image.open(path).convert("RGB") for path in paths], asked_for(text))


WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "a name that is no entry": ("Flux2KitLoadDiT", {"dit_name": "no.safetensors"}, "is not in ComfyUI's diffusion_m"),
    "a path out of the folder": ("Flux2KitLoadAE", {"ae_name": "../../etc/passwd"}, "is not in ComfyUI's vae folder"),
    "a size that does not exist": ("Flux2KitSample", {"width": 100}, "width is 100 px; it must be a multiple of 16"),
    "a text for a number": ("Flux2KitSample", {"num_steps": "many"}, "invalid literal for int()"),
    "a link of another type": ("Flux2KitSample", {"dit": "Flux2KitLoadAE"}, "received_type(FLUX2_AE)"),
    "a number that is too large": ("Flux2KitSample", {"num_images": 10**6}, "num_images"),
    "nothing where something must be": ("Flux2KitDecode", {"latent": None}, "latent"),
    "a dataset elsewhere": ("Flux2KitCacheDataset", {"dataset": "../../../etc"}, "which is no place in"),
    "a run elsewhere": ("Flux2KitTrainLoRA", {"output_name": "../over"}, "output_name is '../over'"),
    "a setting that does not exist": ("Flux2KitTrainLoRA", {"more_settings": "rnak = 4"}, "'rnak', which is no option"),
    "a LoRA elsewhere": ("Flux2KitApplyLoRA", {"lora_name": "../x.safetensors"}, "is not in ComfyUI's loras folder"),
}
"""By what is wrong: a node, inputs of it (None: not given; a class: a link to such a node), and what is answered."""


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_before_anything_runs(server, case):
    class_type, inputs, text = WRONG[case]
    prompt = next(prompt for prompt in map(read_api, TINY_NAMES) if find(prompt, class_type))
    node_id = find(prompt, class_type)[0]
    shown = next(shown for shown in output_nodes(prompt) if node_id in upstream(prompt, shown))
    for name, value in inputs.items():
        if value is None:
            del prompt[node_id]["inputs"][name]
        else:
            prompt[node_id]["inputs"][name] = [find_one(prompt, value), 0] if value in NODE_CLASS_MAPPINGS else value
    # Without a target, a prompt is queued for the outputs that do not need this node.
    status, answer = server.queue(prompt, targets=[shown])
    assert status == 400, answer
    errors = answer["node_errors"][node_id]["errors"]
    assert any(text in f"{error['message']} {error['details']}" for error in errors), errors


def test_a_node_that_does_not_exist(server):
    prompt, sample = text_to_image()
    prompt[sample]["class_type"] = "Flux2KitNoSuchNode"
    assert server.queue(prompt)[0] == 400


@pytest.mark.parametrize(
    ("class_type", "inputs", "without", "text"),
    [
        ("Flux2KitSample", {"cfg_scale": 3.0}, "negative", "there is no negative prompt; give one"),
        ("Flux2KitSample", {"guidance": 3.0}, None, "tiny has no guidance embedder; use cfg_scale"),
        ("Flux2KitLoadDiT", {"variant": "dev"}, None, "dev"),
    ],
)
def test_what_shows_only_in_the_run_is_said_on_the_node(server, class_type, inputs, without, text):
    prompt, _ = text_to_image()
    node_id = find_one(prompt, class_type)
    prompt[node_id]["inputs"] |= inputs
    prompt[node_id]["inputs"].pop(without, None)
    result = server.run(prompt)
    assert result.status == "error" and result.error["node_id"] == node_id
    message = result.error["exception_message"].strip()
    assert text in message and "\n" not in message and result.error["exception_type"].endswith("ValueError")


def test_a_file_is_never_written_outside_of_the_output_folder(server):
    prompt, _ = text_to_image()
    dit = find_one(prompt, "Flux2KitLoadDiT")
    inputs = {"dit": [dit, 0], "filename_prefix": "../../escaped", "precision": "default"}
    prompt = {dit: prompt[dit], "save": {"class_type": "Flux2KitSaveMergedDiT", "inputs": inputs}}
    status, answer = server.queue(prompt)
    if status == 200:
        result = server.run(prompt)
        text = result.error["exception_message"]
    else:
        text = str(answer["node_errors"])
    assert "does not name a file in ComfyUI's output folder" in text
    assert not list(server.base.parent.rglob("escaped*"))


def test_stop_ends_sampling_within_steps(server):
    prompt, sample = text_to_image(seed=17, num_steps=1000)

    def stop(result):
        if result.steps(sample) and not stopped:
            stopped.append(len(result.steps(sample)))
            server.post("/interrupt", {})

    stopped: list[int] = []
    result = server.run(prompt, stop)
    assert result.status == "interrupted" and len(result.steps(sample)) < 500
    # The next queue is not held back by it.
    prompt[sample]["inputs"]["num_steps"] = 4
    assert server.run(prompt).status == "success"
