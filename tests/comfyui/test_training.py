"""Training inside a real server: live, stopped, gone on with, and its LoRA used."""

from __future__ import annotations

import pytest
from comfyui_workflows import (
    TINY_NAMES,
    asked_for,
    assert_shows,
    find,
    find_one,
    output_nodes,
    prompt_behind,
    read_api,
    scenes,
)
from flux2_kit.training.metrics import read_metrics

TRAINING_NAMES = [name for name in TINY_NAMES if find(read_api(name), "Flux2KitTrainLoRA")]


@pytest.fixture(scope="module")
def trained(server):
    """(prompt, what the server told) of the example workflow, run once."""
    prompt = read_api("train_lora_tiny")
    result = server.run(prompt)
    assert result.status == "success", result.messages
    return prompt, result


def test_every_training_workflow_runs(server, trained):
    for name in TRAINING_NAMES:
        prompt, result = trained if name == "train_lora_tiny" else (read_api(name), server.run(read_api(name)))
        assert result.status == "success", result.messages
        assert all(server.images(result, node_id) for node_id in output_nodes(prompt)), name


def test_pictures_are_as_asked_for_before_and_after(server, trained):
    prompt, result = trained
    styles = {}
    for node_id in find(prompt, "SaveImage"):
        images, text = server.images(result, node_id), prompt_behind(prompt, node_id)
        assert text is not None and len(images) == 4
        assert_shows(images, asked_for(text))
        styles[prompt[node_id]["inputs"]["filename_prefix"]] = [style for _, style in scenes(images)]
    assert styles == {
        "flux2_kit/tiny_style_before": ["plain"] * 4,
        "flux2_kit/tiny_style_after": ["striped"] * 4,
    }


def test_training_is_shown_while_it_goes_on(trained):
    prompt, result = trained
    node_id = find_one(prompt, "Flux2KitTrainLoRA")
    num_steps = prompt[node_id]["inputs"]["max_train_steps"]
    steps = result.steps(node_id)
    # ComfyUI of 2026 leaves out some of what follows closely on one another.
    assert steps[-1] == num_steps and steps == sorted(steps) and len(set(steps)) > num_steps / 4
    # Of two prompts, at steps 25, 50, 75 and 100.
    previews = [preview.image for preview in result.previews if preview.node_id == node_id]
    assert len(previews) >= 8
    texts = result.text(node_id)
    assert len(texts) > 3 and any("loss" in line for line in texts[:-1])
    assert texts[-1].startswith(f"tiny_style: {num_steps} steps, loss 0.")
    table = result.text(find_one(prompt, "Flux2KitCacheDataset"))[-1]
    assert table.startswith("tiny style (bundled): ") and "0 captions missing" in table


def test_the_lora_is_in_the_folder_of_loras(server, trained):
    assert (server.base / "models" / "loras" / "flux2_kit" / "tiny_style.safetensors").is_file()
    listed = server.get_json("/object_info/Flux2KitApplyLoRA")["Flux2KitApplyLoRA"]
    choices = listed["input"]["required"]["lora_name"][0]
    assert "flux2_kit/tiny_style.safetensors" in choices


def test_an_unchanged_queue_trains_nothing_again(server, trained):
    prompt, _ = trained
    again = server.run(prompt)
    assert find_one(prompt, "Flux2KitTrainLoRA") in again.cached and again.status == "success"
    # With everything forgotten the run itself says that it is finished.
    server.free(unload_models=True, free_memory=True)
    node_id = find_one(prompt, "Flux2KitTrainLoRA")
    afresh = server.run(prompt)
    assert node_id in afresh.executed and afresh.status == "success" and afresh.steps(node_id) == []
    assert "tiny_style is trained already: 100 steps. Nothing was done" in afresh.text(node_id)


