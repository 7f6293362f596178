"""Which files a variant is loaded from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .detect import resolve_variant
from .tensor_source import TensorSource
from .variants import Variant
from .weights import find_weights


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A variant and where its weights are."""

    variant: Variant
    dit: Path
    autoencoder: Path
    text_encoder: Path


def find_model_files(
    variant: Variant,
    *,
    dit: str | os.PathLike[str] | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    models_dir: Path | None = None,
) -> ModelFiles:
    """Looks up what is not given (`weights.find_weights`), and checks by its header that the DiT is of the variant.

    Raises:
        ValueError: weights that are missing, or a DiT of another variant.
    """
    files = ModelFiles(
        variant=variant,
        dit=find_weights(variant, "dit", Path(dit) if dit else None, models_dir),
        autoencoder=find_weights(variant, "autoencoder", Path(autoencoder) if autoencoder else None, models_dir),
        text_encoder=find_weights(variant, "text_encoder", Path(text_encoder) if text_encoder else None, models_dir),
    )
    resolve_variant(TensorSource(files.dit, component="dit"), variant.name)
    return files
