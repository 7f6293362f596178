"""The weights that training reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..flux2_core.detect import resolve_variant
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.variants import Variant
from ..flux2_core.weights import find_weights


@dataclass(frozen=True, kw_only=True)
class TrainFiles:
    """A variant and where its weights are."""

    variant: Variant
    dit: Path
    autoencoder: Path | None = None
    """For sample pictures alone: the dataset is encoded already."""
    text_encoder: Path | None = None
    """As `autoencoder`."""
    tokenizer: Path | None = None
    """For a text encoder that has none beside it."""


def find_train_files(
    variant: Variant,
    *,
    dit: str | os.PathLike[str] | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    models_dir: Path | None = None,
    makes_samples: bool,
) -> TrainFiles:
    """Looks up what is not given; autoencoder and text encoder only where sample pictures need them.

    Raises:
        ValueError: weights that are missing, or a DiT of another variant.
    """
    path = find_weights(variant, "dit", Path(dit) if dit else None, models_dir)
    resolve_variant(TensorSource(path, component="dit"), variant.name)
    if not makes_samples:
        return TrainFiles(variant=variant, dit=path)
    return TrainFiles(
        variant=variant,
        dit=path,
        autoencoder=find_weights(variant, "autoencoder", Path(autoencoder) if autoencoder else None, models_dir),
        text_encoder=find_weights(variant, "text_encoder", Path(text_encoder) if text_encoder else None, models_dir),
        tokenizer=Path(tokenizer) if tokenizer else None,
    )
