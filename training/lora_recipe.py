"""LoRA training of FLUX.2, from top to bottom.

The base is frozen and runs in its own precision; fp32 adapters beside its Linears learn the velocity ``noise - x0`` of
noisy latents (`flow_matching`), at noise levels drawn per sample (`timesteps`). What a step draws follows from the seed
and the step alone (`batches`), so a run goes on from a saved state bit by bit.

A step is the mean over all its samples, however they are spread over accumulated batches and processes. Samples of a
batch whose references differ in number or size run one shape after the other: nothing is padded.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flux2_core.command_errors import is_out_of_memory
from ..flux2_core.compilation import compile_blocks
from ..flux2_core.lora import LoraSetting, apply_loras, remove_loras
from ..flux2_core.lora_factors import Lora
from ..flux2_core.lora_files import read_lora
from ..flux2_core.lora_writer import reading_notes, write_lora
from ..flux2_core.picture_metadata import write_png
from ..flux2_core.placement import place_autoencoder, release
from ..flux2_core.sampling import Stopped
from .adapters import TrainableAdapters, config_from_lora
from .base_model import DTYPES, BaseModel
from .cache import CachedDataset
from .config import TrainConfig
from .flow_matching import training_attention, velocity_losses
from .loader import StepLoader, count_steps, largest_batch, make_schedule
from .lora_metadata import lora_metadata
from .metrics import MetricsWriter, RunningAverage, open_trackers
from .optimizer_step import GuardedStep
from .optimizers import Ema, effective_rate, evaluation_weights, learning_rate_factor, make_optimizer, set_training
from .plots import draw_curves
from .processes import Processes
from .samples import make_sample, prepare_samples, read_sample_prompts, sample_record
from .step_reports import StepNumbers, StepReports
from .train_batch import BatchMaker, TrainBatch
from .train_files import TrainFiles
from .train_progress import SampleCallback, StepCallback, TrainResult, TrainStep
from .train_resume import check_resume, describe_run
from .train_state import load_tree, restore_train_state, save_train_state

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
VALIDATIONS_IN_A_RUN = 10
SPARE_BYTES = 64 * 2**20
"""Left free on the disk beside what training is going to write."""


def train_lora(
    config: TrainConfig,
    dataset: CachedDataset,
    files: TrainFiles,
    *,
    processes: Processes | None = None,
    resume: Path | None = None,
    allow_dotted: bool = False,
    on_step: StepCallback | None = None,
    on_sample: SampleCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Trains a LoRA and writes it.

    Args:
        config: everything about the run.
        dataset: from `cache.open_cache`.
        files: the base, and for sample pictures the other networks.
        processes: from `processes.join_processes`; None: this one, on the CPU.
        resume: folder of a state to go on from.
        allow_dotted: whether the optimiser may be any installed class, see `optimizers.find_optimizer`.
        on_step: told after every step.
        on_sample: told every sample picture.
        should_stop: asked before every step and sampling step; True ends the run, and its state is kept. An exception
            out of it does so as well, and goes on to the caller.

    Raises:
        ValueError: settings that contradict each other, the dataset or the state; too little disk or memory; a loss
            that stays not finite. The state is written where steps would be lost.
    """
    with torch.inference_mode(False), torch.enable_grad():
        run = LoraRun(config, dataset, files, processes or Processes(), resume, allow_dotted)
        run.on_step, run.on_sample, run.should_stop = on_step, on_sample, should_stop
        return run.train()


