"""The nodes around the picture: its size, structured prompts, what files are, LoRAs in other dialects."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flux2_kit.flux2_core.lora_files import linear_shapes, read_lora
from flux2_kit.flux2_core.variants import DIT_TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY = "tiny (bundled)"


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What nodes show."""
    shown: list[str] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append(text))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return shown


@pytest.fixture
def folder(host, tmp_path, monkeypatch) -> Path:
    """ComfyUI's loras folder with one LoRA of rank 2 and alpha 4, as kohya writes it."""
    folder = tmp_path / "models" / "loras"
    (folder / "sub").mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (out_features, in_features) in linear_shapes(DIT_TINY).items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, in_features, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out_features, 2, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder / "sub" / "style.safetensors")
    monkeypatch.setattr(host, "FALLBACK_MODELS_DIR", folder.parent)
    monkeypatch.setattr(host, "FALLBACK_OUTPUT_DIR", tmp_path / "output")
    return folder


def size_widgets(**changed) -> dict:
    return {"aspect_ratio": "1:1", "megapixels": 1.0, "width": 64, "height": 64, "batch_size": 1, **changed}


@pytest.mark.parametrize(
    ("aspect_ratio", "megapixels", "size"),
    [
        ("1:1", 1.0, (1024, 1024)),
        ("16:9", 1.0, (1360, 768)),
        ("9:16", 1.0, (768, 1360)),
        ("3:2", 4.0, (2512, 1680)),
        ("21:9", 0.25, (784, 336)),
        ("custom", 1.0, (80, 64)),
    ],
)
def test_a_latent_has_the_size_that_was_asked_for(nodes, texts, aspect_ratio, megapixels, size):
    widgets = size_widgets(aspect_ratio=aspect_ratio, megapixels=megapixels, width=80, batch_size=2)
    assert (
        nodes["Flux2KitEmptyLatent"].VALIDATE_INPUTS(**{k: v for k, v in widgets.items() if k != "batch_size"}) is True
    )
    latent, width, height = nodes["Flux2KitEmptyLatent"].make(**widgets, unique_id="1")
    assert (width, height) == size
    assert latent["samples"].shape == (2, 128, height // 16, width // 16)
    assert latent["samples"].dtype == torch.float32 and not latent["samples"].any()
    assert texts == [f"{width}x{height} px, {width * height / 2**20:.3g} megapixels"]


def test_every_aspect_ratio_comes_near(pack, nodes):
    size_of = sys.modules[f"{pack.__name__}.nodes.latents"].picture_size
    choices, _ = nodes["Flux2KitEmptyLatent"].INPUT_TYPES()["required"]["aspect_ratio"]
    assert len(choices) == len(set(choices)) == 14 and choices[-1] == "custom"
    for name in choices[:-1]:
        wanted = int(name.split(":")[0]) / int(name.split(":")[1])
        for megapixels in (0.25, 1.0, 2.0, 4.0):
            width, height = size_of(name, megapixels)
            assert width % 16 == height % 16 == 0
            assert abs(width / height / wanted - 1) < 0.04
            assert abs(width * height / (megapixels * 2**20) - 1) < 0.06


def test_the_size_reaches_sample(executor):
    inputs = size_widgets(aspect_ratio="custom", width=80, height=96)
    loaders = {
        "dit": {
            "class_type": "Flux2KitLoadDiT",
            "inputs": {"dit_name": TINY, "variant": "auto", "precision": "default"},
        },
        "te": {"class_type": "Flux2KitLoadTextEncoder", "inputs": {"text_encoder_name": TINY, "precision": "default"}},
        "ae": {"class_type": "Flux2KitLoadAE", "inputs": {"ae_name": TINY}},
    }
    sample = {"dit": ["dit", 0], "positive": ["text", 0], "width": ["size", 1], "height": ["size", 2], "num_steps": 1}
    sample |= {"cfg_scale": 1.0, "guidance": 0.0, "flow_shift": 0.0, "seed": 0, "num_images": 1}
    executor.run(
        {
            **loaders,
            "size": {"class_type": "Flux2KitEmptyLatent", "inputs": inputs},
            "json": {"class_type": "Flux2KitPromptJSON", "inputs": prompt_widgets(scene="a red circle")},
            "text": {
                "class_type": "Flux2KitEncodePrompt",
                "inputs": {"text_encoder": ["te", 0], "prompt": ["json", 0]},
            },
            "sample": {"class_type": "Flux2KitSample", "inputs": sample},
            "decode": {
                "class_type": "Flux2KitDecode",
                "inputs": {"ae": ["ae", 0], "latent": ["sample", 0], "tiling": False},
            },
            "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
        }
    )
    assert executor.images["show"].shape == (1, 96, 80, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"aspect_ratio": "7:5"}, "unknown aspect_ratio '7:5'; known: 1:1, 5:4"),
        ({"megapixels": 0.0}, "megapixels is 0.0; it must lie above 0"),
        ({"megapixels": float("nan")}, "megapixels is nan"),
        ({"aspect_ratio": "21:9", "megapixels": 0.01}, "0.01 megapixels at 21:9 are 160x64|at least 64 px, so raise"),
        ({"aspect_ratio": "custom", "width": 100}, "the width is 100 px; it must be a multiple of 16"),
    ],
)
def test_sizes_that_are_refused(nodes, changed, message):
    node_class, widgets = nodes["Flux2KitEmptyLatent"], size_widgets(**changed)
    if "21:9" in widgets.values():
        widgets["megapixels"] = 0.006
    with pytest.raises(ValueError, match=message) as error:
        node_class.make(**widgets)
    del widgets["batch_size"]
    assert node_class.VALIDATE_INPUTS(**widgets) == str(error.value)
    assert node_class.VALIDATE_INPUTS(aspect_ratio="custom", width=None, height=64) is True


