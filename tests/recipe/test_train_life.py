"""The life of a run: whatever ends it, nothing is lost, and what goes on ends where an uninterrupted run does."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.sampling import Stopped
from flux2_kit.training import lora_recipe, metrics, run_files, run_log, samples
from flux2_kit.training.adapters import AdapterConfig
from flux2_kit.training.cache import CachedDataset
from flux2_kit.training.config import OutputConfig
from flux2_kit.training.lora_recipe import LoraRun
from flux2_kit.training.metrics import read_metrics
from flux2_kit.training.train_resume import STATE_FILE, compare_run
from flux2_kit.training.train_state import load_tree, save_tree
from lora_training import cached, make_config, make_dataset, train, write_pictures
from PIL import Image

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CachedDataset:
    """Eight pictures, two of them held out, two a batch."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures") / "plain", 8)
    return cached(make_dataset(folder, batch_size=2, validation_fraction=0.25, caption_dropout=0.2))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle --s 1 --d 3\na blue ring --s 1 --d 4")
    return path


def config_of(folder: Path, prompts: Path | None = None, **settings):
    """Four steps; what can be due is due after the second, and the metrics are whole."""
    monitor = {"sample_prompts": prompts, "sample_every_n_steps": 2} if prompts else {}
    output = {"save_every_n_steps": 2, **settings.pop("output", {})}
    monitor |= {"validate_every_n_steps": 2}
    return make_config(folder, max_train_steps=4, preflight=False, output=output, monitor=monitor, **settings)


@pytest.fixture(scope="module")
def whole(dataset, prompts, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(config_of(folder, prompts), dataset)
    return folder


def contents(folder: Path) -> dict[str, object]:
    """All that a run wrote, without times; the state aside."""
    found: dict[str, object] = {}
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE):
        if path.suffix == ".jsonl":
            records = [{n: v for n, v in record.items() if n != "seconds"} for record in read_metrics(path)]
            found[path.name] = records
        else:
            found[path.name] = Image.open(path).tobytes() if path.suffix == ".png" else path.read_bytes()
    return found


def once(function, error: BaseException, when):
    """The function, with an error out of it the first time that its arguments say so."""
    raised = []

    def call(*args, **more):
        if not raised and when(*args, **more):
            raised.append(error)
            raise error
        return function(*args, **more)

    return call


@pytest.mark.parametrize("where", ["validation", "a picture", "a save"])
def test_what_a_stop_cut_off_after_a_step_is_done_when_the_run_goes_on(
    dataset, prompts, whole, tmp_path, monkeypatch, where
):
    config = config_of(tmp_path, prompts)
    if where == "validation":
        failing = once(LoraRun._validate, RuntimeError("no more"), lambda run, step: step == 2)
        monkeypatch.setattr(LoraRun, "_validate", failing)
    elif where == "a picture":
        monkeypatch.setattr(
            samples, "make_sample", once(samples.make_sample, Stopped(), lambda s, *_, **__: s.sampling.seed == 4)
        )
    else:
        monkeypatch.setattr(LoraRun, "_save_lora", once(LoraRun._save_lora, KeyboardInterrupt(), lambda *_: True))
    if where == "a picture":
        first = train(config, dataset)
        assert first.stopped and first.num_steps == 2
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            train(config, dataset)
    assert contents(tmp_path) != contents(whole)
    train(config, dataset, resume=tmp_path / "lora-state")
    assert contents(tmp_path) == contents(whole)


def test_a_run_that_goes_on_in_another_folder_takes_its_metrics_along(dataset, prompts, whole, tmp_path):
    seen = []
    stopped = train(
        config_of(tmp_path / "a", prompts), dataset, on_step=seen.append, should_stop=lambda: len(seen) == 3
    )
    train(config_of(tmp_path / "b", prompts), dataset, resume=stopped.state_path)
    after, expected = contents(tmp_path / "b"), contents(whole)
    assert all(after[name] == expected[name] for name in ("lora.safetensors", "lora-metrics.jsonl", "lora-curves.png"))


