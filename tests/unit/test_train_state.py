"""A training run that is interrupted and resumed ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.files import write_atomically
from flux2_kit.training import train_state
from flux2_kit.training.train_state import load_train_state, load_tree, save_train_state, save_tree
from torch import Tensor, nn
from torch.optim import Optimizer

NUM_STEPS, INTERRUPTED_AT = 8, 3


@dataclass
class Run:
    """A small network that is trained with every optimiser of the recipes, on data from a generator of its own."""

    model: nn.Sequential
    optimizers: dict[str, Optimizer]
    generator: torch.Generator
    losses: list[float]

    @classmethod
    def start(cls, seed: int) -> Run:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 6))
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        optimizers: dict[str, Optimizer] = {"adamw": torch.optim.AdamW(vectors, lr=1e-2, betas=(0.9, 0.98))}
        if hasattr(torch.optim, "Muon"):
            optimizers["muon"] = torch.optim.Muon(matrices, lr=1e-2, momentum=0.95, nesterov=True)
        else:
            optimizers["sgd"] = torch.optim.SGD(matrices, lr=1e-2, momentum=0.9)
        return cls(model, optimizers, torch.Generator().manual_seed(seed + 1), [])

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = torch.randn(12, 6, generator=self.generator)
            loss = (self.model(batch) - batch.roll(1, dims=1)).square().mean()
            loss.backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            self.losses.append(loss.item())

    def parts(self) -> dict:
        return {"modules": {"mlp": self.model}, "optimizers": self.optimizers, "generators": {"data": self.generator}}

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


@pytest.fixture
def saved(tmp_path) -> Path:
    run = Run.start(seed=0)
    run.train(INTERRUPTED_AT)
    path = tmp_path / "state.safetensors"
    save_train_state(path, step=INTERRUPTED_AT, **run.parts())
    return path


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(saved):
    uninterrupted = Run.start(seed=0)
    uninterrupted.train(NUM_STEPS)
    resumed = Run.start(seed=100)
    step = load_train_state(saved, **resumed.parts())
    assert step == INTERRUPTED_AT
    resumed.train(NUM_STEPS - step)
    assert resumed.losses == uninterrupted.losses[INTERRUPTED_AT:]
    for name, tensor in uninterrupted.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name


def test_saving_does_not_disturb_the_run(tmp_path):
    saving, plain = Run.start(seed=0), Run.start(seed=0)
    for _ in range(4):
        saving.train(1)
        save_train_state(tmp_path / "state.safetensors", step=1, **saving.parts())
    plain.train(4)
    assert saving.losses == plain.losses


@pytest.mark.parametrize("left_out", ["optimizers", "generators"])
def test_every_part_of_the_state_counts(saved, left_out):
    uninterrupted = Run.start(seed=0)
    uninterrupted.train(NUM_STEPS)
    resumed = Run.start(seed=100)
    load_train_state(saved, **resumed.parts() | {left_out: {}})
    resumed.train(NUM_STEPS - INTERRUPTED_AT)
    assert resumed.losses != uninterrupted.losses[INTERRUPTED_AT:]


def test_a_run_before_its_first_step_can_be_saved(tmp_path):
    path = tmp_path / "state.safetensors"
    save_train_state(path, step=0, **Run.start(seed=0).parts())
    resumed, fresh = Run.start(seed=100), Run.start(seed=0)
    assert load_train_state(path, **resumed.parts()) == 0
    resumed.train(3)
    fresh.train(3)
    assert resumed.losses == fresh.losses


def test_tied_weights_are_saved_and_restored(tmp_path):
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    source, target = tied(), tied()
    save_train_state(tmp_path / "tied.safetensors", step=1, modules={"m": source}, optimizers={}, generators={})
    load_train_state(tmp_path / "tied.safetensors", modules={"m": target}, optimizers={}, generators={})
    assert torch.equal(target["b"].weight, source["a"].weight)


def test_a_failed_save_leaves_the_last_state(saved, monkeypatch):
    def fail(path, tensors, metadata):
        def write(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

        return write_atomically(path, write)

    before = saved.read_bytes()
    monkeypatch.setattr(train_state, "write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_train_state(saved, step=9, **Run.start(seed=0).parts())
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_tree_can_be_read_without_its_tensors(tmp_path):
    save_tree(tmp_path / "state.safetensors", {"step": 3, "weights": [torch.ones(2), "text"]})
    assert load_tree(tmp_path / "state.safetensors", with_tensors=False) == {"step": 3, "weights": [None, "text"]}
