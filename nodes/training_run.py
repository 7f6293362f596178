"""A run of FLUX.2 Train LoRA: its settings, its places in ComfyUI's folders, and what the node shows of it."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..flux2_core.command_errors import describe_error
from ..flux2_core.files import write_text
from ..flux2_core.prompt_lines import OPTION_FIELDS, PromptLine, parse_prompt_line, prompt_lines
from ..flux2_core.variants import Variant
from ..training.config import TrainConfig
from ..training.foreign_options import REFUSED, WITHOUT_EFFECT
from ..training.optimizers import find_optimizer
from ..training.run_files import RunFiles
from ..training.train_options import OPTIONS, flatten_tables, train_config
from ..training.train_progress import TrainResult, TrainStep, describe_step
from . import host
from .datasets import LinkedDataset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

WIDGET_OPTIONS = {
    "output_name": "output_name",
    "max_train_steps": "max_train_steps",
    "learning_rate": "learning_rate",
    "rank": "network_dim",
    "alpha": "network_alpha",
    "optimizer_type": "optimizer_type",
    "lr_scheduler": "lr_scheduler",
    "seed": "seed",
    "save_every_n_steps": "save_every_n_steps",
    "sample_every_n_steps": "sample_every_n_steps",
    "precision": "precision",
    "vram_budget": "vram_budget",
    "network_weights": "network_weights",
}
"""Widgets and the options of ``flux2 train`` that they set."""
OWN_OPTIONS = {
    **{option: f"set {widget} on the node" for widget, option in WIDGET_OPTIONS.items()},
    "sample_prompts": "write the prompts on the node",
    **dict.fromkeys(("output_dir", "logging_dir"), "the node writes into ComfyUI's own folders"),
    **dict.fromkeys(("save_state", "save_state_on_train_end"), "the node always keeps the state"),
    "resume": "the node goes on by itself",
    **dict.fromkeys(("log_with", "log_tracker_name", "wandb_run_name"), "use `flux2 train` to log elsewhere"),
    **dict.fromkeys(("dataset_config", "vae", "text_encoder", "tokenizer"), "it comes with the dataset"),
    **dict.fromkeys(("dit", "model_version"), "choose it on the node"),
    **dict.fromkeys(("config_file", "models_dir", "device", "show_timesteps"), "it belongs to `flux2 train`"),
}
"""Options that the TOML may not set, and what to do instead."""
OTHER_WORDS = {
    **{widget: f"set {widget} on the node" for widget in WIDGET_OPTIONS if widget not in OPTIONS},
    "lr": "set learning_rate on the node",
    **dict.fromkeys(("batch_size", "train_batch_size", "resolution"), "set it in FLUX.2 Cache Dataset"),
}
"""What people look for by another name."""
OTHER_OPTIONS = (
    "network_module", "network_args", "gradient_checkpointing", "gradient_checkpointing_cpu_offload", "fp8_base",
    "fp8_scaled", "fp8_text_encoder",
)  # fmt: skip
"""That stand for several settings each."""
NAME = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))\w(?:[\w .()+-]{0,98}\w)?", re.ASCII | re.IGNORECASE)
"""File names that every system takes."""
PROMPTS_FILE = "prompts.txt"
ADVICE = "give another output_name, or switch resume off to begin anew beside it"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with its places."""

    config: TrainConfig
    lines: tuple[str, ...]
    """Sample prompts, each reference with its whole path."""
    resumes: bool
    """Whether the same graph queued again goes on with it."""

    @cached_property
    def files(self) -> RunFiles:
        """Where it writes."""
        return RunFiles(self.config.output, writes=False)

    @property
    def name(self) -> str:
        return self.config.output.output_name

    @property
    def lora(self) -> Path:
        """Where the finished LoRA goes."""
        return self.files.lora_path("trained")

    def sample_paths(self, step: int) -> list[Path]:
        """Pictures made after a step, in the order of the prompts; those that were not made are left out."""
        from ..training.samples import sample_name

        seeds = [parse_prompt_line(line).seed for line in self.lines]
        names = [
            sample_name(self.name, step, index, self.config.seed if seed is None else seed)
            for index, seed in enumerate(seeds)
        ]
        return [path for name in names if (path := self.files.sample_folder / name).is_file()]

    def has_other_prompts(self) -> bool:
        """Whether it was trained with other sample prompts than those of now."""
        file = self.files.folder / PROMPTS_FILE
        return bool(self.lines) and (not file.is_file() or file.read_text(encoding="utf-8") != self._prompts())

    def write_prompts(self) -> None:
        """Puts the prompts where training reads them."""
        if self.lines:
            self.files.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.files.folder / PROMPTS_FILE, self._prompts())

    def _prompts(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


def check_name(name: str) -> None:
    """Refuses names that are none for a file everywhere.

    Raises:
        ValueError: with what is allowed.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"output_name is {name!r}; give up to 100 letters, digits, spaces and . ( ) + - _ that begin and end with "
            "a letter or digit, no folder, and no name of a device of Windows"
        )


def read_prompts(text: str) -> list[str]:
    """The lines of sample prompts, each reference with its whole path.

    Raises:
        ValueError: a line is wrong, or its reference is not in the input folder.
    """
    lines = []
    for number, line in prompt_lines(text.splitlines()):
        try:
            prompt = parse_prompt_line(line)
            lines.append(line if not prompt.references else _with_whole_paths(prompt))
        except ValueError as error:
            raise ValueError(f"sample_prompts, line {number}: {error}") from None
    return lines


def read_more_settings(text: str) -> dict[str, Any]:
    """Options by name from the TOML on the node.

    Raises:
        ValueError: it is no TOML, or sets something unknown or not for it.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"more_settings is no TOML ({error}); write a line such as ema_decay = 0.999") from None
    values: dict[str, Any] = {}
    for name, value in flatten_tables(tables):
        if (advice := OWN_OPTIONS.get(name) or OTHER_WORDS.get(name)) is not None:
            raise ValueError(f"more_settings sets {name}: {advice}")
        if name in REFUSED:
            raise ValueError(f"more_settings sets {name}, which is not supported: {REFUSED[name]}")
        known = (*OPTIONS, *OTHER_OPTIONS, *WITHOUT_EFFECT)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]}?" if close else "`flux2 train --help` lists them"
            raise ValueError(f"more_settings sets {name!r}, which is no option; {advice}")
        if name in values:
            raise ValueError(f"more_settings sets {name} twice; keep one of them")
        values[name] = value
    if (weights := values.get("base_weights")) is not None:
        names = weights if isinstance(weights, list) else [weights]
        values["base_weights"] = [host.lora_path(str(name)) for name in names]
    return values


