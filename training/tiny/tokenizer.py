"""The tokenizer of the bundled tiny text encoder: byte-level BPE over lower-cased captions, a few hundred entries."""

from __future__ import annotations

import json
import random
from pathlib import Path

from ...flux2_core.files import write_text
from .captions import random_caption, random_combination, random_edit
from .pictures import all_scenes

VOCABULARY_SIZE = 512
PAD, USER, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The real templates spend eight tokens on roles; every token of the tiny model is paid for in training time.
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def write_tokenizer(directory: Path) -> None:
    """Trains the tokenizer on random captions of a fixed seed and writes it as Hugging Face tokenizer files."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, USER, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _corpus() -> list[str]:
    rng, scenes = random.Random(0), all_scenes()
    lines = [random_caption(rng.choice(scenes), rng) for _ in range(4000)]
    lines += [random_edit(rng.choice(scenes), rng).prompt for _ in range(2000)]
    pairs = (random_combination(rng.choice(scenes), rng.choice(scenes), rng) for _ in range(1000))
    return lines + [example.prompt for example in pairs if example]
