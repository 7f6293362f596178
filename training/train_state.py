"""Saves and restores all that a training run needs to go on, in one safetensors file.

A state is a tree of dicts and lists. Its tensors are stored as tensors, everything else as JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from ..flux2_core.files import write_safetensors

NO_PARTS: Mapping[str, Any] = MappingProxyType({})
TREE_KEY = "flux2_kit.train_state"
TENSOR_KEY, PAIRS_KEY = "tensor", "pairs"
"""In the JSON, ``{"tensor": name}`` stands for a tensor and ``{"pairs": [[key, value], ...]}`` for a dict."""


class Stateful(Protocol):
    """What counts or averages, and goes on from what it has counted."""

    def state_dict(self) -> Any:
        """A tree."""

    def load_state_dict(self, state: Any) -> None:
        """Restores it."""


def save_tree(path: Path, tree: Any) -> Path:
    """Writes a tree of dicts, lists, tuples, tensors, numbers, text and None, atomically; tuples come back as lists.

    A run killed at any moment leaves the last whole state behind.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            tensors[place] = value.detach()
            return {TENSOR_KEY: place}
        if isinstance(value, Mapping):  # as pairs, since JSON would make texts of the numbers that optimisers use
            return {PAIRS_KEY: [[key, encode(child, f"{place}/{key}")] for key, child in value.items()]}
        if isinstance(value, (list, tuple)):
            return [encode(child, f"{place}/{index}") for index, child in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{place} is a {type(value).__name__}, which a train state cannot hold")

    return write_safetensors(path, tensors, {TREE_KEY: json.dumps(encode(tree, ""))})


def load_tree(path: Path, *, with_tensors: bool = True) -> Any:
    """What `save_tree` wrote.

    Args:
        with_tensors: False leaves None in the place of each, and reads the header alone.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"there is no train state at {path}; check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(TREE_KEY)
            # Copies: a tensor that lies in the mapped file keeps it open, and Windows replaces no open file.
            keys = file.keys()
            tensors = {key: file.get_tensor(key).clone() if with_tensors else None for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); go on from another state") from error
    if text is None:
        raise ValueError(f"{path} is no train state of FLUX.2 Kit; give the folder that training wrote")

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(child) for child in value]
        if isinstance(value, dict):
            if TENSOR_KEY in value:
                return tensors[value[TENSOR_KEY]]
            return {key: decode(child) for key, child in value[PAIRS_KEY]}
        return value

    try:
        return decode(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); go on from another state") from error


def save_train_state(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator] = NO_PARTS,
    counters: Mapping[str, Stateful] = NO_PARTS,
    extra: Any = None,
) -> None:
    """Writes one file with everything; `extra` is a tree of the caller's own."""
    save_tree(
        path,
        {
            "step": step,
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "generators": {name: generator.get_state() for name, generator in generators.items()},
            "counters": {name: counter.state_dict() for name, counter in counters.items()},
            "extra": extra,
        },
    )


def load_train_state(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator] = NO_PARTS,
    counters: Mapping[str, Stateful] = NO_PARTS,
) -> int:
    """Restores what `save_train_state` wrote and returns the number of steps already done.

    Raises:
        ValueError: no such file, a damaged one, or one of another model or optimiser.
    """
    parts: dict[str, Any] = {"modules": modules, "optimizers": optimizers, "generators": generators}
    return restore_train_state(load_tree(path), str(path), counters=counters, **parts)


def restore_train_state(
    state: Any,
    source: str,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    generators: Mapping[str, torch.Generator] = NO_PARTS,
    counters: Mapping[str, Stateful] = NO_PARTS,
) -> int:
    """As `load_train_state`, from a tree that is read already; `source` names it in errors."""
    try:
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name], strict=True)
            for parameter, value in module.named_parameters():
                if not value.isfinite().all():
                    raise ValueError(f"{parameter} holds values that are not finite")
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, generator in generators.items():
            generator.set_state(state["generators"][name])
        for name, counter in counters.items():
            counter.load_state_dict(state["counters"][name])
        return state["step"]
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source} is the state of another run, or damaged ({' '.join(str(error).split())[:200]}); start without "
            "it, or with the settings it was made with"
        ) from error