def prompt_widgets(**changed) -> dict:
    texts = ("scene", "subjects", "style", "lighting", "mood", "background", "composition")
    camera = ("camera_angle", "camera_lens", "depth_of_field")
    colors = {f"color_{number}": "#000000" for number in range(1, 5)}
    return {**dict.fromkeys((*texts, *camera, "more"), ""), "num_colors": 0, **colors, **changed}


def test_a_structured_prompt_has_the_documented_fields(nodes, texts):
    widgets = prompt_widgets(
        scene="A café at dawn",
        subjects="a red bicycle / left third / leaning on a wall\n\n a cat 1/2 asleep / on the saddle \n/ / ",
        style="photograph",
        lighting="low sun",
        mood="calm",
        background="a street",
        composition="rule of thirds",
        camera_angle="eye level",
        camera_lens=" 35 mm ",
        depth_of_field="shallow",
        num_colors=3,
        color_1="#E63946",
        color_2="fb0",
        color_3="#1d3557ff",
        color_4="not a color",
        more='{"text": "OUVERT", "camera": {"ISO": "200"}}',
    )
    with pytest.raises(ValueError, match="line 4 of subjects is '/ /'; write one subject a line as description / pos"):
        nodes["Flux2KitPromptJSON"].write(**widgets)
    widgets["subjects"] = widgets["subjects"][:-5]
    (text,) = nodes["Flux2KitPromptJSON"].write(**widgets, unique_id="1")
    assert texts == [text] and "café" in text and "\n" not in text
    prompt = json.loads(text)
    assert prompt == {
        "scene": "A café at dawn",
        "subjects": [
            {"description": "a red bicycle", "position": "left third", "action": "leaning on a wall"},
            {"description": "a cat 1/2 asleep", "position": "on the saddle"},
        ],
        "style": "photograph",
        "color_palette": ["#e63946", "#ffbb00", "#1d3557"],
        "lighting": "low sun",
        "mood": "calm",
        "background": "a street",
        "composition": "rule of thirds",
        "camera": {"angle": "eye level", "lens": "35 mm", "depth_of_field": "shallow", "ISO": "200"},
        "text": "OUVERT",
    }
    assert list(prompt)[:4] == ["scene", "subjects", "style", "color_palette"]


