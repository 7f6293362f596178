"""Records of a run: none is lost when it is killed, none is doubled when it is resumed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
from flux2_kit.training import metrics
from flux2_kit.training.metrics import MetricsWriter, RunningAverage, open_trackers, read_metrics


def steps(path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def write_steps(directory, first: int, last: int, *, first_step: int = 0) -> MetricsWriter:
    writer = MetricsWriter(directory / "run-metrics.jsonl", first_step=first_step)
    for step in range(first, last):
        writer.write(step=step, epoch=1, loss=1 / step, learning_rate=1e-4, gradient_norm=0.5)
    return writer


def test_records_come_back_as_they_were_written(tmp_path):
    writer = MetricsWriter(tmp_path / "a b-metrics.jsonl")
    writer.write(step=1, epoch=1, loss=0.123456789012345, learning_rate=1e-4, gradient_norm=None)
    writer.write(step=1, validation_loss=0.5)
    assert writer.path == tmp_path / "a b-metrics.jsonl"
    first, second = read_metrics(writer.path)  # before it is closed
    assert first.pop("seconds") >= 0 and second.pop("seconds") >= 0
    assert first == {"step": 1, "epoch": 1, "loss": 0.123456789012345, "learning_rate": 1e-4}
    assert second == {"step": 1, "validation_loss": 0.5}
    writer.close()
    writer.close()


def test_a_loss_that_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    writer = MetricsWriter(tmp_path / "run-metrics.jsonl")
    writer.write(step=1, loss=math.nan, gradient_norm=math.inf)
    assert b"NaN" not in writer.path.read_bytes()
    record = json.loads(writer.path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["loss"] is None and record["gradient_norm"] is None


def test_a_killed_process_loses_no_line(tmp_path):
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom flux2_kit.training.metrics import MetricsWriter\n"
        f"writer = MetricsWriter(Path({str(tmp_path)!r}) / 'run-metrics.jsonl')\n"
        "for step in range(1, 8): writer.write(step=step, loss=0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert steps(tmp_path / "run-metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7]


def test_a_resumed_run_measures_again_only_what_came_after_its_state(tmp_path):
    path = write_steps(tmp_path, 1, 10).path
    with path.open("a") as file:
        file.write('{"step": 10, "lo')
    writer = write_steps(tmp_path, 8, 12, first_step=7)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    writer.close()


def test_seconds_go_on_after_a_resume(tmp_path):
    writer = write_steps(tmp_path, 1, 3)
    writer.path.write_text('{"step": 1, "seconds": 100.0}\n{"step": 2, "seconds": 200.0}\n')
    write_steps(tmp_path, 2, 3, first_step=1)
    assert 100 <= read_metrics(writer.path)[-1]["seconds"] < 150


def test_a_new_run_of_the_same_name_begins_a_new_file(tmp_path):
    first = write_steps(tmp_path, 1, 5)
    first.write(step=0, validation_loss=0.5)
    writer = write_steps(tmp_path, 1, 3)
    assert steps(writer.path) == [1, 2]


def test_what_is_no_file_of_metrics_is_refused_and_kept(tmp_path):
    path = tmp_path / "run-metrics.jsonl"
    for text in ("diary\nof a cat\n", '{"step": "1"}\n{"step": 2}\n', "[" * 100_000 + "\n\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"line 1 of .* is no record of training metrics"):
            MetricsWriter(tmp_path / "run-metrics.jsonl", first_step=3)
        assert path.read_text() == text


def test_cutting_off_is_atomic(tmp_path, monkeypatch):
    path = write_steps(tmp_path, 1, 10).path
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="power cut"):
        MetricsWriter(tmp_path / "run-metrics.jsonl", first_step=3)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_half_line_in_the_middle(tmp_path, monkeypatch):
    writer = write_steps(tmp_path, 1, 3)
    whole_write = os.write

    def short_write(descriptor, data):
        if len(data) < 40:
            raise OSError(28, "No space left on device")
        return whole_write(descriptor, data[:30])

    monkeypatch.setattr(metrics.os, "write", short_write)
    with pytest.raises(OSError, match="No space left"):
        writer.write(step=3, loss=0.1)
    monkeypatch.undo()
    writer.write(step=4, loss=0.1)
    assert steps(writer.path) == [1, 2, 4]


def test_the_running_average_starts_at_the_first_value_and_skips_what_is_not_finite():
    average = RunningAverage(0.25)
    values = (math.nan, 4.0, 8.0, math.inf, 3.0, 1.0, 8.0)
    # The mean of four, then a quarter of what is new.
    assert [average.update(value) for value in values] == [None, 4.0, 6.0, 6.0, 5.0, 4.0, 5.0]


class Recorder:
    name = "recorder"

    def __init__(self) -> None:
        self.logged, self.closed = [], 0

    def log(self, values, step) -> None:
        self.logged.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def test_trackers_are_told_every_finite_number_and_closed_once(tmp_path):
    tracker = Recorder()
    writer = MetricsWriter(tmp_path / "run-metrics.jsonl", trackers=[tracker])
    writer.write(step=1, epoch=1, loss=0.5, gradient_norm=math.nan, validation_loss=None)
    writer.close()
    writer.close()
    assert tracker.logged == [(1, {"epoch": 1.0, "loss": 0.5})] and tracker.closed == 1


def hide(monkeypatch, *packages: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name))


def test_no_tracker_is_opened_unless_asked(tmp_path):
    assert open_trackers(None, tmp_path, run_name="run") == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named_with_its_command(package, tmp_path, monkeypatch):
    hide(monkeypatch, package)
    with pytest.raises(ValueError, match=f"log_with {package} needs the package {package}; run: pip install {package}"):
        open_trackers(package, tmp_path, run_name="run")


def test_all_needs_at_least_one(tmp_path, monkeypatch):
    hide(monkeypatch, "tensorboard", "wandb")
    with pytest.raises(ValueError, match="finds neither of tensorboard and wandb; run: pip install tensorboard"):
        open_trackers("all", tmp_path, run_name="run")


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log_with is 'mlflow'; it must be tensorboard, wandb or all"):
        open_trackers("mlflow", tmp_path, run_name="run")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_the_numbers_and_forgets_what_is_measured_again(tmp_path, monkeypatch):
    hide(monkeypatch, "wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, last in ((0, 5), (2, 4)):
        trackers = open_trackers("all", tmp_path, run_name="run", first_step=first_step)
        writer = MetricsWriter(tmp_path / "run-metrics.jsonl", first_step=first_step, trackers=trackers)
        for step in range(first_step + 1, last + 1):
            writer.write(step=step, loss=step / 4 + first_step)
        writer.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 2.75), (4, 3.0)]


def test_wandb_gets_run_settings_and_numbers(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **options: calls.append(("init", options)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = open_trackers(
        "wandb", tmp_path / "logs", run_name="cat", run_id="7", project="animals", settings={"rank": 8}
    )
    writer = MetricsWriter(tmp_path / "run-metrics.jsonl", trackers=trackers)
    writer.write(step=3, loss=0.5)
    writer.close()
    options = {"project": "animals", "name": "cat", "dir": str(tmp_path / "logs"), "config": {"rank": 8}}
    options |= {"id": "7", "resume": "allow"}
    assert calls == [("init", options), ("log", {"loss": 0.5}, 3), "finish"]
