"""Qwen's tokenizer from vocab.json and merges.txt, as ComfyUI carries it, against transformers' own class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flux2_kit.flux2_core.tokenizer import find_tokenizer, read_tokenizer

TEXTS = (
    "a large red circle at the top left on a blue background",
    "It's 12345 naïve   lighthouses,\n\nCamelCase!? ... 日本語 🎨 e\u0301 #ff0000\t",
    "",
)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A byte-pair vocabulary trained on the texts, in Qwen's two files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def test_ids_equal_those_of_transformers(vocabulary: Path) -> None:
    from transformers import AutoTokenizer

    (vocabulary / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}', encoding="utf-8")
    reference = AutoTokenizer.from_pretrained(str(vocabulary))
    ours = read_tokenizer(vocabulary, "qwen3").backend
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == reference(text)["input_ids"]


def test_special_tokens_have_the_ids_of_qwen3(vocabulary: Path) -> None:
    backend = read_tokenizer(vocabulary, "qwen3").backend
    first = len(json.loads((vocabulary / "vocab.json").read_text(encoding="utf-8")))
    # In the released tokenizer the vocabulary ends at 151642, and </think>, the last of them, is 151668.
    expected = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    expected |= {"<tool_call>": 151657, "<tool_response>": 151665, "<think>": 151667, "</think>": 151668}
    assert {token: backend.token_to_id(token) - first + 151643 for token in expected} == expected


def test_the_template_is_one_token_a_marker(vocabulary: Path) -> None:
    tokenizer = read_tokenizer(vocabulary, "qwen3")
    tokens = tokenizer.backend.encode(tokenizer.format_prompt("a ring")).tokens
    assert [tokens[0], tokens.count("<|im_start|>"), tokens.count("<think>")] == ["<|im_start|>", 2, 1]


def test_it_is_the_last_resort(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    places = {"explicit": None, "embedded": None, "repository": "tests/none", "vocab_size": 1000}
    with pytest.raises(ValueError, match="no tokenizer for this qwen3 text encoder"):
        find_tokenizer("qwen3", directories=[tmp_path], **places)
    found = find_tokenizer("qwen3", directories=[tmp_path], last_directories=[vocabulary], **places)
    assert found.backend.token_to_id("<think>") is not None


def test_a_mistral_text_encoder_does_not_take_it(vocabulary: Path) -> None:
    with pytest.raises(ValueError, match="lacks the tokens <s>"):
        read_tokenizer(vocabulary, "mistral")


def test_damaged_merges_are_refused(vocabulary: Path) -> None:
    (vocabulary / "merges.txt").write_text("no pair of this vocabulary\n", encoding="utf-8")
    with pytest.raises(ValueError, match="vocab"):
        read_tokenizer(vocabulary, "qwen3")