def test_an_error_leaves_lora_state_and_curves_and_says_so(dataset, tmp_path, caplog):
    def fail(step):
        if step.step == 3:
            raise RuntimeError("the host has gone")

    with pytest.raises(RuntimeError, match="the host has gone"):
        train(config_of(tmp_path), dataset, on_step=fail)
    assert {"lora-step00000003.safetensors", "lora-curves.png"} <= contents(tmp_path).keys()
    assert f"step 3 is kept; go on with resume {tmp_path / 'lora-state'}" in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path / "lora-metrics.jsonl") if "loss" in record] == [1, 2, 3]


def test_a_full_disk_at_a_save_on_the_way_does_not_end_training(dataset, whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_files, "write_lora", once(run_files.write_lora, FULL_DISK, lambda *_: True))
    train(config_of(tmp_path), dataset)
    assert "step 2 could not be saved ([Errno 28] No space left on device); make room before the next" in caplog.text
    expected = contents(whole)
    assert contents(tmp_path)["lora.safetensors"] == expected["lora.safetensors"]
    assert contents(tmp_path)["lora-metrics.jsonl"] == expected["lora-metrics.jsonl"]


def test_a_full_disk_at_the_end_keeps_the_state_and_the_run_is_finished_from_it(dataset, whole, tmp_path, monkeypatch):
    failing = once(run_files.write_lora, FULL_DISK, lambda path, _: path.name == "lora.safetensors")
    monkeypatch.setattr(run_files, "write_lora", failing)
    with pytest.raises(OSError, match="No space left"):
        train(config_of(tmp_path), dataset)
    state = tmp_path / "lora-state"
    assert train(config_of(tmp_path), dataset, resume=state).num_steps == 4
    assert contents(tmp_path)["lora.safetensors"] == contents(whole)["lora.safetensors"]
    with pytest.raises(ValueError, match="is at step 4, and the run ends at 4; raise max_train_steps"):
        train(config_of(tmp_path), dataset, resume=state)


def test_an_error_while_the_rest_is_saved_does_not_hide_the_first(dataset, tmp_path, monkeypatch, caplog):
    def fail(step):
        raise RuntimeError("the first")

    def full(*_, **__):
        raise FULL_DISK

    monkeypatch.setattr(LoraRun, "_save_state", full)
    with pytest.raises(RuntimeError, match="the first"):
        train(config_of(tmp_path), dataset, on_step=fail)
    assert "not all of step 1 could be written: [Errno 28] No space left on device" in caplog.text


class Broken:
    name = "W&B"

    def log(self, values, step) -> None:
        raise ConnectionError("no route to host")

    def close(self) -> None:
        raise ConnectionError("no route to host")


