"""What ComfyUI and its tools read of the pack, before any node runs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from flux2_kit.flux2_core.pipeline import SamplingConfig

ROOT = Path(__file__).parents[2]
NODE_IDS = [
    "Flux2KitLoadDiT",
    "Flux2KitLoadAE",
    "Flux2KitLoadTextEncoder",
    "Flux2KitEncodePrompt",
    "Flux2KitEncodeReference",
    "Flux2KitSample",
    "Flux2KitDecode",
    "Flux2KitApplyLoRA",
    "Flux2KitSaveMergedDiT",
    "Flux2KitCacheDataset",
    "Flux2KitTrainLoRA",
    "Flux2KitEmptyLatent",
    "Flux2KitPromptJSON",
    "Flux2KitInspectFile",
    "Flux2KitConvertLoRA",
    "Flux2KitToModel",
    "Flux2KitToVAE",
    "Flux2KitToCLIP",
    "Flux2KitSigmas",
    "Flux2KitEncodeImage",
]
"""They stand in people's workflows: names may be added here, never changed."""
SAMPLING_INPUTS = [
    *("dit", "positive", "width", "height", "num_steps"),
    *("cfg_scale", "guidance", "flow_shift", "seed", "num_images"),
]
TRAINING_INPUTS = [
    *("dataset", "dit_name", "variant", "output_name", "max_train_steps", "learning_rate", "rank", "alpha"),
    *("optimizer_type", "lr_scheduler", "seed", "save_every_n_steps", "sample_every_n_steps", "sample_prompts"),
    *("resume", "more_settings", "precision", "vram_budget", "network_weights"),
]
PROMPT_INPUTS = [
    *("scene", "subjects", "style", "lighting", "mood", "background", "composition"),
    *(
        "camera_angle",
        "camera_lens",
        "depth_of_field",
        "num_colors",
        "color_1",
        "color_2",
        "color_3",
        "color_4",
        "more",
    ),
]
INPUTS_AND_OUTPUTS = {
    "Flux2KitLoadDiT": (["dit_name", "variant", "precision", "vram_budget"], ["FLUX2_DIT"]),
    "Flux2KitLoadAE": (["ae_name"], ["FLUX2_AE"]),
    "Flux2KitLoadTextEncoder": (["text_encoder_name", "precision", "vram_budget"], ["FLUX2_TEXT_ENCODER"]),
    "Flux2KitEncodePrompt": (["text_encoder", "prompt"], ["CONDITIONING"]),
    "Flux2KitEncodeReference": (["ae", "image", "resize", "tiling", "references"], ["FLUX2_REFERENCES"]),
    "Flux2KitSample": (
        [*SAMPLING_INPUTS, "negative", "references", "ae", "latent", "denoise", "reference_cache"],
        ["LATENT"],
    ),
    "Flux2KitDecode": (["ae", "latent", "tiling"], ["IMAGE"]),
    "Flux2KitApplyLoRA": (
        ["dit", "lora_name", "strength", "include", "exclude", "allow_unmatched", "lora"],
        ["FLUX2_DIT"],
    ),
    "Flux2KitSaveMergedDiT": (["dit", "filename_prefix", "precision"], ["STRING"]),
    "Flux2KitCacheDataset": (
        ["dataset", "ae_name", "text_encoder_name", "variant", "resolution", "batch_size"],
        ["FLUX2_DATASET", "IMAGE", "STRING"],
    ),
    "Flux2KitTrainLoRA": (
        TRAINING_INPUTS,
        ["FLUX2_LORA", "STRING", "IMAGE", "IMAGE", "INT"],
    ),
    "Flux2KitEmptyLatent": (
        ["aspect_ratio", "megapixels", "width", "height", "batch_size"],
        ["LATENT", "INT", "INT"],
    ),
    "Flux2KitPromptJSON": (PROMPT_INPUTS, ["STRING"]),
    "Flux2KitInspectFile": (["file_name"], ["STRING"]),
    "Flux2KitConvertLoRA": (
        ["lora_name", "dialect", "precision", "output_name", "allow_unmatched", "lora"],
        ["FLUX2_LORA", "STRING"],
    ),
    "Flux2KitToModel": (["dit", "width", "height", "num_steps", "flow_shift"], ["MODEL"]),
    "Flux2KitToVAE": (["ae"], ["VAE"]),
    "Flux2KitToCLIP": (["text_encoder"], ["CLIP"]),
    "Flux2KitSigmas": (["dit", "width", "height", "num_steps", "flow_shift", "denoise"], ["SIGMAS"]),
    "Flux2KitEncodeImage": (["ae", "image", "tiling", "mask"], ["LATENT"]),
}
"""Widget values are saved by position: inputs may be added at the end, never moved."""


