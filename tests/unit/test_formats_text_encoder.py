"""Text encoders in fp8 and nf4: which tensors are quantised, fp8 files, and what it does to the text embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_kit.flux2_core import fp8
from flux2_kit.flux2_core.cli import main
from flux2_kit.flux2_core.linear import FORMATS, Linear
from flux2_kit.flux2_core.quantized_text_encoder import quantise_text_encoder
from flux2_kit.flux2_core.tensor_source import TensorSource
from flux2_kit.flux2_core.text_encoder import TextEncoder, load_text_encoder
from flux2_kit.flux2_core.variants import TextEncoderConfig
from flux2_kit.flux2_core.weights import TINY_FILES, TINY_FOLDER
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH, NUM_LAYERS = 128, 4
FORMAT_NAMES = ("fp8", "nf4")
SPECIAL_TOKENS = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>"],
}
PROMPTS = ["a large red circle at the top left on a blue background", ""]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def config(family: Any) -> TextEncoderConfig:
    return TextEncoderConfig(
        family=family, hidden_size=WIDTH, layers=(1, 2, 3), max_tokens=256, tokenizer_id="tests/none"
    )


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def folder(request, tmp_path_factory) -> Path:
    """A random language model of four layers with its tokenizer, as Hugging Face saves it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

    path = tmp_path_factory.mktemp(request.param)
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": WIDTH**-0.5,
    }
    torch.manual_seed(0)
    is_qwen3 = request.param == "qwen3"
    model: Any = Qwen3Model(Qwen3Config(**shape)) if is_qwen3 else MistralModel(MistralConfig(**shape))
    model.save_pretrained(path)
    pieces = [*SPECIAL_TOKENS[request.param], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS[request.param]])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def load(folder: Path, **options: Any) -> TextEncoder:
    family = json.loads((folder / "config.json").read_text())["model_type"]
    return load_text_encoder(folder, config(family), **options)


@pytest.mark.parametrize("precision", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_linears_are_quantised_and_all_else_is_plain(folder, precision, dtype):
    with torch.inference_mode():
        encoder = load(folder, precision=precision, dtype=dtype)
    plain = load(folder)
    kinds = {name: module for name, module in encoder.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(kinds) == 7 * 3 and encoder.dtype == (dtype or torch.float32)
    for name, linear in kinds.items():
        assert isinstance(linear, Linear) and linear.weight_format == precision and linear.weight_scale is not None
        weight, scale = FORMATS[precision].quantise(plain.model.get_submodule(name).weight)
        assert torch.equal(linear.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(linear.weight_scale, scale)
    for name, tensor in plain.model.state_dict().items():
        if name.removesuffix(".weight") not in kinds:
            assert torch.equal(encoder.model.state_dict()[name], tensor.to(encoder.dtype))
    assert not any(t.requires_grad or t.is_inference() for t in encoder.model.state_dict().values())
    assert encoder.encode(PROMPTS).embeddings.dtype == encoder.dtype


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 0.12), ("nf4", 0.4)])
def test_the_embedding_of_a_random_model(folder, precision, limit):
    # Layers of random numbers hand an error on three times as large; trained ones do not, see below.
    expected = load(folder).encode(PROMPTS).embeddings
    found = load(folder, precision=precision).encode(PROMPTS).embeddings
    assert limit / 4 < relative(found, expected) < limit


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 0.035), ("nf4", 0.13)])
def test_the_embedding_of_the_bundled_model(precision, limit):
    path = TINY_FOLDER / TINY_FILES["text_encoder"]
    expected = load_text_encoder(path, dtype=torch.float32).encode(PROMPTS).embeddings
    found = load_text_encoder(path, dtype=torch.float32, precision=precision).encode(PROMPTS).embeddings
    assert limit / 4 < relative(found, expected) < limit


@pytest.mark.parametrize("style", ["tensor", "rows", "blocks", "unscaled"])
def test_fp8_files_keep_their_numbers_where_the_scales_allow_it(folder, tmp_path, style):
    stored = load_file(folder / "model.safetensors")
    for name, tensor in list(stored.items()):
        if "_proj" in name:
            stored[name] = (tensor * 200).to(torch.float8_e4m3fn)
            scale = {"tensor": torch.rand(()), "rows": torch.rand(len(tensor), 1)}.get(
                style, torch.rand(len(tensor), 4)
            )
            if style != "unscaled":
                stored |= {f"{name}_scale": scale, f"{name.replace('weight', 'input_scale')}": torch.ones(())}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(stored, tmp_path / "model.safetensors")
    encoder, multiplied_out = load(tmp_path, precision="fp8"), load(tmp_path)
    for name, linear in encoder.model.named_modules():
        if not isinstance(linear, Linear):
            continue
        assert linear.weight_scale is not None and linear.weight_scale.shape == (linear.out_features, 1)
        same = torch.equal(linear.weight.float(), stored[f"{name}.weight"].float())
        assert same == (style != "blocks")
        error = relative(linear.dense_weight(), multiplied_out.model.get_submodule(name).weight)
        assert error < 0.03 if style == "blocks" else error == 0


