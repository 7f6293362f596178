"""Whether two encoders encode alike is told from their files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from flux2_kit.flux2_core.checkpoint import load_autoencoder, save_autoencoder
from flux2_kit.flux2_core.text_encoder import load_text_encoder
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import find_weights
from flux2_kit.training import fingerprint
from flux2_kit.training.fingerprint import identify_autoencoder, identify_text_encoder
from safetensors.torch import load_file, save_file

TINY = VARIANTS["tiny"]
AUTOENCODER = find_weights(TINY, "autoencoder")
TEXT_ENCODER = find_weights(TINY, "text_encoder")


@pytest.fixture
def text_encoder(tmp_path):
    return shutil.copytree(TEXT_ENCODER, tmp_path / "text_encoder")


def of_text(path, **settings) -> str:
    return identify_text_encoder(path, TINY.text_encoder, **settings).fingerprint


def test_what_is_told_of_an_encoder():
    autoencoder = identify_autoencoder(AUTOENCODER)
    assert (autoencoder.dtype, autoencoder.channels, autoencoder.reference_sides) == ("float32", 128, (64, 64))
    assert identify_autoencoder(AUTOENCODER, torch.bfloat16) == replace(autoencoder, dtype="bfloat16")
    text = identify_text_encoder(TEXT_ENCODER, TINY.text_encoder)
    loaded = load_text_encoder(TEXT_ENCODER, TINY.text_encoder)
    assert text.torch_dtype == loaded.dtype
    assert (text.family, text.context_dim, text.max_tokens) == ("qwen3", 192, 24)


@pytest.mark.parametrize("layout", ["bfl", "diffusers", "comfyui"])
def test_the_layout_and_the_decoder_do_not_count(tmp_path, layout):
    autoencoder = load_autoencoder(AUTOENCODER)
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight += 1
    path = save_autoencoder(tmp_path / "other.safetensors", autoencoder, layout)
    assert identify_autoencoder(path).fingerprint == identify_autoencoder(AUTOENCODER).fingerprint


@pytest.mark.parametrize("name", ["encoder.down.1.block.0.conv1.weight", "encoder.quant_conv.bias", "bn.running_var"])
def test_one_weight_of_the_autoencoder_counts(tmp_path, name):
    tensors = load_file(AUTOENCODER)
    tensors[name].view(-1)[-1] += 0.01
    save_file(tensors, tmp_path / "other.safetensors", {"flux2_kit.num_norm_groups": "8"})
    assert (
        identify_autoencoder(tmp_path / "other.safetensors").fingerprint
        != identify_autoencoder(AUTOENCODER).fingerprint
    )


def test_the_number_of_groups_counts(tmp_path):
    for groups in ("8", "4"):
        save_file(load_file(AUTOENCODER), tmp_path / f"{groups}.safetensors", {"flux2_kit.num_norm_groups": groups})
    eight, four = (identify_autoencoder(tmp_path / f"{groups}.safetensors").fingerprint for groups in ("8", "4"))
    assert eight == identify_autoencoder(AUTOENCODER).fingerprint != four


def test_large_files_are_sampled_in_every_tensor(text_encoder, monkeypatch):
    monkeypatch.setattr(fingerprint, "MAX_WHOLE_BYTES", 0)
    before = of_text(text_encoder)
    tensors = load_file(text_encoder / "model.safetensors")
    for name in [name for name in tensors if name.startswith(("model.layers.2.mlp", "layers.2.mlp"))]:
        for place in (0, -1):
            changed = {key: tensor.clone() for key, tensor in tensors.items()}
            changed[name].view(-1)[place] += 1
            save_file(changed, text_encoder / "model.safetensors", {"format": "pt"})
            assert of_text(text_encoder) != before
    save_file(tensors, text_encoder / "model.safetensors", {"format": "pt"})
    assert of_text(text_encoder) == before


def test_layers_that_are_not_run_do_not_count(text_encoder):
    before = of_text(text_encoder)
    tensors = load_file(text_encoder / "model.safetensors")
    prefix = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight")).partition("layers.")[0]
    more = {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}layers.2.")
    }
    save_file(tensors | more | {"lm_head.weight": torch.zeros(2, 2)}, text_encoder / "model.safetensors")
    assert of_text(text_encoder) == before
    tensors[f"{prefix}layers.2.self_attn.q_proj.weight"].view(-1)[0] += 1
    save_file(tensors, text_encoder / "model.safetensors")
    assert of_text(text_encoder) != before


@pytest.mark.parametrize("change", ["tokenizer", "template", "settings"])
def test_tokenizer_template_and_settings_count(text_encoder, change):
    before = of_text(text_encoder)
    if change == "tokenizer":
        data = json.loads((text_encoder / "tokenizer.json").read_text())
        data["normalizer"] = {"type": "Lowercase"}
        (text_encoder / "tokenizer.json").write_text(json.dumps(data))
    elif change == "template":
        (text_encoder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    else:
        data = json.loads((text_encoder / "config.json").read_text())
        assert data["rms_norm_eps"]
        (text_encoder / "config.json").write_text(json.dumps(data | {"transformers_version": "0", "note": "no matter"}))
        assert of_text(text_encoder) == before
        (text_encoder / "config.json").write_text(json.dumps(data | {"rms_norm_eps": 1e-3}))
    assert of_text(text_encoder) != before
    if change == "tokenizer":
        assert of_text(text_encoder, tokenizer=TEXT_ENCODER) == before


def test_other_files_are_refused():
    with pytest.raises(ValueError, match=r"not a FLUX\.2 autoencoder"):
        identify_autoencoder(find_weights(TINY, "dit"))
    with pytest.raises(ValueError, match=r"not a FLUX\.2 text encoder"):
        identify_text_encoder(AUTOENCODER, TINY.text_encoder)
    with pytest.raises(ValueError, match=r"width 64, but this FLUX\.2 model needs Qwen/Qwen3-4B"):
        identify_text_encoder(TEXT_ENCODER, VARIANTS["klein-4b"].text_encoder)