def inputs_of(node_class):
    schema = node_class.INPUT_TYPES()
    return {**schema["required"], **schema.get("optional", {})}


def test_ids_and_names(pack, host):
    assert list(pack.NODE_CLASS_MAPPINGS) == NODE_IDS
    assert list(pack.NODE_DISPLAY_NAME_MAPPINGS) == NODE_IDS
    assert (pack.WEB_DIRECTORY, len(set(pack.NODE_DISPLAY_NAME_MAPPINGS.values()))) == ("./web", len(NODE_IDS))
    for node_id, (names, outputs) in INPUTS_AND_OUTPUTS.items():
        node_class = pack.NODE_CLASS_MAPPINGS[node_id]
        assert list(inputs_of(node_class))[: len(names)] == names
        assert list(node_class.RETURN_TYPES)[: len(outputs)] == outputs


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_a_node_explains_itself(nodes, node_id):
    node_class = nodes[node_id]
    assert node_class.CATEGORY == "FLUX.2 Kit"
    assert node_class.DESCRIPTION.endswith(".") and node_class.SEARCH_ALIASES
    assert len(node_class.RETURN_TYPES) == len(node_class.RETURN_NAMES) == len(node_class.OUTPUT_TOOLTIPS)
    assert callable(getattr(node_class, node_class.FUNCTION))
    for name, (kind, options) in inputs_of(node_class).items():
        assert len(options["tooltip"]) > 10, name
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name
        assert kind != "FLOAT" or "step" in options, name
        assert not isinstance(kind, list) or kind, name


def test_defaults_are_those_of_the_core(nodes):
    defaults = {field.name: field.default for field in fields(SamplingConfig)}
    renamed = {"resize": "resize_references", "tiling": "tile_autoencoder", "denoise": "strength"}
    seen = set()
    for node_id, node_class in nodes.items():
        for name, (_, options) in inputs_of(node_class).items():
            name = renamed.get(name, name)
            if name in defaults and node_id != "Flux2KitEmptyLatent":  # its sizes are its own, not those of a variant
                seen.add(name)
                default = defaults[name]
                assert options["default"] == (0 if default is None else default), name
    assert seen == set(defaults)


def test_a_loader_always_offers_a_choice_that_works(nodes):
    for node_id in NODE_IDS[:3]:
        name, (choices, _) = next(iter(inputs_of(nodes[node_id]).items()))
        assert choices == ["tiny (bundled)"], name


def test_importing_the_pack_is_light(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import load_pack
load_pack()
heavy = ("transformers", "diffusers", "accelerate", "bitsandbytes", "huggingface_hub", "safetensors.torch", "comfy")
print(*[name for name in (*heavy, "folder_paths", "server", "nodes") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


def test_the_library_does_not_load_the_nodes():
    code = "import sys, flux2_kit, flux2_kit.flux2_core.variants; print('flux2_kit.nodes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_entry_can_be_imported_as_a_bare_module(tmp_path):
    code = f"import importlib.util as u; s = u.spec_from_file_location('bare', {str(ROOT / '__init__.py')!r}); "
    code += "m = u.module_from_spec(s); m.__package__ = ''; s.loader.exec_module(m); "
    code += "print(hasattr(m, 'NODE_CLASS_MAPPINGS'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_requirements_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    dependencies = re.findall(r'"(.*)",', block[1])
    assert (ROOT / "requirements.txt").read_text().splitlines() == dependencies
