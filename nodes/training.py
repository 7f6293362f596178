"""The node that trains a LoRA."""

# ruff: noqa: N802 - ComfyUI gives these methods their names

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from ..flux2_core.detect import resolve_variant
from ..flux2_core.prompt_lines import parse_prompt_line
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.variants import VARIANTS
from ..training.adapters import AdapterConfig
from ..training.config import BasePrecision, OutputConfig, TrainConfig
from ..training.optimizers import NAMES, LearningRateScheduler, OptimizerConfig, ScheduleConfig
from . import host
from .datasets import LinkedDataset, fill_cache, picture_batch
from .loaders import budget_input
from .lora import LoraFile
from .sampling import widget_value
from .training_run import (
    check_encoders,
    check_name,
    lora_name,
    open_pictures,
    plan_run,
    read_more_settings,
    read_prompts,
    train_run,
)

MAX_STEPS = 10_000_000
MAX_RANK = 4096


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
            "optional": {
                "precision": (
                    list(get_args(BasePrecision)),
                    {
                        "default": TrainConfig.base_precision,
                        "tooltip": "How the frozen base is kept. auto: as in its file where that fits, else fp8. nf4 "
                        "is the smallest and the least exact. What does not fit is streamed.",
                    },
                ),
                "vram_budget": (
                    "FLOAT",
                    {
                        **budget_input()[1],
                        "default": widget_value(TrainConfig.vram_budget_gib) + 0.0,
                        "tooltip": "Memory of the GPU that training may take, in GiB. 0: what is free.",
                    },
                ),
                "network_weights": (
                    host.lora_names(),
                    {"tooltip": f"A LoRA of the same rank to start from. {host.NO_LORA}: start afresh."},
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
        network_weights: str | None = None,
        unique_id: str | None = None,
    ) -> bool | str:
        # None stands for a link, whose value is not known before the run.
        try:
            if dit_name is not None:
                host.check_model_name("dit", dit_name)
            if network_weights is not None:
                host.check_lora_name(network_weights)
            if output_name is not None:
                check_name(output_name)
            read_prompts(sample_prompts or "")
            read_more_settings(more_settings or "")
        except (ValueError, OSError) as error:
            return host.refusal(error, unique_id)
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        dit_name: str | None = None,
        output_name: str | None = None,
        resume: bool | None = None,
        sample_prompts: str | None = None,
        more_settings: str | None = None,
        network_weights: str | None = None,
        **_: object,
    ) -> str:
        # The dataset, its encoders and the widgets count without being named here: they change the graph themselves.
        try:
            paths = [] if dit_name is None else [host.model_path("dit", dit_name)]
            weights = read_more_settings(more_settings or "").get("base_weights", [])
            weights += [] if network_weights is None else [host.lora_path(network_weights)]
            paths += [path for path in weights if path is not None]
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
    ) -> dict[str, Any]:
        dit = host.model_path("dit", dit_name)
        found = resolve_variant(TensorSource(dit, component="dit"), variant)
        check_encoders(dataset, found)
        run = plan_run(widgets, sample_prompts, more_settings, resume=resume)
        fill_cache(dataset, unique_id)
        steps, line = train_run(run, dataset, found, dit, unique_id)
        _made.note((widgets["output_name"], resume), run.lora)
        samples, curves = run.sample_paths(steps), [path for path in [run.files.curves_path] if path.is_file()]
        name = lora_name(run.lora)
        result = (
            LoraFile(path=run.lora),
            name,
            picture_batch(open_pictures(curves, "no curves: they were deleted")),
            picture_batch(open_pictures(samples, "no sample pictures: write sample_prompts")),
            steps,
        )
        shown = [host.shown_output(path) for path in (*samples, *curves)]
        return {"ui": {"images": shown, "text": [line], "lora_name": [name]}, "result": result}


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
