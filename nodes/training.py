"""The node that trains a LoRA."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from glob import escape
from pathlib import Path
from typing import Any, get_args

from PIL import Image, ImageDraw
from torch import Tensor

from ..flux2_core.detect import resolve_variant
from ..flux2_core.files import write_text
from ..flux2_core.prompt_lines import OPTION_FIELDS, PromptLine, parse_prompt_line, prompt_lines
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.variants import VARIANTS, Variant
from ..training.adapters import AdapterConfig
from ..training.config import OutputConfig, TrainConfig
from ..training.foreign_options import REFUSED, WITHOUT_EFFECT
from ..training.optimizers import NAMES, LearningRateScheduler, OptimizerConfig, ScheduleConfig, find_optimizer
from ..training.train_options import OPTIONS, flatten_tables, train_config
from ..training.train_progress import TrainStep, describe_step
from . import host
from .datasets import LinkedDataset, fill_cache, picture_batch
from .lora import LoraFile
from .sampling import widget_value

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
OTHER_OPTIONS = (
    "network_module", "network_args", "gradient_checkpointing", "gradient_checkpointing_cpu_offload", "fp8_base",
    "fp8_scaled", "fp8_text_encoder",
)  # fmt: skip
"""That stand for several settings each."""
MAX_STEPS = 10_000_000
MAX_RANK = 4096
NAME = re.compile(r"\w(?:[\w .()+-]{0,98}\w)?", re.ASCII)
"""File names that every system takes."""


class TrainLoRA:
    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Trains a LoRA for a FLUX.2 DiT on an encoded dataset. Stop keeps the state: queue again to go on. Train on a "
        "base checkpoint (dev, klein-base) and use the LoRA with the distilled one as well."
    )
    SEARCH_ALIASES = ("train", "fine-tune", "finetune", "lora training", "dreambooth", "trainer", "lokr", "dora")
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("FLUX2_LORA", "STRING", "IMAGE", "IMAGE", "INT")
    RETURN_NAMES = ("lora", "lora_name", "curves", "samples", "steps")
    OUTPUT_TOOLTIPS = (
        "The trained LoRA, for FLUX.2 Apply LoRA.",
        "Its name in models/loras, for any node that loads LoRAs.",
        "Loss, validation loss and learning rate over the steps.",
        "The last sample pictures; smaller ones in a black frame.",
        "Steps that the LoRA was trained for.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        every = {"default": 0, "min": 0, "max": MAX_STEPS}
        return {
            "required": {
                "dataset": ("FLUX2_DATASET", {"tooltip": "From FLUX.2 Cache Dataset."}),
                "dit_name": (
                    host.model_names("dit"),
                    {"tooltip": "File in models/diffusion_models to train on; best a base, not a distilled one."},
                ),
                "variant": (
                    ["auto", *VARIANTS],
                    {"default": "auto", "tooltip": "Which FLUX.2 the file is. auto tells it from the file."},
                ),
                "output_name": (
                    "STRING",
                    {
                        "default": OutputConfig.output_name,
                        "tooltip": f"Name of the run. The LoRA goes to models/loras/{host.OWN_FOLDER}, its state, "
                        f"sample pictures and curves to output/{host.OWN_FOLDER}/<name>.",
                    },
                ),
                "max_train_steps": (
                    "INT",
                    {
                        "default": TrainConfig.max_train_steps,
                        "min": 1,
                        "max": MAX_STEPS,
                        "tooltip": "Steps of the optimiser. Raise it to train a finished run on.",
                    },
                ),
                "learning_rate": (
                    "FLOAT",
                    {
                        "default": widget_value(OptimizerConfig.learning_rate) + 0.0,
                        "min": 0.0,
                        "max": 10.0,
                        "step": 1e-6,
                        "tooltip": f"0: {OptimizerConfig().rate:g}, or for prodigy 1.",
                    },
                ),
                "rank": (
                    "INT",
                    {
                        "default": AdapterConfig.rank,
                        "min": 1,
                        "max": MAX_RANK,
                        "tooltip": "Size of the LoRA: a larger one holds more and needs more memory.",
                    },
                ),
                "alpha": (
                    "FLOAT",
                    {
                        "default": widget_value(AdapterConfig.alpha) + 0.0,
                        "min": 0.0,
                        "max": float(MAX_RANK),
                        "step": 0.5,
                        "tooltip": "The LoRA counts by alpha / rank. 0: the rank, so that it counts in full.",
                    },
                ),
                "optimizer_type": (
                    list(NAMES),
                    {
                        "default": OptimizerConfig.optimizer_type,
                        "tooltip": "adamw8bit needs less memory; prodigy finds the learning rate itself. prodigy and "
                        "schedulefree need their packages.",
                    },
                ),
                "lr_scheduler": (
                    list(get_args(LearningRateScheduler)),
                    {
                        "default": ScheduleConfig.lr_scheduler,
                        "tooltip": "How the learning rate goes on; warm-up and the like go into more_settings.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": TrainConfig.seed,
                        "min": 0,
                        "max": 2**63 - 1,
                        # A seed that changes with every queue would make a new run of each.
                        "control_after_generate": False,
                        "tooltip": "Decides order, noise and first weights: the same seed gives the same LoRA.",
                    },
                ),
                "save_every_n_steps": (
                    "INT",
                    {**every, "tooltip": "Also keep the LoRA, and the state, every so many steps. 0: at the end."},
                ),
                "sample_every_n_steps": (
                    "INT",
                    {**every, "tooltip": "Make the sample pictures every so many steps. 0: only at the end."},
                ),
                "sample_prompts": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "A picture for each line, made during training. Options go behind the prompt: --w "
                        "and --h size, --d seed, --s steps, --g guidance scale, --n negative prompt, --ci reference in "
                        "the input folder. Empty: none.",
                    },
                ),
                "resume": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Go on where a stopped run of this name ended. Off: begin anew, under a name with a "
                        "number where this one is taken; nothing is overwritten.",
                    },
                ),
                "more_settings": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Any other options of `flux2 train` as TOML, one a line, such as ema_decay = 0.999, "
                        'gradient_accumulation_steps = 4 or network_args = ["dora=true"].',
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        dit_name: str | None = None,
        output_name: str | None = None,
        sample_prompts: str | None = None,
        more_settings: str | None = None,
    ) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if dit_name is not None:
                host.check_model_name("dit", dit_name)
            if output_name is not None:
                check_name(output_name)
            read_prompts(sample_prompts or "")
            read_more_settings(more_settings or "")
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        dit_name: str | None = None,
        output_name: str | None = None,
        resume: bool | None = None,
        sample_prompts: str | None = None,
        more_settings: str | None = None,
        **_: object,
    ) -> str:
        # The dataset, its encoders and the widgets count without being named here: they change the graph themselves.
        try:
            paths = [] if dit_name is None else [host.model_path("dit", dit_name)]
            weights = read_more_settings(more_settings or "").get("network_weights")
            paths += [] if weights is None else [weights]
            for line in read_prompts(sample_prompts or ""):
                paths += map(Path, parse_prompt_line(line).references)
            state = [host.fingerprint(path) for path in paths]
        except (ValueError, OSError) as error:  # the run itself will say so on the node
            return str(error)
        return "\n".join([*state, _made.since((output_name, resume))])

    @classmethod
    def train(
        cls,
        dataset: LinkedDataset,
        dit_name: str,
        variant: str,
        sample_prompts: str,
        resume: bool,
        more_settings: str,
        unique_id: str | None = None,
        **widgets: Any,
    ) -> tuple[LoraFile, str, Tensor, Tensor, int]:
        dit = host.model_path("dit", dit_name)
        found = resolve_variant(TensorSource(dit, component="dit"), variant)
        _check_encoders(dataset, found)
        run = _plan(widgets, sample_prompts, more_settings, resume=resume)
        fill_cache(dataset, unique_id)
        steps = _train(run, dataset, found, dit, unique_id)
        _made.note((widgets["output_name"], resume), run.lora)
        return (
            LoraFile(path=run.lora),
            str(run.lora.relative_to(host.lora_directory().absolute())),
            picture_batch([run.curves()]),
            picture_batch(run.last_samples(steps)),
            steps,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with its places."""

    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Of state, sample pictures and curves."""
        return self.config.output.output_dir

    @property
    def name(self) -> str:
        return self.config.output.output_name

    @property
    def lora(self) -> Path:
        """Where the finished LoRA goes."""
        assert self.config.output.lora_dir is not None
        return self.config.output.lora_dir / f"{self.name}.safetensors"

    @property
    def state(self) -> Path:
        """Folder to go on from."""
        return self.folder / f"{self.name}-state"

    def curves(self) -> Image.Image:
        from ..training.plots import draw_curves

        return draw_curves(self.folder / f"{self.name}-metrics.jsonl")

    def last_samples(self, step: int) -> list[Image.Image]:
        paths = sorted((self.folder / "sample").glob(f"{escape(self.name)}_{step:06d}_*.png"))
        pictures = []
        for path in paths:
            with Image.open(path) as image:
                pictures.append(image.convert("RGB"))
        return pictures or [_blank("no sample pictures: write sample_prompts")]


class _MadeFiles:
    """LoRAs that nodes have made: ComfyUI keeps an output that is a path, whatever becomes of the file."""

    def __init__(self) -> None:
        self._files: dict[object, tuple[Path, str]] = {}
        self._states: dict[object, str] = {}

    def since(self, key: object) -> str:
        """Stays the same until the file is no longer the one that was noted."""
        if key in self._files:
            path, noted = self._files[key]
            now = host.fingerprint(path) if path.is_file() else "gone"
            if now != noted:
                self._states[key] = now
        return self._states.get(key, "")

    def note(self, key: object, path: Path) -> None:
        self._files[key] = (path, host.fingerprint(path))


_made = _MadeFiles()


def check_name(name: str) -> None:
    """Refuses names that are none for a file everywhere.

    Raises:
        ValueError: with what is allowed.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"output_name is {name!r}; give up to 100 letters, digits, spaces and . ( ) + - _ that begin and end with "
            "a letter or digit, and no folder"
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
        if name in OWN_OPTIONS:
            raise ValueError(f"more_settings sets {name}: {OWN_OPTIONS[name]}")
        if name in REFUSED:
            raise ValueError(f"more_settings sets {name}, which is not supported: {REFUSED[name]}")
        if name not in (*OPTIONS, *OTHER_OPTIONS, *WITHOUT_EFFECT):
            raise ValueError(f"more_settings sets {name!r}, which is no option; `flux2 train --help` lists them")
        if name in values:
            raise ValueError(f"more_settings sets {name} twice; keep one of them")
        values[name] = value
    if (weights := values.get("network_weights")) is not None:
        values["network_weights"] = host.lora_path(str(weights))
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