def test_stop_keeps_the_state_and_the_next_queue_goes_on(server):
    prompt = read_api("train_lora_tiny")
    dataset, train = find_one(prompt, "Flux2KitCacheDataset"), find_one(prompt, "Flux2KitTrainLoRA")
    prompt = {dataset: prompt[dataset], train: prompt[train]}
    num_steps = 25
    changed = {"output_name": "stopped", "max_train_steps": num_steps, "sample_every_n_steps": 0, "sample_prompts": ""}
    prompt[train]["inputs"] |= changed
    pressed: list[int] = []
    simple = read_api("text_to_image_tiny")
    simple[find_one(simple, "Flux2KitSample")]["inputs"]["seed"] = 41
    assert server.run(simple).status == "success" and server.loaded()

    def stop(result):
        steps = result.steps(train)
        if steps and steps[-1] >= 5 and not pressed:
            pressed.append(steps[-1])
            server.post("/interrupt", {})

    result = server.run(prompt, stop)
    assert result.status == "interrupted" and server.loaded() == {}, "all others have left the device for training"
    (done,) = {line for line in result.text(train) if line.startswith("stopped after step")}
    last = int(done.split()[3].rstrip(":"))
    name = f"stopped-step{last:08d}.safetensors"
    assert pressed[0] <= last < num_steps
    assert done.endswith(f"flux2_kit/{name} and the state are kept, queue again to go on")
    folder, loras = (server.base / place / "flux2_kit" for place in ("output", "models/loras"))
    folder /= "stopped"
    assert list((folder / "stopped-state").iterdir()) and (loras / name).is_file()
    assert not (loras / "stopped.safetensors").exists()

    result = server.run(prompt)
    assert result.status == "success", result.messages
    steps = result.steps(train)
    assert steps[0] == last + 1 and steps[-1] == num_steps
    records = [record for record in read_metrics(folder / "stopped-metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, num_steps + 1)), "no step is lost or done twice"
    assert (loras / "stopped.safetensors").is_file()


def test_a_lora_that_has_gone_is_written_again(server, trained):
    """Though nothing in the graph has changed."""
    prompt, _ = trained
    train = find_one(prompt, "Flux2KitTrainLoRA")
    path = server.base / "models" / "loras" / "flux2_kit" / "tiny_style.safetensors"
    content = path.read_bytes()
    path.unlink()
    result = server.run(prompt)
    assert result.status == "success" and train in result.executed and result.steps(train) == []
    assert path.read_bytes() == content


def test_the_history_holds_path_pictures_and_texts(server, trained):
    prompt, result = trained
    dataset, train = find_one(prompt, "Flux2KitCacheDataset"), find_one(prompt, "Flux2KitTrainLoRA")
    assert result.outputs[train]["lora_name"] == ["flux2_kit/tiny_style.safetensors"]
    assert result.outputs[train]["text"] == result.text(train)[-1:]
    (table,) = result.outputs[dataset]["text"]
    assert result.text(dataset)[-1] == table.replace("\n", "  \n")  # as Markdown, which the page may draw it as
    *samples, curves = server.images(result, train)
    assert [image.size for image in samples] == [(64, 64)] * 2 and curves.width > 1000
    (sheet,) = server.images(result, dataset)
    assert sheet.width == 1600


def test_what_is_refused_is_told_on_the_node(server, trained):
    """The server runs the other outputs of the workflow, and its page shows no window."""
    prompt, _ = trained
    changed = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in prompt.items()}
    train = find_one(prompt, "Flux2KitTrainLoRA")
    changed[train]["inputs"]["more_settings"] = "ema_decai = 1"
    result = server.run(changed)
    assert result.status == "success" and train not in result.executed
    assert result.text(train) == ["more_settings sets 'ema_decai', which is no option; did you mean ema_decay?"]
    alone = {node_id: changed[node_id] for node_id in (train, find_one(prompt, "Flux2KitCacheDataset"))}
    status, answer = server.queue(alone, targets=[train])
    assert status == 400 and "ema_decai" in answer["node_errors"][train]["errors"][0]["details"]


def test_a_finished_run_with_other_settings_is_refused_on_the_node(server, trained):
    prompt, _ = trained
    train = find_one(prompt, "Flux2KitTrainLoRA")
    changed = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in prompt.items()}
    changed[train]["inputs"]["rank"] = 16
    result = server.run(changed)
    assert result.status == "error" and result.error["node_id"] == train
    message = result.error["exception_message"].strip()
    assert "tiny_style had other settings" in message and "give another output_name" in message
