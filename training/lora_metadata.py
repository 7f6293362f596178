"""What a trained LoRA says about itself: ``modelspec.*`` and ``ss_*`` as other programs read them, and our settings.

Nothing in it depends on the clock or the machine: the same run writes the same file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdapterConfig
    from .cache import CachedDataset
    from .config import TrainConfig
    from .dataset_config import SubsetConfig
    from .train_files import TrainFiles


def lora_metadata(
    config: TrainConfig,
    dataset: CachedDataset,
    files: TrainFiles,
    *,
    adapter: AdapterConfig,
    num_steps: int,
    steps_per_epoch: int,
    steps_done: int,
) -> dict[str, str]:
    """Metadata of the LoRA after `steps_done` of `num_steps` steps; `adapter` is what is trained."""
    output, variant, timesteps = config.output, files.variant, config.timesteps
    architecture = {"modelspec.architecture": variant.lora_architecture}
    if output.no_metadata:
        return architecture
    subsets = dataset.config.subsets
    sizes = sorted({item.item.bucket for item in dataset.items})
    triggers = sorted({subset.trigger_word for subset in subsets if subset.trigger_word})
    num_images = sum(subsets[item.item.subset].num_repeats for item in dataset.items)
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
        "modelspec.timestep_range": _timestep_range(config),
        "ss_base_model_version": "flux_2_" + variant.undistilled_name.replace("-base", "").replace("-", "_"),
        "ss_sd_model_name": files.dit.name,
        "ss_network_module": f"flux2_kit.{adapter.kind}",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": adapter.rank if adapter.alpha is None else adapter.alpha,
        "ss_network_dropout": adapter.dropout,
        "ss_network_args": _network_args(config, adapter),
        "ss_scale_weight_norms": adapter.max_norm,
        "ss_steps": steps_done,
        "ss_epoch": -(-steps_done // steps_per_epoch),
        "ss_max_train_steps": num_steps,
        "ss_num_epochs": -(-num_steps // steps_per_epoch),
        "ss_num_train_items": num_images,
        "ss_num_train_images": num_images,
        "ss_datasets": json.dumps([_subset(subset, index, dataset) for index, subset in enumerate(subsets)]),
        "ss_learning_rate": config.optimizer.rate,
        "ss_optimizer": config.optimizer.optimizer_type + _in_brackets(config.optimizer.optimizer_args),
        "ss_lr_scheduler": config.schedule.lr_scheduler,
        "ss_lr_warmup_steps": config.schedule.lr_warmup_steps,
        "ss_max_grad_norm": config.optimizer.max_grad_norm,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": config.seed,
        "ss_timestep_sampling": timesteps.timestep_sampling,
        "ss_weighting_scheme": timesteps.weighting_scheme,
        "ss_logit_mean": timesteps.logit_mean,
        "ss_logit_std": timesteps.logit_std,
        "ss_mode_scale": timesteps.mode_scale,
        "ss_sigmoid_scale": timesteps.sigmoid_scale,
        "ss_discrete_flow_shift": timesteps.discrete_flow_shift,
        "ss_output_name": output.output_name,
        "ss_training_comment": output.training_comment,
        "flux2_kit.variant": variant.name,
        "flux2_kit.dataset_digest": dataset.digest,
        "flux2_kit.train_config": _settings(config),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _network_args(config: TrainConfig, adapter: AdapterConfig) -> str | None:
    """What of the adapter has no key of its own and is not the default, as JSON."""
    own = ("kind", "rank", "alpha", "dropout", "max_norm")
    given = {f.name: getattr(adapter, f.name) for f in fields(adapter) if f.name not in own}
    given = {name: value for name, value in given.items() if value != getattr(type(adapter)(), name)}
    if config.loraplus_lr_ratio is not None:
        given["loraplus_lr_ratio"] = config.loraplus_lr_ratio
    return json.dumps(given) if given else None


def _subset(subset: SubsetConfig, index: int, dataset: CachedDataset) -> dict[str, Any]:
    """A part of the dataset in musubi-tuner's words, without the names of folders, which may be private."""
    return {
        "is_video_dataset": False,
        "resolution": subset.resolution,
        "batch_size_per_device": subset.batch_size,
        "num_repeats": subset.num_repeats,
        "enable_bucket": subset.enable_bucket,
        "bucket_no_upscale": subset.bucket_no_upscale,
        "has_control": any(item.reference_sizes for item in dataset.items if item.item.subset == index),
        "num_train_items": sum(item.item.subset == index for item in dataset.items),
    }


def _in_brackets(arguments: Sequence[str]) -> str:
    return f"({','.join(arguments)})" if arguments else ""


def _timestep_range(config: TrainConfig) -> str | None:
    low, high = (round(1000 * sigma) for sigma in (config.timesteps.min_sigma, config.timesteps.max_sigma))
    return None if (low, high) == (0, 1000) else f"{low},{high}"


def _settings(config: TrainConfig) -> str:
    """What was trained and how, as JSON: of paths the last part, and nothing of where and when files were written."""
    settings = asdict(config)
    settings["output"] = {"save_precision": config.output.save_precision}
    del settings["monitor"]
    return json.dumps(settings, default=lambda value: value.name if isinstance(value, Path) else str(value))