def _check_encoders(dataset: LinkedDataset, variant: Variant) -> None:
    before = dataset.variant
    if (before.text_encoder, before.autoencoder) != (variant.text_encoder, variant.autoencoder):
        raise ValueError(
            f"the dataset is encoded for {before.name}, and the DiT is {variant.name}, which has other encoders; "
            "choose its text encoder and AE in FLUX.2 Cache Dataset"
        )


def _plan(widgets: Mapping[str, Any], sample_prompts: str, more_settings: str, *, resume: bool) -> Run:
    """Settings and places of a run; everything that can be refused is, and nothing is written but the prompts.

    Raises:
        ValueError: settings that are wrong or contradict each other.
    """
    # 1. Settings. A widget at 0 leaves open what can be left open.
    values = read_more_settings(more_settings)
    for widget, option in WIDGET_OPTIONS.items():
        value = widgets[widget]
        is_open = value == 0 and widget != "seed"
        values[option] = None if is_open else value
    check_name(widgets["output_name"])
    lines = read_prompts(sample_prompts)
    if not lines and (often := widgets["sample_every_n_steps"]):
        raise ValueError(f"sample_every_n_steps is {often}, but sample_prompts is empty; write some, or set it to 0")

    # 2. Places in ComfyUI's folders.
    output, loras = (folder.absolute() / host.OWN_FOLDER for folder in (host.output_directory(), host.lora_directory()))
    name = widgets["output_name"] if resume else _free_name(widgets["output_name"], output, loras)
    values |= {"output_name": name, "output_dir": output / name, "save_state": True, "save_state_on_train_end": True}
    if lines:
        values["sample_prompts"] = output / name / "prompts.txt"
    config = train_config(values)
    find_optimizer(config.optimizer, allow_dotted=False)
    if lines:
        (output / name).mkdir(parents=True, exist_ok=True)
        write_text(output / name / "prompts.txt", "\n".join(lines) + "\n")
    return Run(config=replace(config, output=replace(config.output, lora_dir=loras)))


