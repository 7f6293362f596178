"""Loading text encoders: layouts, tokenizers, and files that do not fit."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_kit.flux2_core import text_encoder as text_encoder_module
from flux2_kit.flux2_core.text_encoder import KNOWN_SETTINGS, LanguageModelSettings, TextEncoder, load_text_encoder
from flux2_kit.flux2_core.tokenizer import SYSTEM_MESSAGE, read_tekken
from flux2_kit.flux2_core.variants import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B, QWEN3_TINY, TextEncoderConfig
from safetensors.torch import save_file
from torch import Tensor

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS, NUM_KEY_VALUE_HEADS, HEAD_DIM = 16, 24, 4, 2, 8
NUM_LAYERS, VOCAB_SIZE = 5, 300
CONFIGS = {
    family: TextEncoderConfig(
        family=family, hidden_size=HIDDEN_SIZE, layers=(1, 2, 3), max_tokens=max_tokens, tokenizer_id="tests/none"
    )
    for family, max_tokens in (("qwen3", 80), ("mistral", 256))
}
SETTINGS = LanguageModelSettings(
    rope_theta=1e5, rms_norm_eps=1e-5, num_heads=NUM_HEADS, num_key_value_heads=NUM_KEY_VALUE_HEADS, head_dim=HEAD_DIM
)
CONFIG_JSON = {
    "hidden_size": HIDDEN_SIZE,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KEY_VALUE_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
}
SPECIAL_TOKENS = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>", "[IMG]"],
}
TEKKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tokenizer from this machine's cache; the small test models count as known ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for family in ("qwen3", "mistral"):
        monkeypatch.setitem(text_encoder_module.KNOWN_SETTINGS, (family, HIDDEN_SIZE), SETTINGS)


def make_weights(family: str, num_layers: int = NUM_LAYERS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random language model under the names of transformers' bare classes."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        noise = 0.3 * torch.randn(shape, generator=generator)
        return (noise + 1 if len(shape) == 1 else noise).to(dtype)

    queries, keys = NUM_HEADS * HEAD_DIM, NUM_KEY_VALUE_HEADS * HEAD_DIM
    tensors = {"embed_tokens.weight": random(VOCAB_SIZE, HIDDEN_SIZE)}
    for layer in range(num_layers):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (HIDDEN_SIZE,),
            "post_attention_layernorm": (HIDDEN_SIZE,),
            "self_attn.q_proj": (queries, HIDDEN_SIZE),
            "self_attn.k_proj": (keys, HIDDEN_SIZE),
            "self_attn.v_proj": (keys, HIDDEN_SIZE),
            "self_attn.o_proj": (HIDDEN_SIZE, queries),
            "mlp.gate_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "mlp.up_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "mlp.down_proj": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
        if family == "qwen3":
            shapes |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
        tensors |= {f"layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    return tensors


def prefixed(tensors: dict[str, Tensor], prefix: str = "model.") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_weights(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def write_tokenizer(directory: Path, family: str, **config: Any) -> Path:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    pieces = [*SPECIAL_TOKENS[family], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS[family]])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def make_tekken(special_tokens: bool = True) -> dict[str, Any]:
    """The layout of Mistral's tekken.json: bytes, then tokens longer than one byte, in order of rank."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ca", b"at", b"cat", b" c", b" cat", b"never"]  # "never" cannot be reached by merges
    data: dict[str, Any] = {
        "config": {
            "pattern": TEKKEN_PATTERN,
            "default_vocab_size": 20 + len(tokens),
            "default_num_special_tokens": 20,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate([*tokens, b"beyond"])
        ],
    }
    if special_tokens:
        names = {1: "<s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]"}
        data["special_tokens"] = [
            {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True} for rank in range(20)
        ]
    return data


def reference(tmp_path: Path, family: str, tensors: dict[str, Tensor] | None = None) -> TextEncoder:
    """The plainest way to load: one file under bare names, a tokenizer beside it."""
    path = write_weights(tmp_path / "reference" / "weights.safetensors", tensors or make_weights(family))
    write_tokenizer(path.parent, family)
    return load_text_encoder(path, CONFIGS[family])


