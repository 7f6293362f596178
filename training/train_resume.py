"""Whether a saved state may go on under the settings of now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fingerprint import fingerprint_weights

if TYPE_CHECKING:
    from .cache import CachedDataset
    from .config import TrainConfig
    from .train_files import TrainFiles

STATE_FILE = "state.safetensors"
FREE = (
    "output", "monitor", "max_train_steps", "max_train_epochs", "max_bad_steps", "preflight", "checkpointing",
    "vram_budget_gib", "num_streamed_blocks", "text_encoder_precision", "autoencoder_precision", "compile",
)  # fmt: skip
"""Settings that do not change what a step learns, rounding aside; max_train_steps does where the learning rate follows
a curve, and is free so that a run can be made longer."""
CONTENTS = {"dataset": "the dataset has", "base": "the DiT has", "base_weights": "the LoRAs of base_weights have"}
"""What counts by its content, not by its path."""
ONLY_AT_START = ("network_weights", "dim_from_weights")
"""Settings that count before the first step alone."""


def describe_run(config: TrainConfig, dataset: CachedDataset, files: TrainFiles, num_processes: int) -> dict[str, Any]:
    """All that has to be the same for a run to go on, as JSON values."""
    settings = json.loads(json.dumps(asdict(config), default=str))
    left_out = (*FREE, *ONLY_AT_START, "base_weights")
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return {
        "settings": kept,
        "dataset": dataset.digest,
        "variant": files.variant.name,
        "base": fingerprint_weights(files.dit, "dit"),
        "base_weights": [fingerprint_weights(path) for path in config.base_weights],
        "num_processes": num_processes,
    }


def check_resume(state: Any, description: dict[str, Any], num_steps: int, folder: Path, *, is_trained: bool) -> None:
    """Refuses a state of another run, or of one that has nothing left to do.

    Args:
        state: from `train_state.load_tree`.
        is_trained: whether the trained LoRA is there, so that nothing is left to do after the last step.

    Raises:
        ValueError: naming everything that differs, with the value then and now.
    """
    step, differences = compare_run(state, description, folder)
    if differences:
        raise ValueError(
            f"{folder} was written by a run with other settings: {'; '.join(differences)}. Resume with the settings "
            "of then, or start a new run from its LoRA with network_weights"
        )
    if step > num_steps or (step == num_steps and is_trained):
        raise ValueError(
            f"{folder} is at step {step}, and the run ends at {num_steps}; raise max_train_steps or max_train_epochs "
            "to go on"
        )


def compare_run(state: Any, description: dict[str, Any], folder: Path) -> tuple[int, list[str]]:
    """The steps that a state has done, and what differs from now in words, with the value then and now.

    Raises:
        ValueError: it is no state of LoRA training.
    """
    parts = {"step": int, "modules": dict, "optimizers": dict, "counters": dict, "extra": dict}
    extra = {"description": dict, "base_precision": str, "last_sampled_step": int}
    if not (_has(state, parts) and _has(state["extra"], extra) and state["step"] > 0):
        raise ValueError(f"{folder} holds no state of LoRA training; give the folder <output_name>-state")
    return state["step"], list(_differences(state["extra"]["description"], description))


def _has(tree: Any, parts: Mapping[str, type]) -> bool:
    return isinstance(tree, dict) and all(type(tree.get(name)) is kind for name, kind in parts.items())


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), key)
    elif before != now:
        if name in CONTENTS:
            yield f"{CONTENTS[name]} changed"
        else:
            yield f"{name} was {before}, now {now}"
