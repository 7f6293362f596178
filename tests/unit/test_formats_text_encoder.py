"""Text encoders in fp8 and nf4: which tensors are quantised, fp8 files, and what it does to the text embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_kit.flux2_core.linear import FORMATS, Linear
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