def embed(encoder: TextEncoder) -> Tensor:
    return encoder.encode(["a cat", ""]).embeddings


def test_import_is_light() -> None:
    code = (
        "import sys; import flux2_kit.flux2_core.text_encoder; "
        "assert not {'transformers', 'tokenizers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_of_released_models() -> None:
    assert {MISTRAL_SMALL.family, QWEN3_4B.family, QWEN3_8B.family} == {"mistral", "qwen3"}
    for config in (MISTRAL_SMALL, QWEN3_4B, QWEN3_8B):
        settings = KNOWN_SETTINGS[config.family, config.hidden_size]
        assert (settings.num_heads, settings.num_key_value_heads, settings.head_dim) == (32, 8, 128)
        expected = (1e9, 1e-5) if config is MISTRAL_SMALL else (1e6, 1e-6)
        assert (settings.rope_theta, settings.rms_norm_eps) == expected
    assert "object relationships, object\nattribution" in SYSTEM_MESSAGE


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model.", "language_model."])
def test_prefixes_and_unused_parts(tmp_path: Path, family: str, prefix: str) -> None:
    tensors = prefixed(make_weights(family), prefix)
    tensors |= {f"{prefix}norm.weight": torch.zeros(HIDDEN_SIZE), "lm_head.weight": torch.zeros(2, HIDDEN_SIZE)}
    if family == "mistral":
        tensors |= {
            "vision_tower.ln_pre.weight": torch.zeros(2),
            "model.multi_modal_projector.norm.weight": torch.ones(1),
        }
    path = write_weights(tmp_path / "file.safetensors", tensors)
    encoder = load_text_encoder(path, CONFIGS[family], tokenizer=write_tokenizer(tmp_path / "elsewhere", family))
    assert len(encoder.model.layers) == 3
    assert torch.equal(embed(encoder), embed(reference(tmp_path, family)))


def test_diffusers_repository_and_shards(tmp_path: Path) -> None:
    tensors = prefixed(make_weights("qwen3"))
    names = sorted(tensors)
    folder = tmp_path / "repository" / "text_encoder"
    for index, chunk in enumerate((names[:20], names[20:]), start=1):
        file = folder / f"model-0000{index}-of-00002.safetensors"
        write_weights(file, {name: tensors[name] for name in chunk})
    write_tokenizer(tmp_path / "repository" / "tokenizer", "qwen3")
    expected = embed(reference(tmp_path, "qwen3"))
    for path in (folder.parent, folder, folder / "model-00001-of-00002.safetensors"):
        assert torch.equal(embed(load_text_encoder(path, CONFIGS["qwen3"])), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        load_text_encoder(folder, CONFIGS["qwen3"])


def test_pruned_mistral_with_its_own_tokenizer(tmp_path: Path) -> None:
    tensors = prefixed(make_weights("mistral", num_layers=3))
    tensors["tekken_model"] = torch.frombuffer(bytearray(json.dumps(make_tekken()).encode()), dtype=torch.uint8)
    path = write_weights(tmp_path / "mistral.safetensors", tensors)
    encoder = load_text_encoder(path, CONFIGS["mistral"])
    assert encoder.tokenizer.pad_id == 11
    assert encoder.encode(["a cat"]).embeddings.shape == (1, 256, 3 * HIDDEN_SIZE)


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8(tmp_path: Path, suffix: str, per_row: bool) -> None:
    plain, stored = (
        make_weights("qwen3", dtype=torch.bfloat16),
        {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)},
    )
    for name, tensor in list(plain.items()):
        if "_proj" not in name:
            stored[f"model.{name}"] = tensor
            continue
        values = tensor.float()
        scale = values.abs().amax(dim=1, keepdim=True) / 448 if per_row else values.abs().amax() / 448
        quantised = (values / scale).to(torch.float8_e4m3fn)
        module = f"model.{name.removesuffix('.weight')}"
        marker = json.dumps({"format": "float8_e4m3fn"}).encode()
        stored |= {
            f"{module}.weight": quantised,
            f"{module}.{suffix}": scale,
            f"{module}.input_scale": torch.ones(()),
            f"{module}.comfy_quant": torch.frombuffer(bytearray(marker), dtype=torch.uint8),
        }
        plain[name] = (quantised.float() * scale).to(torch.bfloat16)
    path = write_weights(tmp_path / "fp8.safetensors", stored)
    encoder = load_text_encoder(path, CONFIGS["qwen3"], tokenizer=write_tokenizer(tmp_path / "tokenizer", "qwen3"))
    assert encoder.dtype == torch.bfloat16
    assert torch.equal(embed(encoder), embed(reference(tmp_path, "qwen3", plain)))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.comfy_quant", b'{"format": "nvfp4"}', "quantised as nvfp4"),
        ("model.layers.1.mlp.up_proj.comfy_quant", b"[", "not a description"),
        ("model.layers.1.mlp.up_proj.weight_scale_2", torch.ones(1), "not understood"),
        ("model.layers.1.self_attn.q_proj.bias", torch.ones(32), "not understood"),
        ("model.layers.1.mlp.up_proj.weight_scale", torch.ones(1), "not supported"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(24, 16, dtype=torch.int8), "has the type I8"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(24, 17), r"has shape \[24, 17\], expected \[24, 16\]"),
        ("model.visual.proj.weight", torch.ones(1), "not understood"),
        ("model.embed_tokens.weight", torch.ones(3), "expected two axes"),
    ],
)
def test_weights_that_are_not_understood(tmp_path: Path, name: str, tensor: Tensor | bytes, message: str) -> None:
    if isinstance(tensor, bytes):
        tensor = torch.frombuffer(bytearray(tensor), dtype=torch.uint8)
    path = write_weights(tmp_path / "file.safetensors", prefixed(make_weights("qwen3")) | {name: tensor})
    write_tokenizer(tmp_path, "qwen3")
    with pytest.raises(ValueError, match=message):
        load_text_encoder(path, CONFIGS["qwen3"])


