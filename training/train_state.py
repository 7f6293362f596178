"""Saves and restores all that a training run needs to go on: weights, optimiser state, step, random generators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from ..flux2_core.files import write_safetensors


def save_train_state(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator],
) -> None:
    """Writes one safetensors file, atomically: a run killed at any moment leaves the last whole state behind."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {"step": step}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{index}/{key}"] = value
                else:
                    numbers[f"optimizer/{name}/{index}/{key}"] = value
    tensors |= {f"generator/{name}": generator.get_state() for name, generator in generators.items()}
    # A clone per tensor: safetensors refuses tensors that share memory, as tied or viewed weights do.
    write_safetensors(path, {key: value.clone() for key, value in tensors.items()}, {"numbers": json.dumps(numbers)})


def load_train_state(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator],
) -> int:
    """Restores what `save_train_state` wrote and returns the number of steps already done."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the handle is no mapping
        numbers = json.loads(file.metadata()["numbers"])
    for name, module in modules.items():
        prefix = f"module/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        module.load_state_dict(state, strict=True)
    for name, optimizer in optimizers.items():
        per_parameter: dict[int, dict[str, Any]] = {}
        for key, value in (tensors | numbers).items():
            if key.startswith(f"optimizer/{name}/"):
                index, field = key.removeprefix(f"optimizer/{name}/").split("/")
                per_parameter.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": per_parameter})
    for name, generator in generators.items():
        generator.set_state(tensors[f"generator/{name}"])
    return numbers["step"]