def _free_name(name: str, *folders: Path) -> str:
    """The name, with a number behind it where a run has it."""
    number, free = 1, name
    while any((folder / free).exists() or (folder / f"{free}.safetensors").exists() for folder in folders):
        number += 1
        free = f"{name}_{number:05}"
    return free


def _train(run: Run, dataset: LinkedDataset, variant: Variant, dit: Path, node_id: str | None) -> int:
    """Trains what is left of a run; returns the steps done in all."""
    from ..training.cache import open_cache
    from ..training.loader import count_steps, make_schedule
    from ..training.lora_recipe import STATE_FILE, train_lora
    from ..training.processes import Processes
    from ..training.train_files import TrainFiles
    from ..training.train_resume import compare_run, describe_run
    from ..training.train_state import load_tree

    files = TrainFiles(
        variant=variant,
        dit=dit,
        autoencoder=dataset.autoencoder,
        text_encoder=dataset.text_encoder,
        tokenizer=dataset.tokenizer,
    )
    cached = open_cache(
        dataset.dataset,
        variant,
        autoencoder=dataset.autoencoder,
        text_encoder=dataset.text_encoder,
        tokenizer=dataset.tokenizer,
    )
    num_steps = count_steps(run.config, make_schedule(run.config, cached))
    resume = None
    if (file := run.state / STATE_FILE).is_file():
        resume = run.state
        done, differences = compare_run(load_tree(file), describe_run(run.config, cached, files, 1), run.state)
        if _is_finished(run, done, num_steps, differences):
            host.show_text(f"{run.name} is trained already: {done} steps. Nothing was done", node_id)
            return done

    live = _Live(num_steps, node_id)
    host.show_text("loading", node_id)
    host.unload_all()  # training loads networks of its own, and what it will take is not known before
    try:
        result = train_lora(
            run.config,
            cached,
            files,
            processes=Processes(device=host.device()),
            resume=resume,
            on_step=live.on_step,
            on_sample=live.on_sample,
            should_stop=host.should_stop,
        )
    except BaseException:
        if live.step:
            host.show_text(f"stopped after step {live.step}, its state is kept: queue again to go on", node_id)
        raise
    finally:
        host.release_memory()
    num_bad = result.num_bad_steps
    skipped = f", {num_bad} of them skipped since their loss was not finite" if num_bad else ""
    distilled = f". {variant.name} is distilled: better train on its base" if variant.distilled else ""
    host.show_text(f"{run.name}: {result.num_steps} steps{skipped}, loss {live.loss:.4f}{distilled}", node_id)
    return result.num_steps