def test_files_that_are_no_fitting_text_encoder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen3")
    weights = prefixed(make_weights("qwen3"))
    path = write_weights(tmp_path / "qwen3.safetensors", weights)
    with pytest.raises(
        ValueError, match=r"Qwen3 with hidden size 16, but .* needs Mistral Small 3 \(24B\), Mistral with"
    ):
        load_text_encoder(path, MISTRAL_SMALL)
    with pytest.raises(ValueError, match="needs Qwen3-8B"):
        load_text_encoder(path, QWEN3_8B)
    with pytest.raises(ValueError, match=r"no text encoder of FLUX.2; these are: .*Qwen3-4B"):
        load_text_encoder(path)
    with pytest.raises(ValueError, match=r"not a FLUX.2 text encoder"):
        load_text_encoder(write_weights(tmp_path / "dit.safetensors", {"img_in.weight": torch.ones(1)}), QWEN3_4B)
    del weights["model.layers.2.self_attn.o_proj.weight"]
    with pytest.raises(ValueError, match=r"incomplete: 1 tensors .* model.layers.2.self_attn.o_proj.weight"):
        load_text_encoder(write_weights(tmp_path / "cut.safetensors", weights), CONFIGS["qwen3"])
    short = prefixed(make_weights("qwen3", num_layers=2))
    with pytest.raises(ValueError, match="incomplete"):
        load_text_encoder(write_weights(tmp_path / "short.safetensors", short), CONFIGS["qwen3"])
    with pytest.raises(ValueError, match="does not exist"):
        load_text_encoder(tmp_path / "nothing.safetensors")


def test_config_is_found_by_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(QWEN3_TINY, hidden_size=HIDDEN_SIZE, max_tokens=80)
    monkeypatch.setattr(text_encoder_module, "CONFIGS", (MISTRAL_SMALL, config))
    path = write_weights(tmp_path / "file.safetensors", make_weights("qwen3"))
    write_tokenizer(tmp_path, "qwen3")
    assert load_text_encoder(path).config is config


