"""The end of a training step, and the way of its numbers to the host."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flux2_kit.training import kept_files
from flux2_kit.training.cache_plan import CacheFile
from flux2_kit.training.kept_files import KeptFiles
from flux2_kit.training.optimizer_step import GuardedStep
from flux2_kit.training.optimizers import Ema, OptimizerConfig, make_optimizer
from flux2_kit.training.step_reports import StepReports
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Reads(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] in READS:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def make(kind: str, ema: bool = True) -> tuple[GuardedStep, nn.Parameter]:
    parameter = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    config = OptimizerConfig(optimizer_type=kind, learning_rate=0.1)
    optimizer = make_optimizer([{"params": [parameter]}], config)
    average = Ema([parameter], 0.9) if ema else None
    return GuardedStep(optimizer, [parameter], 1.0, average, fp16=False), parameter


def state_of(step: GuardedStep) -> list[Tensor]:
    assert step.ema is not None
    states = [value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [t.detach().clone() for t in (*step.parameters, *states, *step.ema.averages, step.ema.num_updates)]


@pytest.mark.parametrize("kind", ["adamw", "torch.optim.SGD", "torch.optim.RMSprop"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(kind, what):
    step, parameter = make(kind)
    for _ in range(2):
        step.backward(parameter.square().sum())
        loss, norm = step(torch.tensor(0.5)).tolist()
        assert loss == 0.5 and norm > 1
    before = state_of(step)
    step.backward(parameter.square().sum() * (math.inf if what == "gradient" else 1))
    loss, _ = step(torch.tensor(math.inf if what == "loss" else 0.5)).tolist()
    assert math.isnan(loss) and parameter.grad is None and step.is_whole
    after = state_of(step)
    assert len(before) > 2 and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    step.backward(parameter.square().sum())
    assert step(torch.tensor(0.5))[0] == 0.5
    assert not torch.equal(parameter, before[0]) and int(before[-1]) == 2


@pytest.mark.parametrize(("kind", "waits"), [("adamw", False), ("torch.optim.RMSprop", True)])
def test_the_host_waits_only_where_the_optimiser_cannot_skip_on_the_device(kind, waits):
    step, parameter = make(kind)
    step.backward(parameter.square().sum())
    step(torch.tensor(0.5))  # makes its state
    with Reads() as reads:
        step.backward(parameter.square().sum())
        step(torch.tensor(0.5))
    assert step.waits == waits and bool(reads.found) == waits


def test_gradients_are_clipped_and_the_norm_is_that_of_before():
    step, parameter = make("torch.optim.SGD", ema=False)
    before = parameter.detach().clone()
    step.backward((3 * parameter).sum())
    _, norm = step(torch.tensor(0.5)).tolist()
    assert norm == pytest.approx(3 * math.sqrt(12))
    torch.testing.assert_close(before - parameter.detach(), torch.full((4, 3), 0.1 / math.sqrt(12)))


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_are_told_in_order_and_late_by_the_lag(lag):
    reports = StepReports(torch.device("cpu"))
    assert reports.lag == 0
    reports.lag = lag
    told = []
    for step in range(1, 4):
        numbers = torch.tensor([step / 10, 1.0])
        reports.put(numbers, step=step, learning_rate=0.1, seconds_per_step=2.0)
        told += [(found.step, round(found.loss, 6)) for found in reports.take(wait=False)]
        assert told == [(done, done / 10) for done in range(1, step + 1 - lag)]
    assert [found.step for found in reports.take(wait=True)] == ([3] if lag else [])


def test_files_are_read_once_within_the_bytes_that_may_be_kept(monkeypatch):
    read = []

    def read_file(folder: Path, file: CacheFile) -> Tensor:
        read.append(file.key)
        return torch.zeros(file.shape, dtype=file.dtype)

    monkeypatch.setattr(kept_files, "read_cached", read_file)
    small, large, other = (
        CacheFile(kind="text", key=key, shape=shape, dtype=torch.bfloat16)
        for key, shape in (("small", (10, 5)), ("large", (10, 6)), ("other", (1, 5)))
    )
    keep = KeptFiles(max_bytes=110)
    for file in (small, large, other, small, large, other):
        assert keep(Path("a"), file).shape == file.shape
    assert read == ["small", "large", "other", "large"] and keep.free_bytes == 0
    assert keep(Path("b"), small) is not keep(Path("a"), small)
    assert 0 < KeptFiles().free_bytes < 2**50
