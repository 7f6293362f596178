"""A LoRA learns a style that the bundled model does not know, from 24 pictures, by word and by edit.

These runs are short. docs/training.md has the figures of 300 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.lora import LoraSetting, apply_loras
from flux2_kit.flux2_core.lora_files import read_lora
from flux2_kit.flux2_core.pipeline import load_pipeline
from flux2_kit.training.adapters import AdapterConfig
from flux2_kit.training.dataset import list_dataset, load_dataset_config
from flux2_kit.training.lora_recipe import TrainResult
from flux2_kit.training.tiny.captions import Example
from flux2_kit.training.tiny.style_dataset import write_edit_dataset, write_style_dataset
from flux2_kit.training.tiny.styles import StyleScore, evaluate_style, held_out_style_edits, held_out_styled_prompts
from lora_training import TINY, cached, make_config, train

NUM_STEPS = 50
NUM_EXAMPLES = 16


def train_style(folder: Path, write_dataset: Callable[[Path], Path]) -> TrainResult:
    dataset = cached(list_dataset(load_dataset_config(write_dataset(folder / "dataset"))))
    config = make_config(
        folder / "output",
        max_train_steps=NUM_STEPS,
        adapter=AdapterConfig(rank=16),
        monitor={"validate_every_n_steps": NUM_STEPS},
    )
    return train(config, dataset)


@pytest.fixture(scope="module")
def by_word(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_style(tmp_path_factory.mktemp("word"), write_style_dataset)


@pytest.fixture(scope="module")
def by_edit(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_style(tmp_path_factory.mktemp("edit"), write_edit_dataset)


def measure(examples: Sequence[Example], result: TrainResult | None = None) -> StyleScore:
    """How pictures come out, with the LoRA as it was written."""
    pipeline = load_pipeline("tiny", dtype=torch.float32)
    if result is not None:
        assert result.lora_path is not None
        apply_loras(pipeline.dit, [LoraSetting(lora=read_lora(result.lora_path, TINY.dit))])
    return evaluate_style(pipeline, examples[:NUM_EXAMPLES])


def test_the_loss_of_held_out_pictures_falls(by_word: TrainResult) -> None:
    """Measured: 0.389 and 0.133; 0.22 without captions in training, 0.46 with those of other pictures."""
    check_losses(by_word, before=0.35, after=0.16)


def test_the_loss_of_held_out_edits_falls(by_edit: TrainResult) -> None:
    """Measured: 0.354 and 0.106; 0.21 without references in training, 0.46 with those of other pictures."""
    check_losses(by_edit, before=0.32, after=0.13)


def test_prompts_of_scenes_that_were_never_seen_come_out_in_the_style(by_word: TrainResult) -> None:
    shown = measure(held_out_styled_prompts(), by_word)
    assert shown.style >= 0.7 and shown.kind >= 0.7 and min(shown.color, shown.background) >= 0.8


def test_references_that_were_never_seen_are_brought_into_the_style(by_edit: TrainResult) -> None:
    shown = measure(held_out_style_edits(), by_edit)
    assert shown.style >= 0.7 and shown.kind >= 0.5 and min(shown.color, shown.background) >= 0.8


def test_without_the_lora_nothing_is_in_the_style() -> None:
    shown = measure(held_out_styled_prompts())
    assert shown.style == 0 and min(shown.kind, shown.color, shown.background) >= 0.9


def check_losses(result: TrainResult, *, before: float, after: float) -> None:
    assert sorted(result.validation_losses) == [0, NUM_STEPS]
    assert before < result.validation_losses[0] < 1
    assert result.validation_losses[NUM_STEPS] < after
