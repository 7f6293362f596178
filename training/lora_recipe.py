"""LoRA training of FLUX.2, from top to bottom.

The base is frozen and runs in its own precision; fp32 adapters beside its Linears learn the velocity ``noise - x0`` of
noisy latents (`flow_matching`), at noise levels drawn per sample (`timesteps`). What a step draws follows from the seed
and the step alone (`batches`), so a run goes on from a saved state bit by bit.

A step is the mean over all its samples, however they are spread over accumulated batches and processes. Samples of a
batch whose references differ in number or size run one shape after the other: nothing is padded.
"""

from __future__ import annotations

import logging
import random
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
from ..flux2_core.lora import LoraSetting, apply_loras
from ..flux2_core.lora_factors import Lora
from ..flux2_core.lora_files import linear_shapes, read_lora
from ..flux2_core.lora_writer import reading_notes
from ..flux2_core.sampling import Stopped
from .adapters import TrainableAdapters, config_from_lora, count_parameters
from .base_model import DTYPES, BaseModel
from .cache import CachedDataset
from .config import TrainConfig
from .flow_matching import training_attention, velocity_losses
from .loader import StepLoader, count_steps, largest_batch, make_schedule
from .lora_metadata import lora_metadata
from .metrics import installed_trackers
from .optimizer_step import GuardedStep
from .optimizers import Ema, effective_rate, evaluation_weights, learning_rate_factor, make_optimizer, set_training
from .processes import Processes
from .run_files import RunFiles, SaveKind, metrics_beside
from .run_log import RunLog
from .samples import SamplePictures, read_sample_prompts
from .step_reports import StepReports
from .train_batch import BatchMaker, TrainBatch
from .train_files import TrainFiles
from .train_progress import SampleCallback, StepCallback, TrainResult
from .train_resume import STATE_FILE, check_resume, describe_run
from .train_state import load_tree, restore_train_state, save_train_state

logger = logging.getLogger(__name__)