def test_metrics_trackers_and_curves_that_fail_do_not_end_training(dataset, whole, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise FULL_DISK

    monkeypatch.setattr(run_log, "open_trackers", lambda *_, **__: (Broken(),))
    monkeypatch.setattr(run_log, "draw_curves", full)
    result = train(config_of(tmp_path / "a"), dataset)
    assert "W&B failed at step 0 and is told no more: no route to host" in caplog.text
    assert caplog.text.count("W&B failed") == 1 and "the curves could not be drawn" in caplog.text
    assert result.curves_path is None and len(read_metrics(result.metrics_path)) == 7
    monkeypatch.setattr(metrics.os, "write", full)
    train(config_of(tmp_path / "b"), dataset)
    assert caplog.text.count("could not be written ([Errno 28] No space left on device); training goes on") == 1
    for name in "ab":
        assert contents(tmp_path / name)["lora.safetensors"] == contents(whole)["lora.safetensors"]


def test_a_picture_that_fails_leaves_the_others(dataset, tmp_path, monkeypatch, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 1 --d 3\na huge circle --s 1 --w 4096 --h 4096 --d 4\na blue ring --s 1 --d 5")
    make = samples.make_sample

    def fail(sample, *args, **more):
        if sample.sampling.width == 4096:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(sample, *args, **more)

    monkeypatch.setattr(samples, "make_sample", fail)
    result = train(config_of(tmp_path / "out", prompts), dataset)
    names = [path.name for path in result.samples]
    assert names == [f"lora_00000{step}_0{index}_{3 + index}.png" for step in (2, 4) for index in (0, 2)]
    assert "sample picture 1 after step 2 was not made: CUDA out of memory" in caplog.text


@pytest.mark.parametrize("line", ["a circle --w many", "a circle --ci nowhere.png", "a circle --z 3"])
def test_a_broken_line_of_prompts_is_told_before_anything_is_loaded(dataset, tmp_path, monkeypatch, line):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a red circle\n{line}\n")
    monkeypatch.setattr("flux2_kit.training.base_model.place_dit", None)
    with pytest.raises((ValueError, OSError), match=r"prompts.txt:2|nowhere.png"):
        train(config_of(tmp_path / "out", prompts), dataset)


@pytest.fixture(scope="module")
def state(dataset, tmp_path_factory) -> Path:
    """The state of a run that was stopped after two steps."""
    seen: list[object] = []
    config = config_of(tmp_path_factory.mktemp("stopped"))
    return train(config, dataset, on_step=seen.append, should_stop=lambda: len(seen) == 2).state_path


def changed(state: Path, folder: Path, *place: str, value: object) -> Path:
    """A copy of a state with another value at a place."""
    tree = load_tree(state / STATE_FILE)
    inner = tree
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    folder.mkdir()
    save_tree(folder / STATE_FILE, tree)
    return folder


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step",), "2"), (("step",), -1), (("step",), True), (("modules",), []), (("extra",), None),
        (("extra", "description"), [1]), (("extra", "base_precision"), None), (("counters",), 3),
    ],
)  # fmt: skip
def test_what_is_no_state_of_training_is_told(state, tmp_path, place, value):
    folder = changed(state, tmp_path / "x-state", *place, value=value)
    with pytest.raises(ValueError, match="holds no state of LoRA training"):
        compare_run(load_tree(folder / STATE_FILE), {}, folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("counters", "outputs"), [["../../home", 3]]),
        (("counters", "log"), {}),
        (("counters", "log", "validation_losses"), [1, 2]),
        (("modules", "adapters"), {}),
        (("optimizers", "main", "param_groups"), []),
        (("optimizers", "main", "state"), {0: 5}),
    ],
)
def test_a_damaged_state_is_told_and_not_gone_on_from(dataset, state, tmp_path, place, value):
    folder = changed(state, tmp_path / "x-state", *place, value=value)
    with pytest.raises(ValueError, match="is the state of another run, or damaged"):
        train(config_of(tmp_path / "out"), dataset, resume=folder)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_with_values_that_are_not_finite_is_told(dataset, state, tmp_path, value):
    adapters = load_tree(state / STATE_FILE)["modules"]["adapters"]
    name = next(iter(adapters))
    folder = changed(state, tmp_path / "x-state", "modules", "adapters", name, value=adapters[name] * value)
    with pytest.raises(ValueError, match=f"{name} .*not finite"):
        train(config_of(tmp_path / "out"), dataset, resume=folder)


def test_metadata_counts_the_steps_of_the_run_and_keeps_private_names_out(dataset, tmp_path, monkeypatch):
    config = replace(
        config_of(tmp_path, adapter=AdapterConfig(rank=4, dora=True)),
        max_train_epochs=2,
        output=OutputConfig(output_dir=tmp_path, training_comment="stripes"),
    )
    monitor = replace(config.monitor, log_with="tensorboard", logging_dir=tmp_path / "secret")
    monkeypatch.setattr(run_log, "open_trackers", lambda *_, **__: ())
    monkeypatch.setattr(lora_recipe, "installed_trackers", lambda _: ())
    result = train(replace(config, monitor=monitor), dataset)
    data = result.lora_path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    assert (metadata["ss_steps"], metadata["ss_max_train_steps"]) == ("6", "6")
    assert (metadata["ss_epoch"], metadata["ss_num_epochs"], metadata["ss_num_train_items"]) == ("2", "2", "6")
    assert json.loads(metadata["ss_network_args"]) == {"dora": True}
    (subset,) = json.loads(metadata["ss_datasets"])
    assert (subset["resolution"], subset["batch_size_per_device"], subset["num_train_items"]) == ([64, 64], 2, 6)
    folder = dataset.items[0].item.image.parent
    for private in ("secret", str(tmp_path), folder.name, str(Path.home())):
        assert private not in json.dumps(metadata), private