def _with_whole_paths(prompt: PromptLine) -> str:
    """A line with references of the input folder, as it is written for the training."""
    paths = tuple(
        str(host.find_inside([host.input_directory()], reference, "--ci").resolve()) for reference in prompt.references
    )
    wanted, parts = replace(prompt, references=paths), [prompt.prompt]
    names = {field: option for option, (field, _) in reversed(OPTION_FIELDS.items())}
    for field in fields(prompt):
        value = getattr(wanted, field.name)
        if field.name in names and value is not None:
            values = value if isinstance(value, tuple) else (value,)
            parts += [f"--{names[field.name]} {one}" for one in values]
    line = " ".join(parts)
    if "\n" in line or parse_prompt_line(line) != wanted:
        raise ValueError(f"the paths of {', '.join(prompt.references)} cannot be written in a line; rename them")
    return line


def check_encoders(dataset: LinkedDataset, variant: Variant) -> None:
    before = dataset.variant
    if (before.text_encoder, before.autoencoder) != (variant.text_encoder, variant.autoencoder):
        raise ValueError(
            f"the dataset is encoded for {before.name}, and the DiT is {variant.name}, which has other encoders; "
            "choose its text encoder and AE in FLUX.2 Cache Dataset"
        )


def plan_run(widgets: Mapping[str, Any], sample_prompts: str, more_settings: str, *, resume: bool) -> Run:
    """Settings and places of a run; nothing is written.

    Raises:
        ValueError: settings that are wrong or contradict each other.
    """
    # 1. Settings. A widget at 0, auto or none leaves open what can be left open.
    values = read_more_settings(more_settings)
    for widget, option in WIDGET_OPTIONS.items():
        value = widgets.get(widget)
        values[option] = value if widget == "seed" or value not in (0, "auto", host.NO_LORA) else None
    if (weights := values["network_weights"]) is not None:
        values["network_weights"] = host.lora_path(weights)
    check_name(widgets["output_name"])
    lines = read_prompts(sample_prompts)
    if not lines and (often := widgets["sample_every_n_steps"]):
        raise ValueError(f"sample_every_n_steps is {often}, but sample_prompts is empty; write some, or set it to 0")

    # 2. Places in ComfyUI's folders.
    output, loras = (folder.absolute() / host.OWN_FOLDER for folder in (host.output_directory(), host.lora_directory()))
    name = widgets["output_name"] if resume else _free_name(widgets["output_name"], output, loras)
    values |= {"output_name": name, "output_dir": output / name, "save_state": True, "save_state_on_train_end": True}
    if lines:
        values["sample_prompts"] = output / name / PROMPTS_FILE
    config = train_config(values)
    find_optimizer(config.optimizer, allow_dotted=False)
    config = replace(config, output=replace(config.output, lora_dir=loras))
    return Run(config=config, lines=tuple(lines), resumes=resume)


