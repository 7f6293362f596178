"""The options of ``flux2 train``, musubi-tuner's names, and the settings they stand for.

Types and defaults are those of the settings' dataclasses; here are names, places and help.
"""

from __future__ import annotations

import argparse
import ast
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from ..flux2_core.memory_options import LONG_DTYPES, choose_precision
from ..flux2_core.variants import VARIANTS
from .config import TrainConfig
from .foreign_options import REFUSED, REFUSED_NETWORK_ARGS, WITHOUT_EFFECT, refuse_foreign_options


@dataclass(frozen=True)
class Option:
    """One option and the setting it sets."""

    name: str
    setting: str
    """Path through the dataclasses, such as "adapter.rank"."""
    help: str
    scale: float | None = None
    """The number that is given is multiplied by this."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of values."""
    gives_advice: bool = False
    """The setting itself refuses other values, and says which to take instead."""


GROUPS: dict[str, tuple[Option, ...]] = {
    "run": (
        Option("max_train_steps", "max_train_steps", "steps of the optimiser"),
        Option("max_train_epochs", "max_train_epochs", "passes over the dataset; replaces max_train_steps"),
        Option("gradient_accumulation_steps", "gradient_accumulation_steps", "batches that make a step"),
        Option("seed", "seed", "decides order, noise, noise levels and first weights"),
        Option(
            "mixed_precision",
            "mixed_precision",
            "of base and activations, the LoRA is fp32; default: as in the DiT's file",
        ),
        Option("ema_decay", "ema_decay", "save and sample a moving average of the LoRA, such as 0.999"),
        Option("max_bad_steps", "max_bad_steps", "give up after so many steps in a row without a finite loss"),
        Option("preflight", "preflight", "try the largest batch first, so that too little memory shows at once"),
        Option("compile", "compile", "torch.compile of the blocks, which pays in long runs"),
    ),
    "memory": (
        Option("precision", "base_precision", "of frozen blocks; default: auto, fp8 where plain weights do not fit"),
        Option("vram_budget", "vram_budget_gib", "GiB of the device to use; default: what is free"),
        Option("blocks_to_swap", "num_streamed_blocks", "stream so many blocks; default: as few as fit"),
        Option("text_encoder_precision", "text_encoder_precision", "for sample pictures; default: as in the file"),
        Option(
            "vae_dtype",
            "autoencoder_precision",
            "for sample pictures; default: auto, as in `flux2 generate`",
            aliases=LONG_DTYPES,
        ),
    ),
    "LoRA": (
        Option("network_dim", "adapter.rank", "rank"),
        Option("network_alpha", "adapter.alpha", "default: the rank, so that the LoRA counts in full"),
        Option("network_dropout", "adapter.dropout", "share of the LoRA's input set to zero in training"),
        Option("network_weights", "network_weights", "a LoRA to start from"),
        Option("dim_from_weights", "dim_from_weights", "take rank, alpha and layers from network_weights"),
        Option("base_weights", "base_weights", "LoRAs to train on top of; the new one does not hold them"),
        Option("base_weights_multiplier", "base_weights_multiplier", "strength of each; default: 1"),
        Option("scale_weight_norms", "adapter.max_norm", "scale longer changes of layers down to this norm, such as 1"),
    ),
    "noise levels": (
        Option(
            "timestep_sampling",
            "timesteps.timestep_sampling",
            "how often each noise level is trained; flux2: as the sampler visits it at that size",
        ),
        Option("discrete_flow_shift", "timesteps.discrete_flow_shift", "for shift and sigma; above 1 is more noise"),
        Option("sigmoid_scale", "timesteps.sigmoid_scale", "width for sigmoid, shift, flux2_shift"),
        Option("logit_mean", "timesteps.logit_mean", "for logit_normal and logsnr"),
        Option("logit_std", "timesteps.logit_std", "for logit_normal and logsnr"),
        Option("mode_scale", "timesteps.mode_scale", "for mode"),
        Option(
            "weighting_scheme",
            "timesteps.weighting_scheme",
            "weight of the loss by noise level; logit_normal and mode only for sigma",
        ),
        Option("min_timestep", "timesteps.min_sigma", "lowest noise level, 0..1000", scale=1e-3),
        Option("max_timestep", "timesteps.max_sigma", "highest noise level, 0..1000", scale=1e-3),
        Option(
            "preserve_distribution_shape",
            "timesteps.preserve_distribution_shape",
            "cut the density off at these bounds, instead of squeezing it in between",
        ),
        Option(
            "num_timestep_buckets",
            "timesteps.num_timestep_buckets",
            "of so many samples each has another quantile; default: independent samples",
        ),
    ),
    "optimiser": (
        Option(
            "optimizer_type",
            "optimizer.optimizer_type",
            "adamw, adamw8bit, adafactor, prodigy, schedulefree, or a class by its dotted name",
        ),
        Option("learning_rate", "optimizer.learning_rate", "at the top of the schedule; default: 1e-4, for prodigy 1"),
        Option("optimizer_args", "optimizer.optimizer_args", "more arguments of the optimiser, as name=value"),
        Option("max_grad_norm", "optimizer.max_grad_norm", "gradients are scaled down to this norm; 0: never"),
        Option(
            "lr_scheduler", "schedule.lr_scheduler", "how the learning rate goes on from the top", gives_advice=True
        ),
        Option("lr_warmup_steps", "schedule.lr_warmup_steps", "rise from 0: steps, a share below 1, or a percentage"),
        Option("lr_decay_steps", "schedule.lr_decay_steps", "fall of warmup_stable_decay, likewise"),
        Option(
            "lr_scheduler_num_cycles",
            "schedule.lr_scheduler_num_cycles",
            "for cosine_with_restarts, cosine_with_min_lr, warmup_stable_decay",
        ),
        Option("lr_scheduler_power", "schedule.lr_scheduler_power", "for polynomial"),
        Option(
            "lr_scheduler_timescale",
            "schedule.lr_scheduler_timescale",
            "for inverse_sqrt, in steps; default: the warm-up",
        ),
        Option(
            "lr_scheduler_min_lr_ratio",
            "schedule.lr_scheduler_min_lr_ratio",
            "lowest rate over the highest, for cosine_with_min_lr, warmup_stable_decay, polynomial; rex: 0.01",
        ),
    ),
    "what is written": (
        Option("output_dir", "output.output_dir", "folder"),
        Option("output_name", "output.output_name", "begins the name of every file"),
        Option("save_precision", "output.save_precision", "of the LoRA's file", aliases={"float": "fp32"}),
        Option("save_every_n_steps", "output.save_every_n_steps", "write the LoRA so often, not only at the end"),
        Option("save_every_n_epochs", "output.save_every_n_epochs", "likewise, by epochs"),
        Option("save_last_n_steps", "output.save_last_n_steps", "of those keep the ones of the last N steps"),
        Option("save_last_n_epochs", "output.save_last_n_epochs", "of those keep the last N"),
        Option("save_state", "output.save_state", "write the state for --resume with every save"),
        Option("save_state_on_train_end", "output.save_state_on_train_end", "and at the end"),
        Option("metadata_title", "output.metadata_title", "in the LoRA's metadata"),
        Option("metadata_author", "output.metadata_author", "likewise"),
        Option("metadata_description", "output.metadata_description", "likewise"),
        Option("metadata_license", "output.metadata_license", "likewise"),
        Option("metadata_tags", "output.metadata_tags", "likewise"),
        Option("training_comment", "output.training_comment", "likewise"),
        Option("no_metadata", "output.no_metadata", "leave the metadata out"),
    ),
    "what is looked at": (
        Option(
            "sample_prompts",
            "monitor.sample_prompts",
            "file of prompts for `flux2 generate --from_file`, made at the end",
        ),
        Option("sample_every_n_steps", "monitor.sample_every_n_steps", "make the sample pictures so often"),
        Option("sample_every_n_epochs", "monitor.sample_every_n_epochs", "likewise, by epochs"),
        Option("sample_at_first", "monitor.sample_at_first", "and before the first step"),
        Option("validate_every_n_steps", "monitor.validate_every_n_steps", "default: ten times in the run"),
        Option("num_validation_sigmas", "monitor.num_validation_sigmas", "noise levels for each held-out picture"),
        Option("log_every_n_steps", "monitor.log_every_n_steps", "write the loss so often"),
        Option("log_with", "monitor.log_with", "also log to these"),
        Option(
            "logging_dir",
            "monitor.logging_dir",
            "for tensorboard, which it switches on; default: logs in the output folder",
        ),
        Option("log_tracker_name", "monitor.log_tracker_name", "for tensorboard and wandb"),
        Option("wandb_run_name", "monitor.wandb_run_name", "for wandb"),
    ),
}
OPTIONS = {option.name: option for group in GROUPS.values() for option in group}
NETWORK_ARGS = {
    "include_patterns": "adapter.include",
    "exclude_patterns": "adapter.exclude",
    "rank_stabilized": "adapter.rank_stabilized",
    "use_rslora": "adapter.rank_stabilized",
    "dora": "adapter.dora",
    "use_dora": "adapter.dora",
    "factor": "adapter.lokr_factor",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
}
"""Names that ``--network_args name=value`` takes, and their settings."""
NETWORK_MODULES = {
    "lora": "lora", "networks.lora_flux_2": "lora", "networks.lora": "lora", "lokr": "lokr", "networks.lokr": "lokr",
}  # fmt: skip


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options of ``flux2 train``; those that are not given stay out of the namespace."""
    group = parser.add_argument_group("models and data")
    group.add_argument("--config_file", metavar="TOML", help="options in a file, in sections or without")
    group.add_argument("--dataset_config", metavar="FILE", help="settings, table or folder, as it was cached; needed")
    names = ", ".join(VARIANTS)
    group.add_argument("--model_version", metavar="NAME", help=f"{names}, or auto; default: auto with --dit, else tiny")
    group.add_argument("--dit", metavar="PATH", help="the base; default: looked up by variant")
    group.add_argument("--vae", metavar="PATH", help="autoencoder, for sample pictures; default: looked up by variant")
    group.add_argument("--text_encoder", metavar="PATH", help="for sample pictures; default: looked up by variant")
    group.add_argument("--tokenizer", metavar="PATH", help="default: beside the text encoder")
    group.add_argument("--models_dir", metavar="DIR", help="ComfyUI's models folder, searched for what is not given")
    group.add_argument("--device", metavar="NAME", help="such as cpu or cuda:0; default: cuda where there is one")
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(f"--{option.name}", **_argument(option))
        if title in SPECIAL:
            SPECIAL[title](group)
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    for name in REFUSED:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--resume", metavar="DIR", help="go on from a state, <output_name>-state")


def _add_memory_options(group: argparse._ArgumentGroup) -> None:
    flag = argparse.BooleanOptionalAction
    group.add_argument(
        "--gradient_checkpointing",
        action=flag,
        help="compute activations again in the backward pass instead of keeping them; default: on, for tiny off",
    )
    group.add_argument(
        "--gradient_checkpointing_cpu_offload",
        action=flag,
        help="and keep what is left of them in host memory; default: where the device has no room for them",
    )
    group.add_argument("--fp8_base", action="store_true", default=None, help="the same as --precision fp8")
    group.add_argument("--fp8_scaled", action="store_true", default=None, help=argparse.SUPPRESS)
    group.add_argument("--fp8_text_encoder", action="store_true", default=None, help=argparse.SUPPRESS)


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    names = ", ".join(NETWORK_MODULES)
    group.add_argument("--network_module", metavar="NAME", help=f"{names}; default: lora")
    group.add_argument(
        "--network_args",
        nargs="*",
        metavar="NAME=VALUE",
        help='include_patterns=["REGEX"] and exclude_patterns=["REGEX"] choose layers; use_dora=True; use_rslora=True; '
        "loraplus_lr_ratio=16 lets lora_B learn so much faster; factor=8 is the smaller side of both factors of LoKr",
    )


def _add_timestep_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--show_timesteps",
        metavar="HOW",
        help="train nothing, show how often each noise level would be trained: console, image, or a picture's path",
    )


SPECIAL: dict[str, Callable[[argparse._ArgumentGroup], None]] = {
    "run": _add_run_options,
    "memory": _add_memory_options,
    "LoRA": _add_network_options,
    "noise levels": _add_timestep_options,
}
"""What groups have beside their settings' options."""