def test_config_json_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = embed(reference(tmp_path, "mistral"))
    path = write_weights(tmp_path / "model.safetensors", make_weights("mistral"))
    write_tokenizer(tmp_path, "mistral")
    file = tmp_path / "config.json"
    monkeypatch.delitem(text_encoder_module.KNOWN_SETTINGS, ("mistral", HIDDEN_SIZE))

    def load(**changes: Any) -> Tensor:
        file.write_text(json.dumps({"text_config": {"model_type": "mistral", **CONFIG_JSON, **changes}}))
        return embed(load_text_encoder(path, CONFIGS["mistral"]))

    assert torch.equal(load(), expected)
    assert torch.equal(load(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e5}), expected)
    assert not torch.equal(load(rope_theta=10.0), expected)
    assert not torch.equal(load(rms_norm_eps=0.5), expected)
    with pytest.raises(ValueError, match="rope_type"):
        load(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="sliding_window"):
        load(sliding_window=16)
    with pytest.raises(ValueError, match="no usable configuration"):
        load(rms_norm_eps="x")
    with pytest.raises(ValueError, match="no language model can have"):
        load(num_attention_heads=-4)
    with pytest.raises(ValueError, match=r"has shape \[32, 16\]"):
        load(num_attention_heads=8)
    for content, message in (("[]", "must hold a JSON object"), ("{", "not valid JSON"), ("{}", "put its config.json")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_text_encoder(path, CONFIGS["mistral"])


def test_another_model_of_the_same_width_is_refused(tmp_path: Path) -> None:
    tensors = make_weights("mistral")
    tensors |= {f"layers.{i}.self_attn.k_proj.weight": torch.zeros(NUM_HEADS * HEAD_DIM, HIDDEN_SIZE) for i in range(5)}
    path = write_weights(tmp_path / "llama.safetensors", tensors)
    write_tokenizer(tmp_path, "mistral")
    with pytest.raises(ValueError, match=r"k_proj.weight .* has shape"):
        load_text_encoder(path, CONFIGS["mistral"])


def test_tokenizer_lookup_order(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "text_encoder"
    path = write_weights(folder / "model.safetensors", make_weights("qwen3"))

    def place() -> str | None:
        return load_text_encoder(path, CONFIGS["qwen3"]).tokenizer.chat_template

    with pytest.raises(
        ValueError, match=r"tokenizer.json and tokenizer_config.json, or tekken.json, of tests/none .*--tok"
    ):
        place()
    snapshot = tmp_path / "cache" / "models--tests--none" / "snapshots" / "abc"
    write_tokenizer(snapshot, "qwen3", chat_template="cache")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    assert place() == "cache"
    write_tokenizer(folder.parent / "tokenizer", "qwen3", chat_template="sibling")
    assert place() == "sibling"
    write_tokenizer(folder / "tokenizer", "mistral")  # of another model: passed over
    assert place() == "sibling"
    write_tokenizer(folder / "tokenizer", "qwen3", chat_template="inside")
    assert place() == "inside"
    write_tokenizer(folder, "qwen3", chat_template="beside")
    assert place() == "beside"
    (folder / "chat_template.jinja").write_text("jinja")
    assert place() == "jinja"
    write_tokenizer(tmp_path / "named" / "tokenizer", "qwen3", chat_template="named")
    for named in (tmp_path / "named", tmp_path / "named" / "tokenizer" / "tokenizer.json"):
        assert load_text_encoder(path, CONFIGS["qwen3"], tokenizer=named).tokenizer.chat_template == "named"


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    path = write_weights(
        tmp_path / "file.safetensors", make_weights("qwen3") | {"embed_tokens.weight": torch.ones(9, 16)}
    )
    write_tokenizer(tmp_path, "qwen3")
    with pytest.raises(ValueError, match=r"passed over: .*its ids go to 258, the embedding has 9 rows"):
        load_text_encoder(path, CONFIGS["qwen3"])
    other = write_tokenizer(tmp_path / "other", "mistral")
    with pytest.raises(ValueError, match=r"lacks the tokens <\|im_start\|>"):
        load_text_encoder(path, CONFIGS["qwen3"], tokenizer=other)
    for name, content, message in (
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tekken.json", "{}", "not a tekken tokenizer"),
        ("vocab.txt", "a", "expected a folder"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_text_encoder(path, CONFIGS["qwen3"], tokenizer=tmp_path / name)
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_text_encoder(path, CONFIGS["qwen3"], tokenizer=tmp_path / "absent")


def test_broken_chat_template(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file.safetensors", make_weights("qwen3"))
    for template in ("{% if", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"):
        write_tokenizer(tmp_path, "qwen3", chat_template=template)
        with pytest.raises(ValueError, match="chat template does not work"):
            load_text_encoder(path, CONFIGS["qwen3"]).encode(["a"])


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tekken(special_tokens: bool) -> None:
    tokenizer = read_tekken(json.dumps(make_tekken(special_tokens)).encode())
    assert tokenizer.encode("<s>[INST]").ids == [1, 3]
    assert tokenizer.token_to_id("<pad>") == 11
    first = 20 + 256
    assert tokenizer.encode("cat").ids == [first + 2]
    assert tokenizer.encode("cat cats").ids == [first + 2, first + 4, 20 + ord("s")]
    assert tokenizer.encode("never").ids == [first + 5]  # whole pieces are looked up before merging
    assert tokenizer.encode("beyond").ids == [20 + byte for byte in b"beyond"]  # cut off by default_vocab_size
    assert tokenizer.encode("é\n").ids == [20 + byte for byte in "é\n".encode()]
    assert tokenizer.decode(tokenizer.encode("a cat, 42 Bären").ids) == "a cat, 42 Bären"


def test_tekken_json_as_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file.safetensors", make_weights("mistral"))
    (tmp_path / "tekken.json").write_text(json.dumps(make_tekken()))
    encoder = load_text_encoder(path, CONFIGS["mistral"])
    text = encoder.tokenizer.format_prompt("a [IMG]cat")
    assert text == f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]a cat[/INST]"
    tokens = encoder.tokenizer(["a cat"], 256)
    assert tokens.ids[0, 0] == 11 and tokens.ids[0, -1] == 4
    kept = tokens.ids[0][tokens.attention_mask[0] == 1].tolist()
    assert kept[:2] == [1, 17] and kept.count(1) == 1


def test_long_prompts_are_cut_and_counted(tmp_path: Path) -> None:
    encoder = reference(tmp_path, "qwen3")
    length = len(encoder.tokenizer.backend.encode(encoder.tokenizer.format_prompt("")).ids)
    room = encoder.config.max_tokens - length
    encoding = encoder.encode(["", "x" * room, "x" * (room + 7)])
    assert encoding.num_cut == (0, 0, 7)
    assert encoding.attention_mask.sum(dim=1).tolist() == [length, 80, 80]
    assert encoder.tokenizer([""], 80).ids[0, -1] == encoder.tokenizer.pad_id == 0


def test_rows_of_a_batch_are_independent(tmp_path: Path) -> None:
    encoder = reference(tmp_path, "mistral")
    batch = encoder.encode(["a", "a longer prompt"]).embeddings
    torch.testing.assert_close(batch[1], encoder.encode(["a longer prompt"]).embeddings[0])


@pytest.mark.parametrize("prompts", ["one string", []])
def test_prompts_must_be_a_list(tmp_path: Path, prompts: Any) -> None:
    with pytest.raises(ValueError, match="list of at least one prompt"):
        reference(tmp_path, "qwen3").encode(prompts)


def test_loading_and_encoding_inside_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        encoder = reference(tmp_path, "qwen3")
        embeddings = embed(encoder)
    assert not embeddings.is_inference() and not embeddings.requires_grad
    assert not any(parameter.is_inference() or parameter.requires_grad for parameter in encoder.model.parameters())
    weight = torch.ones(embeddings.shape[-1], requires_grad=True)
    (embeddings * weight).sum().backward()
    assert torch.equal(embed(encoder), embeddings)


def test_dtype(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file.safetensors", make_weights("qwen3", dtype=torch.bfloat16))
    write_tokenizer(tmp_path, "qwen3")
    encoder = load_text_encoder(path, CONFIGS["qwen3"])
    assert encoder.dtype == embed(encoder).dtype == torch.bfloat16
    encoder = load_text_encoder(path, CONFIGS["qwen3"], dtype=torch.float32).to("cpu")
    assert {tensor.dtype for tensor in encoder.model.state_dict().values()} == {torch.float32}
    assert encoder.device == torch.device("cpu")
    assert embed(encoder).dtype == torch.float32
