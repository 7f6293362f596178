"""The recipe that makes the bundled model, in a few steps: it goes on after a stop and writes files that load."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.autoencoder import Flux2Autoencoder
from flux2_kit.flux2_core.pipeline import GenerateRequest, SamplingConfig, load_pipeline
from flux2_kit.flux2_core.variants import AUTOENCODER_TINY
from flux2_kit.training.tiny import train_autoencoder as autoencoder_stage
from flux2_kit.training.tiny import train_dit as dit_stage
from flux2_kit.training.tiny.make import make_tiny_model
from flux2_kit.training.tiny.tokenizer import write_tokenizer
from flux2_kit.training.tiny.train_autoencoder import AutoencoderTrainConfig, train_autoencoder, train_decoder
from flux2_kit.training.tiny.train_dit import DiTTrainConfig, LatentTable, train_dit

CPU = torch.device("cpu")
AUTOENCODER = AutoencoderTrainConfig(
    num_steps=4, num_decoder_steps=2, batch_size=4, num_random_masks=12, save_every_steps=2, num_warmup_steps=1
)
DIT = DiTTrainConfig(num_steps=4, batch_sizes=(8, 6, 4), save_every_steps=2, num_warmup_steps=1)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding the whole domain takes longer than these tests: every scene gets one of eight latents."""

    def encode_few(self: LatentTable, autoencoder, device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(8, 128, 4, 4, generator=generator)

    monkeypatch.setattr(LatentTable, "__init__", encode_few)
    monkeypatch.setattr(LatentTable, "__call__", lambda self, scenes: self.latents[[len(str(s)) % 8 for s in scenes]])
    monkeypatch.setattr(autoencoder_stage, "round_trip_psnr", lambda model: 0.0)


def test_all_stages_make_a_model_that_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "tiny"
    make_tiny_model(tmp_path, output, CPU, AUTOENCODER, DIT)
    monkeypatch.setattr("flux2_kit.flux2_core.weights.TINY_FOLDER", output)
    pipeline = load_pipeline("tiny")
    request = GenerateRequest(prompt="a red circle", sampling=SamplingConfig(num_steps=2))
    assert pipeline.generate(request).images[0].size == (64, 64)


def test_a_stopped_autoencoder_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train_autoencoder(AUTOENCODER, make_directory(tmp_path / "whole"), CPU)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(2, autoencoder_stage, "one_cycle", patch)
        train_autoencoder(AUTOENCODER, make_directory(tmp_path / "parts"), CPU)
    again = train_autoencoder(AUTOENCODER, tmp_path / "parts", CPU)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_stopped_dit_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> dict[str, torch.Tensor]:
        write_tokenizer(tmp_path / name / "tokenizer")
        dit, text_encoder = train_dit(DIT, tmp_path / name, Flux2Autoencoder(AUTOENCODER_TINY), CPU)
        return {**dit.state_dict(), **text_encoder.state_dict()}

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(2, dit_stage, "one_cycle", patch)
        run("parts")
    torch.testing.assert_close(run("parts"), whole, rtol=0, atol=0)


def test_the_decoder_stage_leaves_the_latents_alone(tmp_path: Path) -> None:
    model = train_autoencoder(AUTOENCODER, tmp_path, CPU)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, decoder = model.encode(pictures), model.decoder.conv_in.weight.clone()
    train_decoder(AUTOENCODER, tmp_path, model, CPU)
    torch.testing.assert_close(model.encode(pictures), before, rtol=0, atol=0)
    assert not torch.equal(model.decoder.conv_in.weight, decoder)


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def stop_at(step: int, module, schedule: str, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the beginning of a step: the schedule is asked once a step."""
    original, calls = getattr(module, schedule), itertools.count()

    def interrupted(*arguments):
        if next(calls) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    patch.setattr(module, schedule, interrupted)
