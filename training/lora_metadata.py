"""What a trained LoRA says about itself: ``modelspec.*`` and ``ss_*`` as other programs read them, and our settings.

Nothing in it depends on the clock or the machine: the same run writes the same file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters import TrainableAdapters
    from .cache import CachedDataset
    from .config import TrainConfig
    from .train_files import TrainFiles


def lora_metadata(
    config: TrainConfig, dataset: CachedDataset, files: TrainFiles, adapters: TrainableAdapters, num_steps: int
) -> dict[str, str]:
    """Metadata of the LoRA after `num_steps` steps."""
    output, adapter, variant = config.output, adapters.config, files.variant
    architecture = {"modelspec.architecture": f"Flux.2-{variant.name}/lora"}
    if output.no_metadata:
        return architecture
    subsets = dataset.config.subsets
    sizes = sorted({item.item.bucket for item in dataset.items})
    triggers = sorted({subset.trigger_word for subset in subsets if subset.trigger_word})
    values = {
        **architecture,
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": output.metadata_title or output.output_name,
        "modelspec.author": output.metadata_author,
        "modelspec.description": output.metadata_description,
        "modelspec.license": output.metadata_license,
        "modelspec.tags": output.metadata_tags,
        "modelspec.trigger_phrase": ", ".join(triggers) or None,
        "modelspec.resolution": "x".join(map(str, max(sizes, key=lambda size: size[0] * size[1]))) if sizes else None,
        "modelspec.prediction_type": "velocity",
        "modelspec.timestep_range": _timestep_range(config),
        "ss_base_model_version": f"flux2-{variant.name}",
        "ss_sd_model_name": files.dit.name,
        "ss_network_module": f"flux2_kit.{adapter.kind}",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": adapter.rank if adapter.alpha is None else adapter.alpha,
        "ss_network_dropout": adapter.dropout,
        "ss_scale_weight_norms": adapter.max_norm,
        "ss_steps": num_steps,
        "ss_max_train_steps": config.max_train_steps,
        "ss_num_epochs": config.max_train_epochs,
        "ss_num_train_images": sum(subsets[item.item.subset].num_repeats for item in dataset.items),
        "ss_learning_rate": config.optimizer.rate,
        "ss_optimizer": config.optimizer.optimizer_type,
        "ss_lr_scheduler": config.schedule.lr_scheduler,
        "ss_lr_warmup_steps": config.schedule.lr_warmup_steps,
        "ss_max_grad_norm": config.optimizer.max_grad_norm,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": config.seed,
        "ss_timestep_sampling": config.timesteps.timestep_sampling,
        "ss_weighting_scheme": config.timesteps.weighting_scheme,
        "ss_output_name": output.output_name,
        "ss_training_comment": output.training_comment,
        "flux2_kit.dataset_digest": dataset.digest,
        "flux2_kit.train_config": _settings(config),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _timestep_range(config: TrainConfig) -> str | None:
    low, high = (round(1000 * sigma) for sigma in (config.timesteps.min_sigma, config.timesteps.max_sigma))
    return None if (low, high) == (0, 1000) else f"{low},{high}"


def _settings(config: TrainConfig) -> str:
    """All settings as JSON; of paths the last part, and none of where files were written."""
    settings = asdict(config)
    del settings["output"]["output_dir"], settings["output"]["lora_dir"], settings["monitor"]["logging_dir"]
    return json.dumps(settings, default=lambda value: value.name if isinstance(value, Path) else str(value))
