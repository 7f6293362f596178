"""What other trainers call an option that ``flux2 train`` does not have, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CHOSEN = "leave it out, PyTorch chooses the fastest kernel it has"
_COMPILED = "leave it out, --compile chooses its own settings"
_DYNAMO = "give --compile instead"
_UPLOAD = "upload the output folder yourself, with `hf upload`"
_LOG = "give --log_with, --log_tracker_name and --wandb_run_name"
_DATASET = "it stands in the dataset's settings, as "

WITHOUT_EFFECT = {
    "sdpa": "attention always runs through PyTorch's own kernels",
    "max_data_loader_n_workers": "samples are read ahead by a thread",
    "persistent_data_loader_workers": "samples are read ahead by a thread",
    "use_pinned_memory_for_block_swap": "streamed blocks are pinned where the system allows it",
    "block_swap_h2d_only": "streamed blocks are only ever copied to the device",
    "log_config": "the settings are in the LoRA's metadata, and W&B is told them",
}
"""Options of musubi-tuner that ask for what happens anyway."""
REFUSED = {
    **dict.fromkeys(("flash_attn", "flash3", "xformers"), _CHOSEN),
    "sage_attn": "it has no backward pass; leave it out",
    "split_attn": "leave it out, samples of different shapes run one shape after the other",
    **dict.fromkeys(("compile_backend", "compile_mode", "compile_dynamic"), _COMPILED),
    **dict.fromkeys(("compile_fullgraph", "compile_cache_size_limit"), _COMPILED),
    **dict.fromkeys(("dynamo_backend", "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"), _DYNAMO),
    "cuda_allow_tf32": "leave it out, what takes time runs in 16 or 8 bits",
    "cuda_cudnn_benchmark": "leave it out, there are no convolutions in training",
    "block_swap_ring_size": "leave it out, it is planned with the memory",
    "img_in_txt_in_offloading": "give --vram_budget or --blocks_to_swap",
    "disable_numpy_memmap": "leave it out, weights are not read through numpy",
    **dict.fromkeys(("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"), "leave it out"),
    "guidance_scale": "leave it out, dev's guidance embedder is always fed 1 in training and klein has none",
    "lr_scheduler_type": "choose one of --lr_scheduler",
    "lr_scheduler_args": "give --lr_scheduler and its options",
    "log_prefix": _LOG,
    "log_tracker_config": _LOG,
    "wandb_api_key": "run `wandb login` once, or set WANDB_API_KEY",
    "save_last_n_epochs_state": "leave it out, only the newest state is kept",
    "save_last_n_steps_state": "leave it out, only the newest state is kept",
    "metadata_reso": "leave it out, it is told by the dataset",
    "metadata_arch": "leave it out, it is told by the variant",
    **dict.fromkeys(("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo"), _UPLOAD),
    **dict.fromkeys(("huggingface_token", "huggingface_repo_visibility", "async_upload"), _UPLOAD),
    "save_state_to_huggingface": _UPLOAD,
    "resume_from_huggingface": "download the state first, with `hf download`",
    # Of diffusers' and PEFT's scripts.
    "rank": "give --network_dim",
    "lora_alpha": "give --network_alpha",
    "lora_dropout": "give --network_dropout",
    "lora_layers": 'give --network_args include_patterns=["..."]',
    "train_batch_size": f"{_DATASET}batch_size",
    "resolution": f"{_DATASET}resolution",
    "checkpointing_steps": "give --save_every_n_steps and --save_state",
    "validation_prompt": "give --sample_prompts",
    "use_8bit_adam": "give --optimizer_type adamw8bit",
}
"""Options of musubi-tuner and others that are not here, and what to do instead."""
REFUSED_NETWORK_ARGS = {
    **dict.fromkeys(("rank_dropout", "module_dropout"), "give --network_dropout"),
    **dict.fromkeys(("conv_dim", "conv_alpha"), "a DiT has no convolutions"),
    "verbose": "give --debug",
}
"""Likewise of ``--network_args``."""
_DRAWN = "`flux2 dataset FILE --preview sheet.png` draws what is encoded"
_SMALLER = "leave it out, a picture that does not fit into memory is encoded in tiles"
WITHOUT_EFFECT_IN_CACHING = {"keep_cache": "cached files stay unless --prune is given"}
REFUSED_IN_CACHING = {
    **dict.fromkeys(("debug_mode", "console_width", "console_back", "console_num_images"), _DRAWN),
    **dict.fromkeys(("vae_tiling", "vae_chunk_size", "vae_spatial_tile_sample_min_size"), _SMALLER),
    "disable_cudnn_backend": "leave it out, or take --device cpu where cuDNN fails",
    "fp8_text_encoder": "leave it out, layers that do not fit are streamed, which changes no embedding",
}
"""Likewise of ``flux2 cache``."""


def refuse_foreign_options(values: Mapping[str, Any], refused: Mapping[str, str] = REFUSED) -> None:
    """Refuses what is not here, all of it at once; an option that is switched off asks for nothing.

    Raises:
        ValueError: naming each with what to do instead.
    """
    given = [name for name, value in values.items() if name in refused and value is not None and value is not False]
    if given:
        raise ValueError("; ".join(f"--{name} is not supported: {refused[name]}" for name in given))


def describe_without_effect(
    values: Mapping[str, Any], without_effect: Mapping[str, str] = WITHOUT_EFFECT
) -> Sequence[str]:
    """A line for each option that asks for what happens anyway."""
    given = [name for name in without_effect if values.get(name)]
    return [f"--{name} has no effect: {without_effect[name]}" for name in given]