def _free_name(name: str, *folders: Path) -> str:
    """The name, with a number behind it where a run has it."""
    number, free = 1, name
    ends = ("", ".safetensors", "-step*.safetensors", "-[0-9]*.safetensors")
    while any(any(folder.glob(f"{escape(free)}{end}")) for folder in folders for end in ends):
        number += 1
        free = f"{name}_{number:05}"
    return free


def train_run(run: Run, dataset: LinkedDataset, variant: Variant, dit: Path, node_id: str | None) -> tuple[int, str]:
    """Trains what is left of a run; returns the steps done in all, and a line about it.

    Raises:
        ValueError: the run of this name is another one, or cannot be trained; its state is kept.
    """
    from ..training.cache import open_cache
    from ..training.loader import count_steps, make_schedule
    from ..training.lora_recipe import train_lora
    from ..training.processes import Processes
    from ..training.train_files import TrainFiles
    from ..training.train_resume import describe_run

    encoders: dict[str, Any] = {
        "autoencoder": dataset.autoencoder, "text_encoder": dataset.text_encoder, "tokenizer": dataset.tokenizer,
    }  # fmt: skip
    files = TrainFiles(variant=variant, dit=dit, **encoders)
    cached = open_cache(dataset.dataset, variant, **encoders)
    num_steps = count_steps(run.config, make_schedule(run.config, cached))
    done = _check_state(run, describe_run(run.config, cached, files, 1), num_steps)
    live = _Live(run, num_steps, node_id)
    if done == num_steps and run.lora.is_file():
        others = "; FLUX.2 Apply LoRA makes pictures of other prompts" if run.has_other_prompts() else ""
        return done, live.tell(f"{run.name} is trained already: {done} steps. Nothing was done{others}")

    run.write_prompts()
    live.tell(f"going on after step {done}: loading" if done else "loading")
    host.unload_all()  # training loads networks of its own, and what it will take is not known before
    try:
        result = train_lora(
            run.config,
            cached,
            files,
            processes=Processes(device=host.device()),
            resume=run.files.state_folder if done else None,
            on_step=live.on_step,
            on_sample=live.on_sample,
            should_stop=host.is_interrupted,
        )
    except BaseException as error:
        live.tell_failure()
        if isinstance(error, OSError):
            raise ValueError(describe_error(error)) from error
        raise
    finally:
        host.release_memory()
    line = live.tell_end(result, variant)
    host.should_stop()  # ends the queue only here: what a stopped run leaves is written
    return result.num_steps, line