def test_empty_fields_are_left_out(nodes):
    (text,) = nodes["Flux2KitPromptJSON"].write(**prompt_widgets(scene=" a red circle ", mood="  "))
    assert text == '{"scene": "a red circle"}'


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_colors": 1, "color_1": "red"}, "color_1 is 'red'; write it in hexadecimal as #rrggbb"),
        ({"num_colors": 2, "color_2": "#11223344"}, "color_2 is '#11223344'"),
        ({"subjects": "a / b / c / d"}, "line 1 of subjects is 'a / b / c / d'; write one subject a line"),
        ({"more": "{"}, "more is no JSON"),
        ({"more": '{"a": NaN}'}, "more is no JSON .NaN is none of JSON's values"),
        ({"more": "[1]"}, "more is a JSON list; write an object"),
    ],
)
def test_prompts_that_are_refused_before_the_queue(nodes, changed, message):
    node_class, widgets = nodes["Flux2KitPromptJSON"], prompt_widgets(scene="a circle", **changed)
    with pytest.raises(ValueError, match=message) as error:
        node_class.write(**widgets)
    own = ("subjects", "num_colors", "color_1", "color_2", "color_3", "color_4", "more")
    assert node_class.VALIDATE_INPUTS(**{name: widgets[name] for name in own}) == str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert node_class.VALIDATE_INPUTS(num_colors=4, color_1="#fff") is True


def test_prompts_that_say_nothing_or_the_same_twice(nodes):
    write = nodes["Flux2KitPromptJSON"].write
    with pytest.raises(ValueError, match="all fields of the prompt are empty; write at least"):
        write(**prompt_widgets())
    with pytest.raises(ValueError, match=r"more sets camera\.lens, which the node has a field for"):
        write(**prompt_widgets(camera_lens="35 mm", more='{"camera": {"lens": "50 mm"}}'))
    assert "must lie in 0..4" in nodes["Flux2KitPromptJSON"].VALIDATE_INPUTS(num_colors=5)


def test_colors_are_picked_where_the_front_end_can(nodes, monkeypatch):
    inputs = nodes["Flux2KitPromptJSON"].INPUT_TYPES
    assert inputs()["required"]["color_1"][0] == "STRING"
    monkeypatch.setitem(sys.modules, "comfy_api.latest._io", SimpleNamespace(Color=object))
    assert inputs()["required"]["color_1"] == ("COLOR", inputs()["required"]["color_1"][1])


def test_what_a_file_is(nodes, host, folder, texts, random_tiny_files):
    node_class = nodes["Flux2KitInspectFile"]
    choices, _ = node_class.INPUT_TYPES()["required"]["file_name"]
    lora = "loras/sub/style.safetensors"
    assert choices == [f"diffusion_models/{TINY}", f"vae/{TINY}", f"text_encoders/{TINY}", lora]
    (facts,) = node_class.inspect(lora, unique_id="1")
    assert texts == [facts.replace("\n", "  \n")] and facts.splitlines()[0] == lora and str(folder) not in facts
    for line in ("a FLUX.2 LoRA", "kohya", "rank", "alpha"):
        assert line in facts
    found = [node_class.inspect(name)[0] for name in choices[:3]]
    assert "FLUX.2 DiT" in found[0] and "autoencoder" in found[1] and "Qwen3" in found[2]

    before = node_class.IS_CHANGED(file_name=lora)
    assert node_class.IS_CHANGED(file_name=lora) == before
    os.utime(folder / "sub" / "style.safetensors", ns=(1, 1))
    assert node_class.IS_CHANGED(file_name=lora) != before


@pytest.mark.parametrize("name", ["loras/../../secret.safetensors", "/etc/passwd", "loras/gone.safetensors", "none"])
def test_only_files_of_the_models_folders_are_looked_into(nodes, folder, name):
    with pytest.raises(ValueError, match="is not in ComfyUI's models folder") as error:
        nodes["Flux2KitInspectFile"].inspect(name)
    assert nodes["Flux2KitInspectFile"].VALIDATE_INPUTS(file_name=name) == str(error.value)


def convert_widgets(**changed) -> dict:
    usual = {"lora_name": "sub/style.safetensors", "dialect": "comfy", "precision": "default", "output_name": ""}
    return {**usual, **changed}