def test_bf16_is_a_precision_and_others_are_refused(folder):
    assert load(folder, precision="bf16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="contradict"):
        load(folder, precision="bf16", dtype=torch.float32)
    with pytest.raises(ValueError, match="allowed are bf16, fp8, nf4"):
        load(folder, precision="int8")


# Files that are written


FILE_FORMATS = ("fp8", "fp8-comfy")
TOKENIZER = b'{"config": {}, "vocab": []}'


def quantised(folder: Path, target: Path, file_format: Any) -> Path:
    """The folder with quantised weights in it; Mistral's tokenizer goes into a file for ComfyUI."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    (target / "tekken.json").write_bytes(TOKENIZER)
    source = target / "source.safetensors"
    source.write_bytes((folder / "model.safetensors").read_bytes())
    path = quantise_text_encoder(source, target / "model.safetensors", file_format, config(family_of(folder)))
    source.unlink()
    (target / "tekken.json").unlink()
    return path


def family_of(folder: Path) -> str:
    return "qwen3" if "qwen3" in folder.name else "mistral"


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_a_written_file_holds_what_its_format_says(folder, tmp_path, file_format):
    path = quantised(folder, tmp_path / "new", file_format)
    plain, found = load_file(folder / "model.safetensors"), load_file(path)
    metadata = TensorSource(path).metadata
    num_layers = NUM_LAYERS if file_format == "fp8-comfy" else 3
    linears = [name for name in plain if "_proj" in name and int(name.split(".")[1]) < num_layers]
    others = [name for name in plain if "norm" in name and name.startswith("layers.")]
    others = ["embed_tokens.weight", *(name for name in others if int(name.split(".")[1]) < num_layers)]
    expected = {f"model.{name}" for name in (*linears, *others)} | {f"model.{name}_scale" for name in linears}
    if file_format == "fp8-comfy":
        expected |= {"model.norm.weight"} | ({"tekken_model"} if family_of(folder) == "mistral" else set())
        layers = {f"model.{name.removesuffix('.weight')}": {"format": "float8_e4m3fn"} for name in linears}
        assert json.loads(metadata["_quantization_metadata"]) == {"format_version": "1.0", "layers": layers}
    else:
        assert metadata["flux2_kit.weight_format"] == "fp8" and "_quantization_metadata" not in metadata
    assert set(found) == expected
    if "tekken_model" in found:
        assert found["tekken_model"].numpy().tobytes() == TOKENIZER
    for name in linears:
        quantise = fp8.quantise if file_format == "fp8" else fp8.quantise_per_tensor
        weight, scale = quantise(plain[name])
        assert torch.equal(found[f"model.{name}"].float(), weight.float()), name
        assert torch.equal(found[f"model.{name}_scale"], scale)
    assert all(torch.equal(found[f"model.{name}"], plain[name].bfloat16()) for name in others)


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_a_written_file_runs_without_a_second_quantisation_and_is_kept_when_written_again(
    folder, tmp_path, file_format
):
    path = quantised(folder, tmp_path / "new", file_format)
    if "mistral" in folder.name and file_format == "fp8-comfy":  # the tokenizer of this test is no real one
        tensors = {name: tensor for name, tensor in load_file(path).items() if name != "tekken_model"}
        save_file(tensors, path)
        (path.parent / "tekken.json").write_bytes(TOKENIZER)
    stored = load_file(path)
    encoder = load(path.parent, precision="fp8")
    for name, linear in encoder.model.named_modules():
        if isinstance(linear, Linear):
            assert torch.equal(linear.weight.float(), stored[f"model.{name}.weight"].float())
    expected = load(folder, precision="fp8", dtype=torch.bfloat16).encode(PROMPTS).embeddings
    assert relative(encoder.encode(PROMPTS).embeddings, expected) < (1e-6 if file_format == "fp8" else 0.2)
    again = quantise_text_encoder(path, tmp_path / "again.safetensors", file_format, config(family_of(folder)))
    for name, tensor in load_file(again).items():
        if name in stored:
            assert torch.equal(tensor.float(), stored[name].float()), name
    spread = quantise_text_encoder(path, tmp_path / "spread.safetensors", "fp8", config(family_of(folder)))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_file(spread)[name].float(), stored[name].float())


def test_the_command_writes_one_and_refuses_what_does_not_fit(folder, random_tiny_files, tmp_path, capsys):
    def run(*options: str) -> tuple[int, str]:
        code = main(["quantize", "--output", str(tmp_path / "out.safetensors"), *options])
        return code, capsys.readouterr().err

    tiny = str(random_tiny_files.text_encoder)
    code, said = run("--text_encoder", tiny, "--format", "fp8", "--lora_weight", "x.safetensors")
    assert code == 1 and "--lora_weight is for a DiT" in said
    code, said = run("--text_encoder", str(random_tiny_files.dit), "--format", "fp8")
    assert code == 1 and "not a FLUX.2 text encoder" in said
    if family_of(folder) == "mistral":
        code, said = run("--text_encoder", str(folder), "--format", "fp8-comfy")
        assert code == 1 and "no text encoder of FLUX.2" in said
        with pytest.raises(ValueError, match=r"put tekken\.json of Mistral Small 3 beside"):
            quantise_text_encoder(folder, tmp_path / "out.safetensors", "fp8-comfy", config("mistral"))
    assert not list(tmp_path.iterdir())
    assert run("--text_encoder", tiny, "--dit", tiny, "--format", "fp8")[0] == 2
    assert run("--text_encoder", tiny, "--format", "fp8") == (0, "")
    assert "model.layers.0.mlp.up_proj.weight_scale" in load_file(tmp_path / "out.safetensors")
