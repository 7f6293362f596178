"""What a training run measures, as lines of JSON on the disk and, where asked for, in TensorBoard and W&B."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ..flux2_core.files import read_limited, write_text

logger = logging.getLogger(__name__)

LogWith = Literal["tensorboard", "wandb", "all"]
PACKAGES = ("tensorboard", "wandb")
MAX_METRICS_BYTES = 2**30
"""Some four million steps."""
FLUSH_SECONDS = 10
"""How long TensorBoard keeps numbers in memory, which a killed process loses."""


class Tracker(Protocol):
    """Something that shows numbers while a run goes on."""

    name: str
    """For messages."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Shows the numbers of a step; none of them is NaN or infinite."""

    def close(self) -> None:
        """Sends what is left."""


class RunningAverage:
    """Mean of the first ``1 / weight`` values, from then on an exponential average; only finite values count."""

    def __init__(self, weight: float = 0.02) -> None:
        """Takes the weight of the newest value, 0..1."""
        assert 0 < weight <= 1
        self.weight = weight
        self.count = 0
        self.value: float | None = None

    def update(self, value: float) -> float | None:
        """Takes a value in and gives the average; None as long as there was no finite value."""
        if math.isfinite(value):
            self.count += 1
            before = self.value or 0.0
            self.value = before + max(self.weight, 1 / self.count) * (value - before)
        return self.value


class MetricsWriter:
    """Appends a line of JSON for every record.

    A line is given to the system as a whole at once, so that a killed process loses none; at most a power cut or a
    full disk leaves half of one, which is dropped when the file is read.
    """

    def __init__(
        self,
        path: Path,
        *,
        first_step: int = 0,
        history: Path | None = None,
        trackers: Iterable[Tracker] = (),
    ) -> None:
        """Opens the file, and cuts off what a resumed run is going to measure again.

        Args:
            path: of the file, in a folder that exists.
            first_step: steps done; records up to it are kept. A run that begins at 0 begins a new file.
            history: where these records are, if the run went on in another folder or under another name since.
            trackers: told every record as well; one that fails is told nothing more, and the run goes on.

        Raises:
            ValueError: the file that is there is no such file.
        """
        self.path = path
        self._trackers = list(trackers)
        kept = []
        source = self.path if history is None else history
        if first_step > 0 and source.exists():
            kept = [record for record in read_metrics(source) if record["step"] <= first_step]
        write_text(self.path, "".join(_line(record) for record in kept))
        self._seconds_before = max((record.get("seconds") or 0.0 for record in kept), default=0.0)
        self._started = time.monotonic()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))

    def write(self, *, step: int, **values: float | None) -> None:
        """Appends a record; None is left out, and what is not finite becomes null.

        Args:
            step: steps done.
            values: usually epoch, loss, validation_loss, learning_rate, gradient_norm. The seconds that the run has
                taken, those before a resume included, are added.

        Raises:
            OSError: the disk is full; what was written of the line is taken back where that is possible.
        """
        assert self._descriptor is not None, "closed"
        given = {name: value for name, value in values.items() if value is not None}
        seconds = self._seconds_before + time.monotonic() - self._started
        line = _line({"step": step, **given, "seconds": round(seconds, 3)}).encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        shown = {name: float(value) for name, value in given.items() if math.isfinite(value)}
        for tracker in list(self._trackers):
            try:
                tracker.log(shown, step)
            except Exception as error:  # of any kind: a lost connection must not cost a training
                logger.warning("%s failed at step %d and is told no more: %s", tracker.name, step, error)
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Closes the file and the trackers; a second time does nothing."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", tracker.name, error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file of metrics, in its order; half a line at the end is left out.

    Raises:
        ValueError: it is no such file.
    """
    lines = read_limited(path, MAX_METRICS_BYTES).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("a record is an object with a step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no line end behind it: the writer was cut off
                break
            raise ValueError(f"line {number} of {path} is no record of training metrics: {error}") from error
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def open_trackers(
    log_with: LogWith | None,
    logging_dir: Path,
    *,
    run_name: str,
    run_id: str | None = None,
    project: str = "flux2-kit",
    settings: Mapping[str, Any] | None = None,
    first_step: int = 0,
) -> tuple[Tracker, ...]:
    """TensorBoard and W&B, opened for one run; "all" takes those of the two that are installed.

    Args:
        logging_dir: TensorBoard's events go into a folder ``run_name`` in it, W&B's files beside that.
        run_name: of this run.
        run_id: by which W&B knows a resumed run again; None: it is a new one.
        project: of W&B.
        settings: shown by W&B beside the run.
        first_step: steps done before, in a resumed run; TensorBoard forgets what was beyond.

    Raises:
        ValueError: the package that is asked for is not installed, or cannot be used.
    """
    opened: list[Tracker] = []
    for package in installed_trackers(log_with):
        if package == "tensorboard":
            opened.append(_TensorBoard(logging_dir / run_name, first_step))
        else:
            opened.append(_WeightsAndBiases(logging_dir, run_name, run_id, project, settings or {}))
    return tuple(opened)


def installed_trackers(log_with: LogWith | None) -> tuple[str, ...]:
    """The packages that `open_trackers` uses; nothing is imported.

    Raises:
        ValueError: the package that is asked for is not installed.
    """
    if log_with not in (None, "all", *PACKAGES):
        raise ValueError(f"log_with is {log_with!r}; it must be tensorboard, wandb or all")
    wanted = PACKAGES if log_with == "all" else (log_with,) if log_with else ()
    found = tuple(package for package in wanted if importlib.util.find_spec(package) is not None)
    if log_with == "all" and not found:
        raise ValueError(f"log_with all finds neither of {' and '.join(PACKAGES)}; run: pip install tensorboard")
    if log_with is not None and not found:
        raise ValueError(f"log_with {log_with} needs the package {log_with}; run: pip install {log_with}")
    return found


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    name = "W&B"

    def __init__(
        self, folder: Path, run_name: str, run_id: str | None, project: str, settings: Mapping[str, Any]
    ) -> None:
        wandb = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project, name=run_name, dir=str(folder), config=dict(settings), id=run_id, resume="allow"
            )
        except Exception as error:
            raise ValueError(
                f"W&B cannot be used: {error}; run `wandb login`, or set WANDB_MODE=offline, or leave log_with out"
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