def test_a_converted_lora_says_the_same(nodes, folder, texts):
    convert, source = nodes["Flux2KitConvertLoRA"].convert, folder / "sub" / "style.safetensors"
    content = source.read_bytes()
    lora, name = convert(**convert_widgets(), unique_id="1")
    assert Path(name) == Path("sub/style_comfy.safetensors") and lora.path == folder / name
    assert texts[0].startswith(f"{name}: ") and "tiny" in texts[0]
    before, after = (read_lora(path, DIT_TINY) for path in (source, lora.path))
    for layer, (factors,) in before.layers.items():
        assert torch.allclose(factors.delta(), after.layers[layer][0].delta(), atol=1e-5)

    _, again = convert(**convert_widgets(precision="bf16"))
    assert Path(again).name == "style_comfy_00002.safetensors" and source.read_bytes() == content
    assert {tensor.dtype for tensor in load_file(folder / again).values()} == {torch.bfloat16}
    _, named = convert(**convert_widgets(dialect="diffusers", output_name="new\\folder/mine"))
    with safe_open(folder / "new" / "folder" / "mine.safetensors", framework="pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
    assert Path(named) == Path("new/folder/mine.safetensors")


def test_a_trained_lora_is_converted_by_its_link(pack, nodes, folder):
    lora_file = sys.modules[f"{pack.__name__}.nodes.lora"].LoraFile(path=folder / "sub" / "style.safetensors")
    convert = nodes["Flux2KitConvertLoRA"].convert
    _, name = convert(**convert_widgets(lora_name="none"), lora=lora_file)
    assert (folder / name).is_file()
    with pytest.raises(ValueError, match="is connected to lora as well; choose 'none', or disconnect lora"):
        convert(**convert_widgets(), lora=lora_file)
    with pytest.raises(ValueError, match="there is no LoRA to convert; choose a file in lora_name, or connect lora"):
        convert(**convert_widgets(lora_name="none"))


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..\\out", "folder/", " ", "c:out", "a\0b"])
def test_converting_stays_inside_the_loras_folder(nodes, folder, tmp_path, name):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="does not name a file in ComfyUI's loras folder; give a name") as error:
        nodes["Flux2KitConvertLoRA"].convert(**convert_widgets(output_name=name))
    assert set(tmp_path.rglob("*")) == before
    assert nodes["Flux2KitConvertLoRA"].VALIDATE_INPUTS(output_name=name) == str(error.value)


def test_a_link_out_of_the_loras_folder_is_not_followed(nodes, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="does not name a file in ComfyUI's loras folder"):
        nodes["Flux2KitConvertLoRA"].convert(**convert_widgets(output_name="linked/out"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_changed_lora_is_converted_anew(nodes, folder):
    changed = nodes["Flux2KitConvertLoRA"].IS_CHANGED
    before = changed(**convert_widgets())
    assert before == changed(lora_name="sub/style.safetensors") and changed(lora_name="none") == ""
    os.utime(folder / "sub" / "style.safetensors", ns=(1, 1))
    assert changed(**convert_widgets()) != before
    assert "is not in ComfyUI's loras folder" in changed(lora_name="gone.safetensors")


def test_nodes_that_read_files_notice_changes_and_refuse_unknown_names(nodes):
    """An unknown name is refused before the queue, and told on the node where it comes over a link."""
    readers = []
    for node_id, node_class in nodes.items():
        schema = node_class.INPUT_TYPES()
        for name, (kind, _) in {**schema["required"], **schema.get("optional", {})}.items():
            if isinstance(kind, list) and (name.endswith("_name") or TINY in kind):
                readers.append(node_id)
                assert "is not in ComfyUI's" in node_class.VALIDATE_INPUTS(**{name: "../secret.safetensors"}), node_id
                assert node_class.VALIDATE_INPUTS(**{name: None}) is True, node_id
                changed = node_class.IS_CHANGED(**{name: kind[0]})
                assert isinstance(changed, str) and changed == node_class.IS_CHANGED(**{name: kind[0]}), node_id
    assert len(set(readers)) >= 8
