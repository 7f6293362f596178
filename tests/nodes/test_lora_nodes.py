"""The LoRA nodes in whole graphs: branches, chains, removal, merged files, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flux2_kit.flux2_core.lora_files import linear_shapes
from flux2_kit.flux2_core.variants import DIT_9B, DIT_TINY, VARIANTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY = "tiny (bundled)"


def random_lora(seed: int, config=DIT_TINY, layers: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in linear_shapes(config).items():
        if name.startswith(layers):
            stem = f"diffusion_model.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, in_features, generator=generator) / in_features**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out_features, 2, generator=generator) * 0.3
    return tensors


@pytest.fixture
def folder(host, tmp_path, monkeypatch) -> Path:
    """ComfyUI's loras folder with two LoRAs and the files that are none for this model; an output folder beside it."""
    folder = tmp_path / "models" / "loras"
    folder.mkdir(parents=True)
    save_file(random_lora(0), folder / "one.safetensors")
    save_file(random_lora(1), folder / "two.safetensors")
    save_file(random_lora(0, DIT_9B, "single_blocks.0"), folder / "of_9b.safetensors")
    whole = (folder / "one.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 8)}, folder / "sd.safetensors")
    text = {"lora_te_text_model_0.lora_down.weight": torch.ones(2, 2)}
    save_file({**random_lora(0), **text}, folder / "with_text.safetensors")
    (folder / "checkpoint.safetensors").symlink_to(host.bundled_path("dit"))
    monkeypatch.setattr(host, "FALLBACK_MODELS_DIR", tmp_path / "models")
    monkeypatch.setattr(host, "FALLBACK_OUTPUT_DIR", tmp_path / "output")
    return folder


def graph(*chain: dict) -> dict:
    """Loader, a chain of FLUX.2 Apply LoRA, Sample, Decode, preview."""
    prompt = {
        "dit": {"class_type": "Flux2KitLoadDiT", "inputs": {"dit_name": TINY, "variant": "auto", "precision": "fp32"}},
        "ae": {"class_type": "Flux2KitLoadAE", "inputs": {"ae_name": TINY}},
        "te": {
            "class_type": "Flux2KitLoadTextEncoder",
            "inputs": {"text_encoder_name": TINY, "precision": "default"},
        },
        "text": {"class_type": "Flux2KitEncodePrompt", "inputs": {"text_encoder": ["te", 0], "prompt": "a circle"}},
    }
    add_branch(prompt, "a", *chain)
    return prompt


def add_branch(prompt: dict, name: str, *chain: dict) -> None:
    """One more picture of the same loaded DiT, through LoRAs of its own."""
    last = "dit"
    for index, inputs in enumerate(chain):
        node_id = f"{name}-lora{index}"
        prompt[node_id] = {"class_type": "Flux2KitApplyLoRA", "inputs": {"dit": [last, 0], "strength": 1.0, **inputs}}
        last = node_id
    settings = {"width": 64, "height": 64, "num_steps": 1, "cfg_scale": 1.0, "guidance": 0.0, "flow_shift": 0.0}
    inputs = {"dit": [last, 0], "positive": ["text", 0], **settings, "seed": 1, "num_images": 1}
    prompt[name] = {"class_type": "Flux2KitSample", "inputs": inputs}
    prompt[f"{name}-decode"] = {
        "class_type": "Flux2KitDecode",
        "inputs": {"ae": ["ae", 0], "latent": [name, 0], "tiling": False},
    }
    prompt[f"{name}-show"] = {"class_type": "PreviewImage", "inputs": {"images": [f"{name}-decode", 0]}}


def latents(executor, prompt: dict, name: str = "a") -> torch.Tensor:
    return executor.run(prompt)[name][0]["samples"]


def lora(name: str, **inputs) -> dict:
    return {"lora_name": f"{name}.safetensors", **inputs}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_branches_and_removal_over_one_loaded_dit(executor, folder):
    without = latents(executor, graph())
    prompt = graph(lora("one"))
    add_branch(prompt, "b", lora("two", strength=-0.5))
    add_branch(prompt, "c")
    outputs = executor.run(prompt)
    one, two, bare = (outputs[name][0]["samples"] for name in "abc")
    assert executor.executed.count("dit") == 0  # still the one that was loaded for the first prompt
    assert torch.equal(bare, without)
    assert min(relative(one, without), relative(two, without), relative(one, two)) > 1e-3
    assert torch.equal(latents(executor, graph(lora("two", strength=-0.5))), two)
    assert torch.equal(latents(executor, graph()), without)
    dit = outputs["dit"][0]
    assert dit.loras == () and not any(getattr(module, "adapters", ()) for module in dit.dit.modules())


def test_chain_zero_and_none(executor, folder):
    without = latents(executor, graph())
    assert torch.equal(latents(executor, graph(lora("one", strength=0.0))), without)
    assert torch.equal(latents(executor, graph({"lora_name": "none"})), without)
    both = latents(executor, graph(lora("one"), lora("two", strength=-0.5)))
    turned = latents(executor, graph(lora("two", strength=-0.5), {"lora_name": "none"}, lora("one")))
    assert relative(both, turned) < 1e-6 < relative(both, without)
    only = latents(executor, graph(lora("one", include=r"^single_blocks\.0\.")))
    rest = latents(executor, graph(lora("one", exclude=r"^(?!single_blocks\.0\.)")))
    assert torch.equal(only, rest) and relative(only, without) > 1e-6


def test_a_stopped_run_leaves_no_lora_behind(executor, folder, host, monkeypatch):
    without = latents(executor, graph())
    with monkeypatch.context() as patches:
        patches.setattr(host, "should_stop", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            executor.run(graph(lora("one")))
    dit = executor.cache["dit"][1][0].dit
    assert not any(getattr(module, "adapters", ()) for module in dit.modules())
    prompt = graph()
    prompt["a"]["inputs"]["num_images"] = 1
    executor.cache.pop("a")
    assert torch.equal(latents(executor, prompt), without)


def test_a_changed_file_is_read_again(executor, folder, nodes):
    before = nodes["Flux2KitApplyLoRA"].IS_CHANGED(lora_name="one.safetensors", strength=1.0)
    first = latents(executor, graph(lora("one")))
    save_file(random_lora(5, layers="single"), folder / "one.safetensors")
    assert nodes["Flux2KitApplyLoRA"].IS_CHANGED(lora_name="one.safetensors") != before
    assert not torch.equal(latents(executor, graph(lora("one"))), first)
    assert nodes["Flux2KitApplyLoRA"].IS_CHANGED(lora_name="none") == ""
    assert "is not in" in nodes["Flux2KitApplyLoRA"].IS_CHANGED(lora_name="gone.safetensors")


def test_the_report_is_shown(nodes, folder, executor, monkeypatch):
    shown = []
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    executor.run(graph(lora("one", include="single_blocks"), {"lora_name": "none"}))
    told = dict(shown)
    num_layers = len(linear_shapes(DIT_TINY))
    num_single = sum("single_blocks" in name for name in linear_shapes(DIT_TINY))
    assert told["a-lora0"] == (
        f"ComfyUI (BFL names): LoRA rank 2 alpha 2 on {num_layers} layers; acts on {num_single} of {num_layers} layers"
    )
    assert told["a-lora1"] == "no LoRA" and told["a"].endswith(", 1 LoRA")


def merged_graph(*chain: dict, prefix: str = "diffusion_models/mine", precision: str = "default") -> dict:
    prompt = graph(*chain)
    last = f"a-lora{len(chain) - 1}" if chain else "dit"
    inputs = {"dit": [last, 0], "filename_prefix": prefix, "precision": precision}
    prompt["save"] = {"class_type": "Flux2KitSaveMergedDiT", "inputs": inputs}
    return prompt


def test_a_merged_file_gives_the_picture_of_the_live_loras(executor, folder, tmp_path):
    prompt = merged_graph(lora("one", strength=0.7), lora("two", strength=-0.4, exclude="img_in"))
    outputs = executor.run(prompt)
    path = Path(outputs["save"][0])
    assert path == tmp_path / "output" / "diffusion_models" / "mine_00001_.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["flux2_kit.merged_loras"] == "one.safetensors 0.7, two.safetensors -0.4"
    assert metadata["flux2_kit.variant"] == VARIANTS["tiny"].name
    (tmp_path / "models" / "diffusion_models").mkdir()
    (tmp_path / "models" / "diffusion_models" / "merged.safetensors").symlink_to(path)
    merged = graph()
    merged["dit"]["inputs"]["dit_name"] = "merged.safetensors"
    assert relative(latents(executor, merged), outputs["a"][0]["samples"]) < 1e-5

    content = path.read_bytes()
    second = Path(executor.run(merged_graph(lora("one"), precision="bf16"))["save"][0])
    assert second.name == "mine_00002_.safetensors" and path.read_bytes() == content
    assert {tensor.dtype for tensor in load_file(second).values()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../out", "..\\out", "", "folder/", " "])
def test_saving_stays_inside_the_output_folder(executor, folder, tmp_path, prefix):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="does not name a file in ComfyUI's output folder; give a name such as"):
        executor.run(merged_graph(prefix=prefix))
    assert set(tmp_path.rglob("*")) == before


def test_names_are_those_of_native_nodes(host, tmp_path, monkeypatch):
    calls = []

    def get_save_image_path(prefix: str, root: str):
        calls.append((prefix, root))
        return f"{root}/sub", "name", 7, "sub", prefix

    fake = SimpleNamespace(get_output_directory=lambda: str(tmp_path), get_save_image_path=get_save_image_path)
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    path = host.free_output_path("sub/name", ".safetensors")
    assert path == tmp_path / "sub" / "name_00007_.safetensors" and calls == [("sub/name", str(tmp_path))]
    path.touch()
    assert host.free_output_path("sub/name", ".safetensors").name == "name_00008_.safetensors"


def test_a_stopped_save_leaves_nothing(executor, folder, host, tmp_path, monkeypatch):
    prompt = merged_graph(lora("one"))
    for name in ("a", "a-decode", "a-show"):
        del prompt[name]
    monkeypatch.setattr(host, "should_stop", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        executor.run(prompt)
    assert [path for path in (tmp_path / "output").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lora("gone"), "'gone.safetensors' is not in ComfyUI's loras folder; put the file there"),
        (lora("../loras/one"), "is not in ComfyUI's loras folder"),
        (lora("one", include="(x"), r"'\(x' is no regular expression: .*; correct it, or leave it empty"),
        (lora("one", strength=11.0), "bigger than max"),
        (lora("truncated"), r"truncated\.safetensors"),
        (lora("of_9b"), "it is a LoRA of another size, klein-9b"),
        (lora("sd"), "nothing in .* matches a layer of FLUX.2"),
        (lora("checkpoint"), "is a FLUX.2 DiT, not a LoRA"),
        (lora("with_text"), "1 tensors of .* match no layer of the DiT, 1 of them a text encoder's"),
        (lora("one", exclude="."), "leave no layer of one.safetensors"),
        (lora("one", strength=float("nan")), "must be finite, got nan"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(executor, folder, inputs, message):
    without = latents(executor, graph())
    with pytest.raises(ValueError, match=message) as caught:
        executor.run(graph(inputs))
    assert "\n" not in str(caught.value)
    executor.cache.pop("a")
    assert torch.equal(latents(executor, graph()), without)


def test_text_encoder_tensors_are_left_out_on_request(executor, folder):
    wanted = latents(executor, graph(lora("one")))
    assert torch.equal(latents(executor, graph(lora("with_text", allow_unmatched=True))), wanted)


def test_an_empty_folder_still_has_a_choice(nodes, host):
    choices, _ = nodes["Flux2KitApplyLoRA"].INPUT_TYPES()["required"]["lora_name"]
    assert choices == ["none"]
    assert nodes["Flux2KitApplyLoRA"].VALIDATE_INPUTS(lora_name="none", include=None) is True