def _is_finished(run: Run, done: int, num_steps: int, differences: list[str]) -> bool:
    """Whether the run of this name has nothing left to do.

    Raises:
        ValueError: it is another run, or a longer one, or its LoRA has gone.
    """
    advice = "give another output_name, or switch resume off to begin anew beside it"
    if differences:
        raise ValueError(f"{run.name} had other settings: {'; '.join(differences)}. Set them back, or else {advice}")
    if done > num_steps:
        raise ValueError(
            f"{run.name} is trained for {done} steps already, and max_train_steps is {num_steps}; {advice}"
        )
    if done == num_steps and not run.lora.is_file():
        raise ValueError(f"{run.name} is trained, but {run.lora} has gone; put it back, {advice}")
    return done == num_steps


class _Live:
    """What the node shows while it trains."""

    def __init__(self, num_steps: int, node_id: str | None) -> None:
        self.progress = host.Progress(num_steps, node_id)
        self.step = 0
        self.loss = math.nan
        self.text = host.LiveText(node_id)

    def on_step(self, step: TrainStep) -> None:
        self.step, self.loss = step.step, step.average_loss
        self.progress.update(step.step)
        self.text.show(describe_step(step), is_last=step.step == step.num_steps)

    def on_sample(self, step: int, image: Image.Image) -> None:
        self.progress.update(step, image)


def _blank(text: str) -> Image.Image:
    image = Image.new("RGB", (320, 64))
    ImageDraw.Draw(image).text((16, 24), text, fill=(200, 200, 200))
    return image
