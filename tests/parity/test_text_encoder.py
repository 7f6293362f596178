"""Text embeddings against diffusers' pipelines: whole tensors, padded rows included, random weights, fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_kit.flux2_core.text_encoder import load_text_encoder
from flux2_kit.flux2_core.variants import TextEncoderConfig
from torch import Tensor

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red cube", "", "Ein Bär trägt 3 rote Würfel [IMG] auf\n dem  Kopf", "long " * 80]
SPECIAL_TOKENS = {
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "mistral": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>", "[IMG]"),
}
PAD_TOKENS = {"qwen3": "<|endoftext|>", "mistral": "<pad>"}
# What the released templates do to these messages, in the fewest words.
TEMPLATES = {
    "qwen3": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
    "mistral": (
        "{{- bos_token }}{%- for message in messages %}"
        "{%- set name = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
        "{{- '[' + name + ']' }}"
        "{%- for block in message.content %}{{- block.text }}{%- endfor %}"
        "{{- '[/' + name + ']' }}"
        "{%- endfor %}"
    ),
}
LANGUAGE_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "sliding_window": None,
}


def build_tokenizer(family: str) -> Any:
    """A byte-level tokenizer with a few merges and the family's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [("Ġ", "a"), ("r", "e"), ("Ġ", "re"), ("o", "n"), ("l", "on"), ("lon", "g")]
    pieces = [*SPECIAL_TOKENS[family], *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[family]])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKENS[family],
        bos_token="<s>" if family == "mistral" else None,
        padding_side="left" if family == "mistral" else "right",
    )
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def build_reference(family: str, vocab_size: int) -> Any:
    """The class diffusers loads, whole and with more layers than are used."""
    settings = {**LANGUAGE_MODEL, "vocab_size": vocab_size}
    if family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings, tie_word_embeddings=True))
    else:
        vision = transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32
        )
        model = transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(
                text_config=transformers.MistralConfig(**settings), vision_config=vision, image_token_index=8
            )
        )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.3 * noise)
    return model.eval()


def reference_embeddings(
    family: str, model: Any, tokenizer: Any, prompts: list[str], config: TextEncoderConfig
) -> Tensor:
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    if family == "qwen3":
        function = Flux2KleinPipeline._get_qwen3_prompt_embeds
    else:
        function = Flux2Pipeline._get_mistral_3_small_prompt_embeds
    with torch.no_grad():
        return function(
            model,
            tokenizer,
            prompts,
            max_sequence_length=config.max_tokens,
            hidden_states_layers=list(config.layers),
        )


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Path]:
    """Family, reference model, tokenizer, and both saved as a diffusers repository."""
    family = request.param
    tokenizer = build_tokenizer(family)
    model = build_reference(family, len(tokenizer) + 5)
    root = tmp_path_factory.mktemp(family)
    model.save_pretrained(root / "text_encoder")
    tokenizer.save_pretrained(root / "tokenizer")
    return family, model, tokenizer, root


def make_config(family: Any, layers: tuple[int, int, int] = (1, 3, 4)) -> TextEncoderConfig:
    max_tokens = 96 if family == "qwen3" else 256
    return TextEncoderConfig(
        family=family, hidden_size=32, layers=layers, max_tokens=max_tokens, tokenizer_id="tests/none"
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    return ((actual - expected).norm() / expected.norm()).item()


def test_whole_embeddings_equal_diffusers(case: tuple[str, Any, Any, Path]) -> None:
    family, model, tokenizer, root = case
    config = make_config(family)
    encoding = load_text_encoder(root, config).encode(PROMPTS)
    expected = reference_embeddings(family, model, tokenizer, PROMPTS, config)
    assert encoding.embeddings.shape == (len(PROMPTS), config.max_tokens, config.context_dim)
    assert relative_error(encoding.embeddings, expected) <= 1e-6
    padded = encoding.attention_mask == 0
    assert padded.any(dim=1).tolist() == [True, True, True, False]
    assert relative_error(encoding.embeddings[padded], expected[padded]) <= 1e-6
    assert encoding.embeddings[padded].norm() > 1  # rows of padding carry values, which the DiT reads
    assert [cut > 0 for cut in encoding.num_cut] == [False, False, False, True]


def test_single_prompt_equals_diffusers(case: tuple[str, Any, Any, Path]) -> None:
    family, model, tokenizer, root = case
    config = make_config(family)
    encoder = load_text_encoder(root, config)
    for prompt in PROMPTS:
        actual = encoder.encode([prompt]).embeddings
        expected = reference_embeddings(family, model, tokenizer, [prompt], config)
        assert relative_error(actual, expected) <= 1e-6


def final_norm(model: Any) -> Any:
    """``get_decoder`` is None for Qwen3 in transformers 4.56."""
    return (model.get_decoder() or model.model).norm


def test_the_last_layer_of_the_truncated_model_is_not_normalised(case: tuple[str, Any, Any, Path]) -> None:
    family, model, tokenizer, root = case
    config = make_config(family)
    encoder = load_text_encoder(root, config)
    expected = reference_embeddings(family, model, tokenizer, PROMPTS, config)
    assert len(encoder.model.layers) == config.num_layers < LANGUAGE_MODEL["num_hidden_layers"]
    last = slice(2 * config.hidden_size, None)
    assert relative_error(encoder.encode(PROMPTS).embeddings[..., last], expected[..., last]) <= 1e-6
    encoder.model.norm = copy.deepcopy(final_norm(model))
    assert relative_error(encoder.encode(PROMPTS).embeddings[..., last], expected[..., last]) > 0.1


@pytest.mark.parametrize("layers", [(0, 2, 3), (2, 4, 5), (4, 3, 1)])
def test_other_layers_are_told_apart(case: tuple[str, Any, Any, Path], layers: tuple[int, int, int]) -> None:
    family, model, tokenizer, root = case
    expected = reference_embeddings(family, model, tokenizer, PROMPTS[:1], make_config(family))
    other = load_text_encoder(root, make_config(family, layers)).encode(PROMPTS[:1]).embeddings
    assert relative_error(other, expected) > 0.05


def test_own_template_text_equals_the_tokenizers_template(case: tuple[str, Any, Any, Path]) -> None:
    family, model, tokenizer, root = case
    config = make_config(family)
    encoder = load_text_encoder(root, config)
    assert encoder.tokenizer.chat_template is not None
    encoder.tokenizer.chat_template = None
    expected = reference_embeddings(family, model, tokenizer, PROMPTS, config)
    assert relative_error(encoder.encode(PROMPTS).embeddings, expected) <= 1e-6