class LoraRun:
    """Everything a run has in memory."""

    on_step: StepCallback | None = None
    on_sample: SampleCallback | None = None
    should_stop: Callable[[], bool] | None = None

    def __init__(
        self,
        config: TrainConfig,
        dataset: CachedDataset,
        files: TrainFiles,
        processes: Processes,
        resume: Path | None,
        allow_dotted: bool,
    ) -> None:
        self.config, self.dataset, self.files, self.processes = config, dataset, files, processes
        self.variant, self.device = files.variant, processes.device
        self.folder, self.name = config.output.output_dir, config.output.output_name
        self.lora_folder = config.output.lora_dir or self.folder

        # 1. What is trained on, and in which order.
        if not dataset.items:
            raise ValueError("there are no pictures to train on; check the dataset with `flux2 dataset`")
        if self.variant.distilled:
            logger.warning(
                "%s is distilled: a LoRA trained on it slowly undoes that. Train on %s and use the LoRA with both",
                self.variant.name,
                self.variant.name.replace("klein-", "klein-base-").removesuffix("-kv"),
            )
        self.order = make_schedule(config, dataset, processes.count)
        self.steps_per_epoch = self.order.num_steps_per_epoch
        self.num_steps = count_steps(config, self.order)
        self.description = describe_run(config, dataset, files, processes.count)
        state = None
        if resume is not None:
            state = load_tree(resume / STATE_FILE)
            check_resume(state, self.description, self.num_steps, resume)
        start = read_lora(config.network_weights, self.variant.dit) if config.network_weights is not None else None
        adapter_config = config_from_lora(start) if start is not None and config.dim_from_weights else config.adapter
        precision = state["extra"].get("base_precision") if state is not None else None
        self.base = BaseModel(config, adapter_config, dataset, files, self.device, precision)
        if processes.any(self.base.plan.dit.precision == "fp8") and self.base.plan.dit.precision != "fp8":
            # Another process has less memory free, and all have to train on the same base.
            self.base = BaseModel(config, adapter_config, dataset, files, self.device, "fp8")

        # 2. Sample prompts become embeddings and reference latents; the text encoder is freed again.
        for folder in (self.folder, self.lora_folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder = None
        self.samples = []
        if config.monitor.sample_prompts is not None:
            assert files.autoencoder is not None and files.text_encoder is not None, "found for sample pictures"
            lines = read_sample_prompts(config.monitor.sample_prompts)
            self.autoencoder = place_autoencoder(files.autoencoder, self.device, config.autoencoder_precision)
            self.samples = prepare_samples(
                lines, self.variant, config.seed, self.base.load_text_encoder, self.autoencoder
            )
            self._rest_autoencoder()

        # 3. The base, frozen, and fp32 adapters beside its Linears.
        self.placed = self.base.load_dit()
        self.dit = self.placed.dit
        generator = torch.Generator().manual_seed(config.seed)
        self.adapters = TrainableAdapters(self.dit, adapter_config, generator=generator)
        if start is not None:
            self.adapters.load_lora(start)
        for note in reading_notes(self.adapters.to_lora(self.name)) if self._is_main else ():
            logger.warning("%s.safetensors will be for ComfyUI: %s", self.name, note)
        self.adapters.to(self.device)
        self.adapters.attach()
        self.parameters = list(self.adapters.parameters())
        if config.compile:
            compile_blocks(self.dit)

        # 4. Optimiser, moving average, and what a run has counted so far.
        groups = self.adapters.parameter_groups(config.optimizer.rate, config.loraplus_lr_ratio)
        self.optimizer = make_optimizer(groups, config.optimizer, allow_dotted=allow_dotted)
        set_training(self.optimizer, True)
        self.ema = Ema(self.parameters, config.ema_decay) if config.ema_decay is not None else None
        max_norm, fp16 = config.optimizer.max_grad_norm, self.dit.dtype == torch.float16
        self.take_step = GuardedStep(self.optimizer, self.parameters, max_norm, self.ema, fp16=fp16)
        self.make_batch = BatchMaker(config, self.variant, pinned=self.device.type == "cuda")
        self.reports = StepReports(self.device)
        self.first_step = self.steps_done = 0
        self.result = TrainResult()
        self.average_loss = RunningAverage()
        self.num_bad_in_a_row = 0
        self.saved: list[tuple[str, int, str]] = []
        if state is not None:
            self._restore(state, resume / STATE_FILE if resume else Path())
        self._check_disk()

    def train(self) -> TrainResult:
        """Takes the steps that are left, and writes what they made."""
        config = self.config
        if config.preflight and self.first_step < self.num_steps:
            self._try_largest_batch()
        self.metrics = self._open_metrics() if self._is_main else None
        try:
            if self.first_step == 0:
                self._validate(0)
                if config.monitor.sample_at_first:
                    self._sample(0)
            if self.first_step == self.num_steps:  # a run that was stopped here is finished here
                self._write_last()
            started = time.monotonic()
            with StepLoader(
                self.dataset, self.order, self.processes, self.make_batch, self.first_step, self.num_steps
            ) as loader:
                for step, num_samples, batches in loader:
                    if self._must_stop():
                        self._tell(wait=True)
                        return self._finish(stopped=True)
                    numbers = self._take_step(step, num_samples, batches)
                    self.steps_done = step + 1
                    self.reports.put(
                        numbers,
                        step=self.steps_done,
                        learning_rate=effective_rate(self.optimizer),
                        seconds_per_step=(time.monotonic() - started) / (self.steps_done - self.first_step),
                    )
                    self._after_step()
        except Stopped:
            return self._finish(stopped=self.steps_done < self.num_steps)
        except BaseException:
            if self.take_step.is_whole and self.steps_done > self.first_step:
                for numbers in self.reports.take(wait=True):
                    self._count(numbers)
                self._save_state()  # whatever happened, the steps so far are not lost
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()
        return self._finish(stopped=False)

    def _take_step(self, step: int, num_samples: int, batches: Sequence[TrainBatch]) -> Tensor:
        """One step of the optimiser over `num_samples` of all processes; gives loss and gradient norm ``[2]``.

        Both are on the device: the host does not wait for them here.
        """
        factor = learning_rate_factor(step, self.num_steps, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.dit.checkpointing == "none":  # streamed blocks need it, so nothing could leave the device
            return self.take_step(self._add_up(self._gradients(step, num_samples, batches)))
        return self.take_step(self._add_up(self.placed.run(lambda: self._gradients(step, num_samples, batches))))

    def _gradients(self, step: int, num_samples: int, batches: Sequence[TrainBatch]) -> Tensor:
        """Gradients of this process's part of a step, from nothing, in case it is done anew; gives the loss ``[]``."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with self._random_state(step), self.adapters.cast_once(self.dit.dtype):
            for batch in batches:
                with training_attention(self.dit, batch.num_tokens):
                    loss = self._losses(batch).sum() / num_samples
                    self.take_step.backward(loss)
                total += loss.detach()
        return total

    def _losses(self, batch: TrainBatch) -> Tensor:
        """Weighted losses ``[B]`` of samples of one shape."""
        batch = batch.to(self.device)
        losses = velocity_losses(
            self.dit,
            batch.latents,
            batch.text,
            batch.noise,
            batch.sigma,
            references=batch.references,
            mask=batch.mask,
        )
        return losses * batch.weights

    def _add_up(self, total: Tensor) -> Tensor:
        """Sums gradients and loss over all processes, in one message."""
        if self.processes.count == 1:
            return total
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]  # None: no sample here
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), total[None]])
        *parts, summed = self.processes.sum_(flat).split([*(parameter.numel() for parameter in self.parameters), 1])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return summed[0]

    def _after_step(self) -> None:
        """What is due after a step: validation, saves, samples."""
        output, monitor, step = self.config.output, self.config.monitor, self.steps_done
        epoch, rest = divmod(step, self.steps_per_epoch)
        is_last = step == self.num_steps

        def due(every_n_steps: int | None, every_n_epochs: int | None = None) -> bool:
            by_steps = every_n_steps is not None and step % every_n_steps == 0
            return by_steps or (every_n_epochs is not None and rest == 0 and epoch % every_n_epochs == 0)

        validates = due(monitor.validate_every_n_steps or max(1, self.num_steps // VALIDATIONS_IN_A_RUN))
        saves_step, saves_epoch = due(output.save_every_n_steps), due(None, output.save_every_n_epochs)
        samples = due(monitor.sample_every_n_steps, monitor.sample_every_n_epochs) or (is_last and bool(self.samples))
        self._tell(wait=is_last or validates or saves_step or saves_epoch or samples)
        if is_last or validates:
            self._validate(step)
        if not is_last and (saves_step or saves_epoch):
            if saves_epoch:
                self._save_lora(f"{self.name}-{epoch:06d}", "epoch", epoch)
            if saves_step:
                self._save_lora(f"{self.name}-step{step:08d}", "step", step)
            if output.save_state:
                self._save_state()
        if is_last:
            self._write_last()
        elif samples:
            self._sample(step)

    def _write_last(self) -> None:
        """The finished LoRA, and then the pictures, which may be stopped."""
        self._save_lora(self.name, "last", self.num_steps)
        if self.config.output.save_state or self.config.output.save_state_on_train_end:
            self._save_state()
        if self.samples:
            self._sample(self.num_steps)

    def _finish(self, *, stopped: bool) -> TrainResult:
        """Writes the curves, and what a stopped run has so far."""
        result = self.result
        if stopped and self.steps_done:
            self._save_lora(f"{self.name}-step{self.steps_done:08d}", "stopped", self.steps_done)
            self._save_state()
        self.adapters.detach()
        result.num_steps, result.stopped = self.steps_done, stopped
        if self.metrics is not None:
            result.metrics_path = self.metrics.path
            if self.steps_done:
                result.curves_path = self.folder / f"{self.name}-curves.png"
                draw_curves(self.metrics.path, result.curves_path)
        self.processes.barrier()
        return result

    def _open_metrics(self) -> MetricsWriter:
        monitor = self.config.monitor
        trackers = open_trackers(
            monitor.log_with,
            monitor.logging_dir or self.folder / "logs",
            run_name=monitor.wandb_run_name or self.name,
            project=monitor.log_tracker_name or "flux2-kit",
            settings=self.description["settings"],
            first_step=self.first_step,
        )
        return MetricsWriter(self.folder, self.name, first_step=self.first_step, trackers=trackers)

    def _validate(self, step: int) -> None:
        """The loss of held-out pictures, always at the same noise and noise levels."""
        if not self.dataset.validation:
            return
        num_sigmas = self.config.monitor.num_validation_sigmas
        total = torch.zeros((), device=self.device)
        with self._inference_weights(), torch.no_grad(), self.adapters.cast_once(self.dit.dtype):
            for index, item in enumerate(self.dataset.validation):
                if index % self.processes.count != self.processes.index:
                    continue
                sample = self.dataset.load(item)
                batch_size = self.dataset.config.subsets[item.item.subset].batch_size
                for places in torch.arange(num_sigmas).split(batch_size):
                    # Draws of training count from 0 up: negative ones are never the same.
                    draws = [-1 - index * num_sigmas - place for place in places.tolist()]
                    quantiles = (places.double() + 0.5) / num_sigmas
                    batch = self.make_batch.make([sample] * len(draws), draws, quantiles)
                    total += self._losses(replace(batch, weights=torch.ones_like(batch.weights))).sum()
        loss = (self.processes.sum_(total) / (len(self.dataset.validation) * num_sigmas)).item()
        self.result.validation_losses[step] = loss
        if self.metrics is not None:
            self.metrics.write(step=step, validation_loss=loss)

    def _sample(self, step: int) -> None:
        """Makes the sample pictures with the LoRA as it would be saved now; a failure does not end training."""
        lora = self._lora(self.name)
        assert self.autoencoder is not None
        is_stopped = False
        self.adapters.detach()
        try:
            self.autoencoder.to(self.device)
            apply_loras(self.dit, [LoraSetting(lora=lora)])
            for index, sample in enumerate(self.samples):
                if index % self.processes.count != self.processes.index:
                    continue
                image = make_sample(
                    sample, self.dit, self.variant, self.autoencoder, self.should_stop, tiling=self.base.plan.tiling
                )
                folder = self.folder / "sample"
                folder.mkdir(exist_ok=True)
                path = folder / f"{self.name}_{step:06d}_{index:02d}_{sample.sampling.seed}.png"
                self.result.samples.append(
                    write_png(path, image, sample_record(sample, self.files, [(lora.name, 1.0)]))
                )
                if self.on_sample is not None:
                    self.on_sample(step, image)
        except Stopped:
            is_stopped = True
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning("no sample pictures after step %d: %s", step, error)
        finally:
            remove_loras(self.dit)
            self.adapters.attach()
            self._rest_autoencoder()
        if self.processes.any(is_stopped):
            raise Stopped

    def _rest_autoencoder(self) -> None:
        """Lets the autoencoder leave the device until it is used again, where there is no space beside the training."""
        if self.base.takes_turns and self.autoencoder is not None:
            self.autoencoder.to("cpu")
            release(self.device)

    def _save_lora(self, stem: str, kind: str, number: int) -> None:
        """Writes the LoRA, and deletes those of its kind that are no longer to be kept."""
        path = self.lora_folder / f"{stem}.safetensors"
        self.result.lora_path = path
        self.saved.append((kind, number, path.name))
        if self._is_main:
            write_lora(path, self._lora(path.name))
        output = self.config.output
        kept = {"epoch": output.save_last_n_epochs, "step": output.save_last_n_steps}.get(kind)
        if kept is None:
            return
        unit = output.save_every_n_epochs or 1 if kind == "epoch" else 1
        for entry in [e for e in self.saved if e[0] == kind and e[1] <= number - kept * unit]:
            self.saved.remove(entry)
            if self._is_main:
                (self.lora_folder / entry[2]).unlink(missing_ok=True)

    def _lora(self, name: str) -> Lora:
        """The adapters as a file would give them back."""
        with self._inference_weights():
            metadata = lora_metadata(self.config, self.dataset, self.files, self.adapters, self.steps_done)
            return self.adapters.to_lora(name, DTYPES[self.config.output.save_precision], metadata)

    def _save_state(self) -> None:
        folder = self.folder / f"{self.name}-state"
        self.result.state_path = folder
        if not self._is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        counts = {
            "description": self.description,
            "base_precision": self.base.plan.dit.precision,
            "average_loss": self.average_loss.value,
            "num_bad_in_a_row": self.num_bad_in_a_row,
            "num_bad_steps": self.result.num_bad_steps,
            "validation_losses": self.result.validation_losses,
            "saved": self.saved,
            "scaler": self.take_step.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }
        save_train_state(folder / STATE_FILE, step=self.steps_done, extra=counts, **self._state_parts())

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        self.first_step = self.steps_done = restore_train_state(state, str(path), **self._state_parts())
        counts = state["extra"]
        self.average_loss.value, self.num_bad_in_a_row = counts["average_loss"], counts["num_bad_in_a_row"]
        self.result.num_bad_steps = counts["num_bad_steps"]
        self.result.validation_losses = dict(counts["validation_losses"])
        self.saved = [tuple(entry) for entry in counts["saved"]]
        self.take_step.scaler.load_state_dict(counts["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(counts["ema"])

    def _state_parts(self) -> dict[str, Any]:
        return {"modules": {"adapters": self.adapters}, "optimizers": {"main": self.optimizer}, "generators": {}}

    def _try_largest_batch(self) -> None:
        """Runs the batch that needs most memory once, so that too little of it shows before hours of training."""
        draws = largest_batch(self.dataset)
        batch = self.make_batch([(draw, self.dataset.load(self.dataset.items[draw.item])) for draw in draws])
        while not self._fits(batch):
            if self.dit.checkpointing != "none" and self.device.type != "cpu" and self.placed.lower():
                continue
            height, width = (side * 16 for side in batch.latents.shape[-2:])
            advice = "set gradient_checkpointing" if self.dit.checkpointing == "none" else "take a smaller resolution"
            raise ValueError(
                f"the largest batch does not fit into memory: {len(draws)} x {width}x{height} px with "
                f"{len(batch.references)} references; {advice}, or a smaller batch_size or network_dim"
            )

    def _fits(self, batch: TrainBatch) -> bool:
        """Whether there is memory for a forward and backward pass."""
        try:
            with (
                self._random_state(0),
                self.adapters.cast_once(self.dit.dtype),
                training_attention(self.dit, batch.num_tokens),
            ):
                self.take_step.backward(self._losses(batch).sum())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return True

    def _check_disk(self) -> None:
        """Refuses to start where the LoRA and its state would not fit on the disk."""
        num_values = sum(parameter.numel() for parameter in self.parameters)
        # The LoRA twice, old and new, and a state of masters, two moments and an average, each twice as well.
        needed = num_values * (2 * DTYPES[self.config.output.save_precision].itemsize + 2 * 4 * 4) + SPARE_BYTES
        for folder in (self.folder, self.lora_folder):
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise ValueError(
                    f"{folder} has {free / 2**30:.2f} GiB free, and the LoRA with its state needs up to "
                    f"{needed / 2**30:.2f} GiB; free some space, or write to another disk"
                )

    def _tell(self, *, wait: bool) -> None:
        """Tells what is known of the last steps, see `StepReports`; gives up after too many without a finite loss."""
        for numbers in self.reports.take(wait=wait):
            epoch = self._count(numbers)
            if self.on_step is not None:
                average = self.average_loss.value
                self.on_step(
                    TrainStep(
                        step=numbers.step,
                        num_steps=self.num_steps,
                        epoch=epoch,
                        loss=numbers.loss,
                        average_loss=math.nan if average is None else average,
                        learning_rate=numbers.learning_rate,
                        seconds_per_step=numbers.seconds_per_step,
                        seconds_left=numbers.seconds_per_step * (self.num_steps - numbers.step),
                    )
                )
            if self.num_bad_in_a_row >= self.config.max_bad_steps:
                raise ValueError(
                    f"the loss was not finite in {self.num_bad_in_a_row} steps in a row, up to step {numbers.step}; "
                    "lower the learning rate, or train with mixed_precision bf16 or no"
                )

    def _count(self, numbers: StepNumbers) -> int:
        """Counts a finished step and writes its metrics; gives its epoch."""
        step, epoch = numbers.step, (numbers.step - 1) // self.steps_per_epoch + 1
        self.average_loss.update(numbers.loss)
        if math.isfinite(numbers.loss):
            self.num_bad_in_a_row = 0
        else:
            self.num_bad_in_a_row += 1
            self.result.num_bad_steps += 1
            logger.warning("step %d was skipped: its loss or gradient is not finite", step)
        if self.metrics is not None and (step % self.config.monitor.log_every_n_steps == 0 or step == self.num_steps):
            self.metrics.write(
                step=step,
                epoch=epoch,
                loss=numbers.loss,
                learning_rate=numbers.learning_rate,
                gradient_norm=numbers.gradient_norm,
            )
        return epoch

    @property
    def _is_main(self) -> bool:
        return self.processes.is_main

    def _must_stop(self) -> bool:
        return self.processes.any(self.should_stop is not None and self.should_stop())

    @contextmanager
    def _inference_weights(self) -> Iterator[None]:
        """The weights that are saved and sampled: averaged where that is asked for, and without dropout."""
        self.adapters.eval()
        try:
            with (
                evaluation_weights(self.optimizer),
                self.ema.swapped_in(self.parameters) if self.ema is not None else nullcontext(),
            ):
                yield
        finally:
            self.adapters.train()

    @contextmanager
    def _random_state(self, step: int) -> Iterator[None]:
        """What dropout draws follows from the seed and the step, and leaves the process's generators alone."""
        if not self.adapters.config.dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.config.seed} {step} {self.processes.index}").getrandbits(63))
            yield