VALIDATIONS_IN_A_RUN = 10


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

        # 1. What is trained on, in which order, and whether there is room for it. No weights are loaded yet.
        if not dataset.items:
            raise ValueError("there are no pictures to train on; check the dataset with `flux2 dataset`")
        if self.variant.distilled and processes.is_main:
            logger.warning(
                "%s is distilled: a LoRA trained on it slowly undoes that. Train on %s and use the LoRA with both",
                self.variant.name,
                self.variant.undistilled_name,
            )
        installed_trackers(config.monitor.log_with)
        prompts = read_sample_prompts(config.monitor.sample_prompts) if config.monitor.sample_prompts else None
        self.order = make_schedule(config, dataset, processes.count)
        self.steps_per_epoch = self.order.num_steps_per_epoch
        self.num_steps = count_steps(config, self.order)
        self.description = describe_run(config, dataset, files, processes.count)
        self.outputs = RunFiles(config.output, writes=processes.is_main)
        state, self.history = None, None
        if resume is not None:
            state = load_tree(resume / STATE_FILE)
            is_trained = self.outputs.lora_path("trained").exists()
            check_resume(state, self.description, self.num_steps, resume, is_trained=is_trained)
            self.history = metrics_beside(resume)
        start = read_lora(config.network_weights, self.variant.dit) if config.network_weights is not None else None
        adapter_config = config.adapter
        if start is not None and config.dim_from_weights:
            kept = {"dropout": adapter_config.dropout, "max_norm": adapter_config.max_norm}
            adapter_config = replace(config_from_lora(start), **kept)
        steps_left = self.num_steps - (state["step"] if state is not None else 0)
        self.outputs.make_folders(is_new=state is None)
        self.outputs.check_space(
            count_parameters(linear_shapes(self.variant.dit), adapter_config),
            num_steps=steps_left,
            num_epochs=steps_left // self.steps_per_epoch,
        )

        # 2. Sample prompts become embeddings and reference latents; the text encoder is freed again.
        precision = state["extra"]["base_precision"] if state is not None else None
        self.base = BaseModel(config, adapter_config, dataset, files, self.device, precision)
        if processes.any(self.base.plan.dit.precision == "fp8") and self.base.plan.dit.precision != "fp8":
            # Another process has less memory free, and all have to train on the same base.
            self.base = BaseModel(config, adapter_config, dataset, files, self.device, "fp8")
        self.samples = SamplePictures(prompts, self.base, config) if prompts is not None else None

        # 3. The base, frozen, and fp32 adapters beside its Linears.
        self.placed = self.base.load_dit()
        self.dit = self.placed.dit
        generator = torch.Generator().manual_seed(config.seed)
        self.adapters = TrainableAdapters(self.dit, adapter_config, generator=generator)
        if start is not None:
            self.adapters.load_lora(start)
        self.adapters.to(self.device)
        self.adapters.attach()
        for note in reading_notes(self.adapters.to_lora(self.outputs.name)) if processes.is_main else ():
            logger.warning("%s.safetensors will be for ComfyUI: %s", self.outputs.name, note)
        self.parameters = list(self.adapters.parameters())
        if config.compile:
            compile_blocks(self.dit)

        # 4. Optimiser, moving average, and what a run has counted so far.
        groups = self.adapters.parameter_groups(config.optimizer.rate, config.loraplus_lr_ratio)
        self.optimizer = make_optimizer(groups, config.optimizer, allow_dotted=allow_dotted)
        set_training(self.optimizer, True)
        self.ema = Ema(self.parameters, config.ema_decay) if config.ema_decay is not None else None
        max_norm, fp16 = config.optimizer.max_grad_norm, self.dit.dtype == torch.float16
        self.take_step = GuardedStep(
            self.optimizer, self.parameters, max_norm, self.ema, fp16=fp16, limit=self.adapters.limit_norms
        )
        self.make_batch = BatchMaker(config, self.variant, pinned=self.device.type == "cuda")
        self.log = RunLog(config, StepReports(self.device), self.num_steps, self.steps_per_epoch)
        self.result = TrainResult()
        self.first_step = self.steps_done = self.last_sampled_step = 0
        self.is_stopping = False
        if state is not None and resume is not None:
            self._restore(state, resume)

    def train(self) -> TrainResult:
        """Takes the steps that are left, and writes what they made."""
        try:
            if self.processes.is_main:
                self.log.open(self.outputs, self.first_step, self.description["settings"], self.history)
            if self.config.preflight:
                self._try_largest_batch()
            self._before_steps()
            self._take_steps()
            self._tell(wait=True)
            if self.steps_done < self.num_steps:
                self._save_stopped()
        except BaseException:
            self._rescue()
            raise
        finally:
            self.log.close()
        self.adapters.detach()
        self.processes.barrier()
        self.result.num_steps, self.result.stopped = self.steps_done, self.steps_done < self.num_steps
        self.result.metrics_path = self.outputs.metrics_path if self.processes.is_main else None
        self.result.validation_losses, self.result.num_bad_steps = self.log.validation_losses, self.log.num_bad_steps
        return self.result

    def _take_steps(self) -> None:
        """All steps that are left, or those until it is asked to stop."""
        started = time.monotonic()
        with StepLoader(
            self.dataset, self.order, self.processes, self.make_batch, self.first_step, self.num_steps
        ) as loader:
            for step, num_samples, batches in loader:
                if self._must_stop():
                    return
                numbers = self._take_step(step, num_samples, batches)
                self.steps_done = step + 1
                self.log.reports.put(
                    numbers,
                    step=self.steps_done,
                    learning_rate=effective_rate(self.optimizer),
                    seconds_per_step=(time.monotonic() - started) / (self.steps_done - self.first_step),
                )
                self._after_step()

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

    def _before_steps(self) -> None:
        """What comes before the first step; in a run that goes on, what the stop has cut off after the last one."""
        if self.first_step:
            self._after_step()
            return
        self._validate(0)
        if self.config.monitor.sample_at_first:
            self._sample(0)

    def _after_step(self) -> None:
        """What is due after a step and not done yet: validation, saves, samples."""
        output, monitor, step = self.config.output, self.config.monitor, self.steps_done
        epoch, rest = divmod(step, self.steps_per_epoch)
        is_last = step == self.num_steps

        def due(every_n_steps: int | None, every_n_epochs: int | None = None) -> bool:
            by_steps = every_n_steps is not None and step % every_n_steps == 0
            return by_steps or (every_n_epochs is not None and rest == 0 and epoch % every_n_epochs == 0)

        validates = is_last or due(monitor.validate_every_n_steps or max(1, self.num_steps // VALIDATIONS_IN_A_RUN))
        samples = is_last or due(monitor.sample_every_n_steps, monitor.sample_every_n_epochs)
        saves: list[tuple[SaveKind, int]] = [("trained", step)] if is_last else []
        if not is_last and due(None, output.save_every_n_epochs):
            saves.append(("epoch", epoch))
        if not is_last and due(output.save_every_n_steps):
            saves.append(("step", step))

        is_due = bool(validates or samples or saves)
        self._tell(wait=is_due)
        if validates and step not in self.log.validation_losses:
            self._validate(step)
        self._save([save for save in saves if save not in self.outputs.saved], is_last=is_last)
        if is_due:
            self.result.curves_path = self.log.draw(is_last=is_last)
        if samples and step != self.last_sampled_step:
            self._sample(step)
        if is_last and (output.save_state or output.save_state_on_train_end):
            self._save_state()  # last of all, as nothing goes on from it

    def _save(self, saves: Sequence[tuple[SaveKind, int]], *, is_last: bool) -> None:
        """Writes what is due; where the disk is full on the way, training goes on."""
        try:
            for kind, number in saves:
                self._save_lora(kind, number)
            if saves and not is_last and self.config.output.save_state:
                self._save_state()
        except OSError as error:
            if is_last:
                raise
            logger.error("step %d could not be saved (%s); make room before the next save", self.steps_done, error)

    def _save_stopped(self) -> None:
        """Writes what a stopped run has so far; the state first, which matters most."""
        if self.steps_done:
            self._save_state()
            if self.steps_done < self.num_steps:
                self._save_lora("stopped", self.steps_done)
            self.result.curves_path = self.log.draw(is_last=True)

    def _rescue(self) -> None:
        """After an error: writes what the steps so far have made, as far as that is possible."""
        if not self.take_step.is_whole or self.steps_done == self.first_step:
            return
        try:
            self.log.catch_up()
            self._save_stopped()
        except Exception as error:  # the error that ended the run is the one to be told
            logger.error("not all of step %d could be written: %s", self.steps_done, error)
        else:
            logger.warning("step %d is kept; go on with resume %s", self.steps_done, self.outputs.state_folder)

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
        self.log.validated(step, (self.processes.sum_(total) / (len(self.dataset.validation) * num_sigmas)).item())

    def _sample(self, step: int) -> None:
        """Makes the sample pictures with the LoRA as it would be saved now; a failure does not end training."""
        if self.samples is None:
            return
        lora = self._lora()
        self.adapters.detach()
        try:
            apply_loras(self.dit, [*self.base.loras, LoraSetting(lora=lora)])
            for index in range(self.processes.index, len(self.samples.prepared), self.processes.count):
                try:
                    path, image = self.samples.make(index, step, self.dit, self.outputs, self.should_stop)
                except (ValueError, OSError, RuntimeError, MemoryError) as error:
                    logger.warning("sample picture %d after step %d was not made: %s", index, step, error)
                    continue
                self.result.samples.append(path)
                if self.on_sample is not None:
                    self.on_sample(step, image)
            self.last_sampled_step = step
        except Stopped:
            self.is_stopping = True
        finally:
            apply_loras(self.dit, self.base.loras)
            self.adapters.attach()
            self.samples.rest()

    def _save_lora(self, kind: SaveKind, number: int) -> None:
        self.result.lora_path = self.outputs.save_lora(self._lora, kind, number)

    def _lora(self) -> Lora:
        """The adapters as a file would give them back."""
        with self._inference_weights():
            metadata = lora_metadata(
                self.config,
                self.dataset,
                self.files,
                adapter=self.adapters.config,
                num_steps=self.num_steps,
                steps_per_epoch=self.steps_per_epoch,
                steps_done=self.steps_done,
            )
            return self.adapters.to_lora(self.outputs.name, DTYPES[self.config.output.save_precision], metadata)

    def _save_state(self) -> None:
        self.result.state_path = self.outputs.state_folder
        if not self.processes.is_main:
            return
        extra = {
            "description": self.description,
            "base_precision": self.base.plan.dit.precision,
            "last_sampled_step": self.last_sampled_step,
        }
        self.outputs.state_folder.mkdir(exist_ok=True)
        path = self.outputs.state_folder / STATE_FILE
        save_train_state(path, step=self.steps_done, extra=extra, **self._state_parts())

    def _restore(self, state: dict[str, Any], folder: Path) -> None:
        self.first_step = self.steps_done = restore_train_state(state, str(folder / STATE_FILE), **self._state_parts())
        self.last_sampled_step = state["extra"]["last_sampled_step"]

    def _state_parts(self) -> dict[str, Any]:
        counters = {"log": self.log, "outputs": self.outputs, "scaler": self.take_step.scaler}
        if self.ema is not None:
            counters["ema"] = self.ema
        return {
            "modules": {"adapters": self.adapters}, "optimizers": {"main": self.optimizer}, "counters": counters
        }  # fmt: skip

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

    def _tell(self, *, wait: bool) -> None:
        for step in self.log.take(wait=wait):
            if self.on_step is not None:
                self.on_step(step)

    def _must_stop(self) -> bool:
        return self.processes.any(self.is_stopping or (self.should_stop is not None and self.should_stop()))

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