def _check_state(run: Run, description: dict[str, Any], num_steps: int) -> int:
    """Steps that the run of this name has done, 0 where there is none.

    Raises:
        ValueError: it is another run, or a longer one, or its state has gone.
    """
    from ..training.train_resume import STATE_FILE, compare_run
    from ..training.train_state import load_tree

    if not (file := run.files.state_folder / STATE_FILE).is_file():
        if run.lora.is_file():
            raise ValueError(f"{run.lora} is there already, and no {file} to train it on from; {ADVICE}")
        return 0
    done, differences = compare_run(load_tree(file, with_tensors=False), description, run.files.state_folder)
    if differences:
        raise ValueError(f"{run.name} had other settings: {'; '.join(differences)}. Set them back, or else {ADVICE}")
    if done > num_steps:
        raise ValueError(
            f"{run.name} is trained for {done} steps already, and max_train_steps is {num_steps}; {ADVICE}"
        )
    return done


class _Live:
    """What the node shows while it trains."""

    def __init__(self, run: Run, num_steps: int, node_id: str | None) -> None:
        self.run, self.node_id = run, node_id
        self.progress = host.Progress(num_steps, node_id)
        self.step = 0
        self.loss = math.nan
        self.text = host.LiveText(node_id)

    def tell(self, line: str) -> str:
        host.show_text(line, self.node_id)
        return line

    def on_step(self, step: TrainStep) -> None:
        self.step, self.loss = step.step, step.average_loss
        if not host.is_interrupted():  # ComfyUI's bar would raise, before the run could write what it has
            self.progress.update(step.step)
        self.text.show(describe_step(step), is_last=step.step == step.num_steps)

    def on_sample(self, step: int, image: Image.Image) -> None:
        if not host.is_interrupted():
            self.progress.update(step, image)

    def tell_failure(self) -> None:
        """What is left of a run that an error has ended."""
        from ..training.train_resume import STATE_FILE
        from ..training.train_state import load_tree

        if not self.step:
            return
        try:
            state = load_tree(self.run.files.state_folder / STATE_FILE, with_tensors=False)
            kept = f"the state of step {state['step']} is kept: {self._how_to_go_on()}"
        except (ValueError, OSError, KeyError):
            kept = "its state could not be kept"
        self.tell(f"ended after step {self.step}, {kept}")

    def tell_end(self, result: TrainResult, variant: Variant) -> str:
        """What a run has left, stopped or not."""
        if result.stopped and not result.num_steps:
            return self.tell("stopped before the first step")
        assert result.lora_path is not None
        name = lora_name(result.lora_path)
        if result.stopped:
            return self.tell(
                f"stopped after step {result.num_steps}: {name} and the state are kept, {self._how_to_go_on()}"
            )
        loss = f", loss {self.loss:.4f}" if math.isfinite(self.loss) else ""
        num_bad = result.num_bad_steps
        skipped = f", {num_bad} of them skipped since their loss was not finite" if num_bad else ""
        distilled = f". {variant.name} is distilled: better train on its base" if variant.distilled else ""
        return self.tell(f"{self.run.name}: {result.num_steps} steps{skipped}{loss}, saved as {name}{distilled}")

    def _how_to_go_on(self) -> str:
        if self.run.resumes:
            return "queue again to go on"
        return f"switch resume on and set output_name to {self.run.name} to go on"


def lora_name(path: Path) -> str:
    """The name of a new LoRA in ComfyUI's list."""
    return str(path.relative_to(host.lora_directory().absolute()))


def open_pictures(paths: Sequence[Path], otherwise: str) -> list[Image.Image]:
    """Pictures in RGB; one with a text in place of none."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures or [_blank(otherwise)]


def _blank(text: str) -> Image.Image:
    image = Image.new("RGB", (320, 64))
    ImageDraw.Draw(image).text((16, 24), text, fill=(200, 200, 200))
    return image