def train_config(values: Mapping[str, Any]) -> TrainConfig:
    """Settings from options by name; what is None or missing keeps its default.

    Raises:
        ValueError: an unknown name, a value of another kind, or one that is refused.
    """
    refuse_foreign_options(values)
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name in OPTIONS and value is not None:
            option = OPTIONS[name]
            value = option.aliases.get(value, value) if isinstance(value, str) else value
            checked = _convert(name, value, str if option.gives_advice else _kind(option.setting))
            settings[option.setting] = checked * option.scale if option.scale is not None else checked
    settings |= _network_settings(values) | _precisions(values)
    if values.get("logging_dir") is not None and values.get("log_with") is None:
        settings["monitor.log_with"] = "tensorboard"  # as in musubi-tuner
    checkpointing = _checkpointing(values)
    if checkpointing is not None:
        settings["checkpointing"] = checkpointing
    return _build(TrainConfig, settings)


def flatten_tables(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a TOML, whatever sections they stand in."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flatten_tables(value)
        else:
            yield name, value


def _network_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if (module := values.get("network_module")) is not None:
        if module not in NETWORK_MODULES:
            raise ValueError(f"--network_module is {module!r}; known: {', '.join(NETWORK_MODULES)}")
        settings["adapter.kind"] = NETWORK_MODULES[module]
    for text in values.get("network_args") or ():
        name, found, value = str(text).partition("=")
        if name in REFUSED_NETWORK_ARGS:
            raise ValueError(f"--network_args has {text!r}, which is not supported: {REFUSED_NETWORK_ARGS[name]}")
        if not found or name not in NETWORK_ARGS:
            raise ValueError(f"--network_args has {text!r}; give name=value with one of {', '.join(NETWORK_ARGS)}")
        settings[NETWORK_ARGS[name]] = _convert(name, _literal(value), _kind(NETWORK_ARGS[name]))
    return settings


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _precisions(values: Mapping[str, Any]) -> dict[str, Any]:
    """musubi-tuner's options for fp8; fp8_scaled goes with fp8_base there, and alone means the same here."""
    settings: dict[str, Any] = {}
    for name, setting, flags in (
        ("precision", "base_precision", ("fp8_base", "fp8_scaled")),
        ("text_encoder_precision", "text_encoder_precision", ("fp8_text_encoder",)),
    ):
        chosen = choose_precision(name, values.get(name), **{flag: values.get(flag) for flag in flags})
        if any(values.get(flag) for flag in flags):
            settings[setting] = chosen
    return settings


def _checkpointing(values: Mapping[str, Any]) -> str | None:
    blocks, offload = values.get("gradient_checkpointing"), values.get("gradient_checkpointing_cpu_offload")
    if offload and blocks is False:
        raise ValueError("gradient_checkpointing_cpu_offload needs gradient_checkpointing; switch both on")
    if offload:
        return "offload"
    return None if blocks is None else "blocks" if blocks else "none"


def _build(cls: type[Any], settings: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass with settings by path; nested ones are built from theirs."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for name in (entry.name for entry in fields(cls)):
        path = prefix + name
        if is_dataclass(hints[name]):
            values[name] = _build(hints[name], settings, f"{path}.")
        elif path in settings:
            values[name] = settings[path]
    return replace(cls(), **values) if prefix == "" else cls(**values)


def _kind(setting: str) -> Any:
    """The type of a setting, with None left out."""
    cls: Any = TrainConfig
    for part in setting.split("."):
        cls = typing.get_type_hints(cls)[part]
    if get_origin(cls) in (typing.Union, UnionType):
        kinds = [kind for kind in get_args(cls) if kind is not NoneType]
        return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007 - from a list
    return cls


def _default(setting: str) -> Any:
    value: Any = TrainConfig()
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def _argument(option: Option) -> dict[str, Any]:
    """How argparse reads an option; values are checked by `_convert`, as those of a TOML are."""
    kind, default = _kind(option.setting), _default(option.setting)
    shown = default / option.scale if option.scale is not None else default
    shown = f"{shown:g}" if isinstance(shown, float) else shown
    is_told = "default" in option.help or default is None or default is False or default == ()
    text = option.help if is_told else f"{option.help}; default: {'on' if default is True else shown}"
    if kind is bool and default is True:
        return {"action": argparse.BooleanOptionalAction, "default": None, "help": text}
    if kind is bool:
        return {"action": "store_true", "default": None, "help": text}
    if get_origin(kind) is Literal:
        choices = (*get_args(kind), *option.aliases)
        if option.gives_advice:
            return {"metavar": f"{{{','.join(choices)}}}", "help": text}
        return {"choices": choices, "help": text}
    if get_origin(kind) is tuple:
        return {"nargs": "*", "metavar": "VALUE", "help": text}
    metavar = {int: "N", float: "X", Path: "PATH"}.get(kind, "VALUE")
    return {"metavar": metavar, "help": text.replace("%", "%%")}


def _convert(name: str, value: Any, kind: Any) -> Any:
    """A value from the command line or a TOML as the type of its setting."""
    origin = get_origin(kind)
    if origin in (typing.Union, UnionType):
        for choice in get_args(kind):
            try:
                return _convert(name, value, choice)
            except ValueError:
                continue
    elif origin is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, get_args(kind)))}")
    elif origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(name, item, get_args(kind)[0]) for item in items)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return int(value)
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind in (str, Path) and isinstance(value, (str, Path)):
        return kind(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    raise ValueError(f"{name} is {value!r}; it must be {words.get(kind, 'of another kind')}")
