"""``flux2 train``: from options to a trained LoRA."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..flux2_core.detect import resolve_variant
from ..flux2_core.tensor_source import TensorSource
from ..flux2_core.variants import Variant, get_variant
from .cache import open_cache
from .config import TrainConfig
from .dataset import Dataset, list_dataset
from .dataset_config import load_dataset_config, read_settings
from .foreign_options import describe_without_effect
from .lora_recipe import train_lora
from .optimizers import find_optimizer
from .plots import describe_timesteps, draw_timesteps
from .processes import join_processes, launcher_precision
from .timesteps import schedule_steps
from .train_files import find_train_files
from .train_options import flatten_tables, train_config
from .train_progress import TrainResult, TrainStep, describe_step

logger = logging.getLogger(__name__)

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
"""SIGHUP comes when a terminal is closed; Windows has SIGBREAK instead, for Ctrl-Break."""


def run_train(args: argparse.Namespace) -> int:
    """Carries out the options of `train_options`; 0 when the training came to its end.

    Raises:
        ValueError: something that was asked for cannot be done.
    """
    # 1. Everything that can be refused is refused before weights are loaded.
    values = read_options(args)
    if told := launcher_precision():
        values["mixed_precision"] = values.get("mixed_precision") or told
        logger.info("mixed_precision is %s; accelerate was told %s", values["mixed_precision"], told)
    config = train_config(values)
    for line in describe_without_effect(values):
        logger.info("%s", line)
    find_optimizer(config.optimizer, allow_dotted=True)
    variant = find_variant(values)
    if not values.get("dataset_config"):
        raise ValueError("no dataset was given; name it with --dataset_config")
    dataset = list_dataset(load_dataset_config(values["dataset_config"], side=variant.default_size))
    if values.get("show_timesteps"):
        show_timesteps(values["show_timesteps"], config, dataset, variant)
        return 0
    files = find_train_files(
        variant,
        dit=values.get("dit"),
        autoencoder=values.get("vae"),
        text_encoder=values.get("text_encoder"),
        tokenizer=values.get("tokenizer"),
        models_dir=Path(values["models_dir"]) if values.get("models_dir") else None,
        makes_samples=config.monitor.sample_prompts is not None,
    )
    cache = open_cache(
        dataset,
        variant,
        autoencoder=values.get("vae"),
        text_encoder=values.get("text_encoder"),
        tokenizer=values.get("tokenizer"),
    )

    # 2. Training, with a bar; the first Ctrl-C ends it after the step.
    with (
        join_processes(values.get("device")) as processes,
        stop_on_signal() as stopped,
        progress_bar(processes.is_main) as on_step,
    ):
        result = train_lora(
            config,
            cache,
            files,
            processes=processes,
            resume=Path(values["resume"]) if values.get("resume") else None,
            on_step=on_step,
            should_stop=lambda: bool(stopped),
            allow_dotted=True,
        )
    if processes.is_main:
        report(result)
    return 128 + stopped[0] if result.stopped and stopped else 0


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options by name: those of the command line over those of ``--config_file``.

    Raises:
        ValueError: the file is no TOML, or names something unknown.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "config_file" not in given:
        return given
    path = Path(given["config_file"])
    if not path.suffix and not path.exists():
        path = path.with_suffix(".toml")
    known = {name for name in vars(args) if name not in ("run", "parser", "debug", "config_file")}
    values: dict[str, Any] = {}
    for name, value in flatten_tables(read_settings(path)):
        if name not in known:
            raise ValueError(f"{path} sets {name!r}, which is no option of train; `flux2 train --help` lists them")
        if name in values:
            raise ValueError(f"{path} sets {name} twice; keep one of them")
        values[name] = value
    return values | given


def show_timesteps(how: str, config: TrainConfig, dataset: Dataset, variant: Variant) -> None:
    """Shows the noise levels of an epoch: "console", "image" for a picture in the output folder, or its path."""
    sizes: Counter[tuple[int, int]] = Counter()
    for item in dataset.items:
        if not item.is_validation:
            sizes[item.bucket] += dataset.config.subsets[item.subset].num_repeats
    if how == "console":
        print(describe_timesteps(config.timesteps, sizes, schedule_steps(variant)), flush=True)
        return
    out = config.output.output_dir / f"{config.output.output_name}-timesteps.png" if how == "image" else Path(how)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_timesteps(config.timesteps, sizes, schedule_steps(variant), out)
    print(out, flush=True)


def find_variant(values: dict[str, Any]) -> Variant:
    """The variant that was asked for, told from the DiT where that is to be."""
    name = values.get("model_version") or ("auto" if values.get("dit") else "tiny")
    if name != "auto":
        return get_variant(name)
    if not values.get("dit"):
        raise ValueError("auto tells the variant from the DiT, but no --dit was given; give it or a --model_version")
    return resolve_variant(TensorSource(values["dit"], component="dit"))


@contextmanager
def stop_on_signal() -> Iterator[list[signal.Signals]]:
    """Collects signals that ask to stop instead of dying of them; a second SIGINT interrupts at once.

    SIGHUP stays ignored under ``nohup``; SIGINT, which shells let background jobs ignore, is heard.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        logger.warning("stopping after this step; Ctrl-C again stops at once")

    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    handled = [number for number in STOP_SIGNALS if number not in ignored or number.name != "SIGHUP"]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(is_shown: bool) -> Iterator[Callable[[TrainStep], None]]:
    """A bar over the steps on stderr where that is a terminal; elsewhere a line every now and then."""
    is_terminal = sys.stderr.isatty()
    bar: tqdm[Any] | None = None

    def show(step: TrainStep) -> None:
        nonlocal bar
        if is_terminal:
            if bar is None:  # when the first step is done: what was loaded before is not its time
                bar = tqdm(
                    total=step.num_steps, initial=step.step - 1, unit="step", file=sys.stderr, dynamic_ncols=True
                )
                bar.start_t -= step.seconds_per_step
                bar.last_print_t -= step.seconds_per_step
            bar.set_postfix_str(f"loss {step.average_loss:.4f}, lr {step.learning_rate:.2e}", refresh=False)
            bar.update(step.step - bar.n)
            return
        every = max(1, step.num_steps // 20)
        if step.step % every == 0 or step.step == step.num_steps:
            logger.info("%s", describe_step(step))

    try:
        yield show if is_shown else lambda step: None
    finally:
        if bar is not None:
            bar.close()


def report(result: TrainResult) -> None:
    """Tells what was written, one path a line on stdout."""
    for path in (result.lora_path, result.curves_path):
        if path is not None:
            print(path, flush=True)
    if result.validation_losses:
        first, last = min(result.validation_losses), max(result.validation_losses)
        logger.info(
            "validation loss %.4f after step %d, %.4f after step %d",
            result.validation_losses[first],
            first,
            result.validation_losses[last],
            last,
        )
    if result.num_bad_steps:
        logger.warning("%d steps were skipped: their loss was not finite", result.num_bad_steps)
    if result.stopped and result.state_path is not None:
        logger.warning("stopped after step %d; go on with --resume %s", result.num_steps, result.state_path)
