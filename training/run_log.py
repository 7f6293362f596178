"""What is known of the steps of a run: counted, told, written to the metrics and drawn as curves."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metrics import MetricsWriter, RunningAverage, open_trackers
from .plots import draw_curves
from .train_progress import TrainStep

if TYPE_CHECKING:
    from .config import TrainConfig
    from .run_files import RunFiles
    from .step_reports import StepNumbers, StepReports

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CURVES = 10
"""At least, on the way: drawing takes a fifth of a second in which nothing is trained."""


class RunLog:
    """Numbers of the steps of a run, in the order of the steps.

    Args:
        reports: brings them from the device.
    """

    def __init__(self, config: TrainConfig, reports: StepReports, num_steps: int, steps_per_epoch: int) -> None:
        self.config, self.reports = config, reports
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.average_loss = RunningAverage()
        self.num_bad_steps = self.num_bad_in_a_row = 0
        self.validation_losses: dict[int, float] = {}
        """By steps done."""
        self.run_id = uuid.uuid4().hex[:12]
        """By which W&B knows a run that goes on."""
        self.metrics: MetricsWriter | None = None
        self._has_failed = False
        self._drawn_at: float | None = None

    def open(self, files: RunFiles, first_step: int, settings: Mapping[str, Any], history: Path | None) -> None:
        """Begins to write the metrics; nothing is written by a process that does not call this.

        Args:
            first_step: steps done before.
            settings: shown by W&B.
            history: metrics of the steps before, where they are not in the file that is written.

        Raises:
            ValueError: a file there is none of metrics, or a package is missing.
        """
        monitor = self.config.monitor
        trackers = open_trackers(
            monitor.log_with,
            monitor.logging_dir or files.folder / "logs",
            run_name=monitor.wandb_run_name or files.name,
            run_id=self.run_id,
            project=monitor.log_tracker_name or "flux2-kit",
            settings=settings,
            first_step=first_step,
        )
        self.metrics = MetricsWriter(files.metrics_path, first_step=first_step, history=history, trackers=trackers)
        self.curves_path = files.curves_path

    def take(self, *, wait: bool) -> Iterator[TrainStep]:
        """The steps that have not been told, see `StepReports.take`.

        Raises:
            ValueError: too many in a row had no finite loss.
        """
        for numbers in self.reports.take(wait=wait):
            epoch = self._count(numbers)
            average = self.average_loss.value
            yield TrainStep(
                step=numbers.step,
                num_steps=self.num_steps,
                epoch=epoch,
                loss=numbers.loss,
                average_loss=math.nan if average is None else average,
                learning_rate=numbers.learning_rate,
                seconds_per_step=numbers.seconds_per_step,
                seconds_left=numbers.seconds_per_step * (self.num_steps - numbers.step),
            )
            if self.num_bad_in_a_row >= self.config.max_bad_steps:
                raise ValueError(
                    f"the loss was not finite in {self.num_bad_in_a_row} steps in a row, up to step {numbers.step}; "
                    "lower the learning rate, or train with mixed_precision bf16 or no"
                )

    def catch_up(self) -> None:
        """Counts the steps that have not been told, and tells them no more."""
        for numbers in self.reports.take(wait=True):
            self._count(numbers)

    def validated(self, step: int, loss: float) -> None:
        """Notes the loss of the held-out pictures after so many steps."""
        self.validation_losses[step] = loss
        self._write(step, validation_loss=loss)

    def draw(self, *, is_last: bool) -> Path | None:
        """Draws the curves of all steps so far, on the way only now and then; a failure does not end training."""
        if self.metrics is None:
            return None
        if not is_last and self._drawn_at is not None and time.monotonic() - self._drawn_at < SECONDS_BETWEEN_CURVES:
            return self.curves_path
        try:
            draw_curves(self.metrics.path, self.curves_path)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            logger.warning("the curves could not be drawn: %s", error)
            return None
        self._drawn_at = time.monotonic()
        return self.curves_path

    def close(self) -> None:
        """Closes the metrics; a second time does nothing."""
        if self.metrics is not None:
            self.metrics.close()

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to know."""
        return {
            "average_loss": (self.average_loss.value, self.average_loss.count),
            "num_bad_in_a_row": self.num_bad_in_a_row,
            "num_bad_steps": self.num_bad_steps,
            "validation_losses": self.validation_losses,
            "run_id": self.run_id,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        average, count = state["average_loss"]
        self.average_loss.value, self.average_loss.count = None if average is None else float(average), int(count)
        self.num_bad_in_a_row, self.num_bad_steps = int(state["num_bad_in_a_row"]), int(state["num_bad_steps"])
        self.validation_losses = {int(step): float(loss) for step, loss in state["validation_losses"].items()}
        self.run_id = str(state["run_id"])

    def _count(self, numbers: StepNumbers) -> int:
        """Counts a finished step and writes its metrics; gives its epoch."""
        step, epoch = numbers.step, (numbers.step - 1) // self.steps_per_epoch + 1
        self.average_loss.update(numbers.loss)
        if math.isfinite(numbers.loss):
            self.num_bad_in_a_row = 0
        else:
            self.num_bad_in_a_row += 1
            self.num_bad_steps += 1
            logger.warning("step %d was skipped: its loss or gradient is not finite", step)
        if step % self.config.monitor.log_every_n_steps == 0 or step == self.num_steps:
            self._write(
                step,
                epoch=epoch,
                loss=numbers.loss,
                learning_rate=numbers.learning_rate,
                gradient_norm=numbers.gradient_norm,
            )
        return epoch

    def _write(self, step: int, **values: float) -> None:
        """Writes a record; without it training goes on."""
        if self.metrics is None:
            return
        try:
            self.metrics.write(step=step, **values)
        except OSError as error:
            if not self._has_failed:
                logger.warning("the metrics of step %d could not be written (%s); training goes on", step, error)
            self._has_failed = True
