"""Training a LoRA on the bundled model: it learns, it can be stopped anywhere, and it says what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core.lora_files import read_lora
from flux2_kit.training import lora_recipe, run_files, run_log, samples
from flux2_kit.training.adapters import AdapterConfig
from flux2_kit.training.cache import CachedDataset
from flux2_kit.training.config import OutputConfig
from flux2_kit.training.flow_matching import velocity_losses
from flux2_kit.training.loader import StepLoader
from flux2_kit.training.lora_recipe import LoraRun, train_lora
from flux2_kit.training.metrics import read_metrics
from flux2_kit.training.optimizers import OptimizerConfig, ScheduleConfig
from flux2_kit.training.processes import Processes
from flux2_kit.training.timesteps import TimestepConfig
from flux2_kit.training.train_files import find_train_files
from flux2_kit.training.train_progress import TrainStep
from lora_training import TINY, cached, make_config, make_dataset, train, write_pictures
from packaging.version import Version
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CachedDataset:
    """Ten pictures with one or two references, some of them held out, two a batch."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures") / "edits", 10, num_references=(1, 2))
    made = make_dataset(
        folder,
        control_directory=folder / "references",
        batch_size=2,
        validation_fraction=0.2,
        caption_dropout=0.2,
        flip=True,
    )
    return cached(made)


def stop_after(num_steps: int):
    """A step callback and what asks it whether to stop."""
    seen: list[TrainStep] = []
    return seen.append, lambda: bool(seen) and seen[-1].step >= num_steps


def test_a_run_stopped_at_7_and_resumed_writes_the_file_of_an_uninterrupted_one(dataset, tmp_path):
    settings = {"ema_decay": 0.9, "adapter": AdapterConfig(rank=4, dropout=0.1)}
    whole = train(make_config(tmp_path / "whole", **settings), dataset)
    on_step, should_stop = stop_after(7)
    first = train(make_config(tmp_path / "parts", **settings), dataset, on_step=on_step, should_stop=should_stop)
    assert first.stopped and first.num_steps == 7
    assert first.lora_path is not None and first.lora_path.name == "lora-step00000007.safetensors"
    second = train(make_config(tmp_path / "parts", **settings), dataset, resume=first.state_path)
    assert not second.stopped and second.num_steps == 12
    assert second.lora_path.read_bytes() == whole.lora_path.read_bytes()
    assert second.validation_losses == whole.validation_losses
    losses = [[r["loss"] for r in read_metrics(result.metrics_path) if "loss" in r] for result in (whole, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.mark.parametrize(
    ("kind", "arguments", "rate"),
    [
        ("adamw8bit", (), 1e-3),
        ("adafactor", (), 1e-3),
        ("prodigy", (), 1.0),
        ("schedulefree", (), 1e-3),
        ("torch.optim.SGD", ("momentum=0.9",), 1e-2),
    ],
)
def test_every_optimiser_goes_on_bit_by_bit(dataset, tmp_path, kind, arguments, rate):
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(kind)
    if package is not None:
        pytest.importorskip(package, reason=f"{kind} needs {package}")
    if package == "bitsandbytes" and Version(version := metadata.version(package)) < Version("0.50"):
        pytest.skip(f"8-bit optimisers of bitsandbytes {version} need a GPU")
    settings = {
        "max_train_steps": 5,
        "optimizer": OptimizerConfig(optimizer_type=kind, learning_rate=rate, optimizer_args=arguments),
    }
    whole = train(make_config(tmp_path / "whole", **settings), dataset)
    on_step, should_stop = stop_after(3)
    first = train(make_config(tmp_path / "parts", **settings), dataset, on_step=on_step, should_stop=should_stop)
    second = train(make_config(tmp_path / "parts", **settings), dataset, resume=first.state_path)
    assert second.lora_path.read_bytes() == whole.lora_path.read_bytes()
    assert any(tensor.count_nonzero() for name, tensor in load_file(whole.lora_path).items() if "lora_B" in name)


def test_training_lowers_the_loss_of_held_out_pictures(dataset, tmp_path):
    result = train(make_config(tmp_path, max_train_steps=30), dataset)
    losses = result.validation_losses
    assert losses[30] < 0.9 * losses[0]
    assert sorted(losses) == list(range(0, 31, 6))


def test_the_step_before_any_training_has_the_loss_of_the_base(dataset, tmp_path):
    first, other = (
        train(make_config(tmp_path / str(rank), adapter=AdapterConfig(rank=rank), max_train_steps=1), dataset)
        for rank in (2, 5)
    )
    assert first.validation_losses[0] == other.validation_losses[0]
    assert first.validation_losses[1] != other.validation_losses[1]


def test_an_exception_out_of_a_callback_keeps_the_steps_so_far(dataset, tmp_path):
    def fail(step: TrainStep) -> None:
        if step.step == 5:
            raise RuntimeError("the host stopped us")

    config = make_config(tmp_path / "parts")
    with pytest.raises(RuntimeError, match="the host stopped us"):
        train(config, dataset, on_step=fail)
    whole = train(make_config(tmp_path / "whole"), dataset)
    rest = train(config, dataset, resume=tmp_path / "parts" / "lora-state")
    assert rest.lora_path.read_bytes() == whole.lora_path.read_bytes()


def test_a_break_inside_the_optimiser_leaves_no_half_state(dataset, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(tmp_path), dataset)
    assert not (tmp_path / "lora-state").exists()


def test_sample_pictures_are_those_that_generate_makes_with_the_lora(dataset, tmp_path, capsys):
    from flux2_kit.training.cli import main
    from PIL import Image

    reference = next((dataset.items[0].item.image.parent / "references").iterdir())
    prompts = tmp_path / "prompts.txt"
    lines = [
        "a small red circle at the top on a blue background --d 5 --s 4",
        f"make it green --d 6 --s 3 --g 1 --ci {reference}",
    ]
    prompts.write_text("\n".join(lines))
    config = make_config(
        tmp_path,
        mixed_precision=None,
        adapter=AdapterConfig(rank=3, alpha=1.3),  # a scale that no float holds exactly
        monitor={"sample_prompts": prompts, "sample_every_n_steps": 6},
        max_train_steps=6,
        ema_decay=0.9,
    )
    shown = []
    result = train(config, dataset, on_sample=lambda step, image: shown.append((step, image)))
    assert [path.name for path in result.samples] == ["lora_000006_00_5.png", "lora_000006_01_6.png"]
    assert [step for step, _ in shown] == [6, 6]
    options = ["generate", "--from_file", str(prompts), "--lora_weight", str(result.lora_path)]
    assert main([*options, "--save_path", str(tmp_path / "generated")]) == 0
    made = [Path(line) for line in capsys.readouterr().out.split()]
    for sample, generated in zip(result.samples, made, strict=True):
        assert Image.open(sample).tobytes() == Image.open(generated).tobytes()
    assert main([*options[:3], "--save_path", str(tmp_path / "base")]) == 0
    base = Path(capsys.readouterr().out.split()[0])
    assert Image.open(base).tobytes() != Image.open(made[0]).tobytes()


def test_a_crash_in_a_sample_picture_does_not_end_training(dataset, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory for pictures")

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 2")
    monkeypatch.setattr(samples, "make_sample", fail)
    config = make_config(tmp_path / "a", monitor={"sample_prompts": prompts, "sample_every_n_steps": 4})
    result = train(config, dataset)
    assert result.num_steps == 12 and "no memory for pictures" in caplog.text
    plain = train(make_config(tmp_path / "b"), dataset)
    assert load_equal(result.lora_path, plain.lora_path)


def load_equal(first: Path, second: Path) -> bool:
    tensors, others = load_file(first), load_file(second)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(dataset, tmp_path, monkeypatch, caplog):
    losses = LoraRun._losses
    calls = []

    def sometimes(self, group):
        calls.append(self.steps_done)
        bad = self.steps_done in (2, 5)
        return losses(self, group) * (math.nan if bad else 1.0)

    monkeypatch.setattr(LoraRun, "_losses", sometimes)
    result = train(make_config(tmp_path, preflight=False), dataset)
    assert result.num_bad_steps == 2 and result.num_steps == 12
    assert all(tensor.isfinite().all() for tensor in load_file(result.lora_path).values())
    records = {r["step"]: r["loss"] for r in read_metrics(result.metrics_path) if "gradient_norm" in r}
    assert [step for step, loss in records.items() if loss is None] == [3, 6]


def test_a_loss_that_stays_not_finite_ends_the_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraRun, "_losses", lambda self, group: self.parameters[0].sum() * math.nan)
    with pytest.raises(ValueError, match="not finite in 3 steps in a row"):
        train(make_config(tmp_path, max_bad_steps=3), dataset)


def test_the_largest_batch_is_tried_first_and_too_little_memory_says_what_to_do(dataset, tmp_path, monkeypatch):
    def fail(self, group):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoraRun, "_losses", fail)
    with pytest.raises(ValueError, match=r"2 x 64x64 px with 2 references; set gradient_checkpointing"):
        train(make_config(tmp_path), dataset)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_first_try_changes_nothing(dataset, tmp_path):
    adapter = AdapterConfig(rank=4, dropout=0.2)
    tried, untried = (
        train(make_config(tmp_path / str(number), preflight=number == 0, max_train_steps=3, adapter=adapter), dataset)
        for number in range(2)
    )
    assert load_equal(tried.lora_path, untried.lora_path)


def test_a_disk_that_is_too_small_is_told_before_training(dataset, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(run_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0\.01 GiB free"):
        train(make_config(tmp_path), dataset)
    plenty = usage._replace(free=2**40)
    monkeypatch.setattr(run_files.shutil, "disk_usage", lambda path: usage if path.name == "loras" else plenty)
    with pytest.raises(ValueError, match=r"loras has 0\.01 GiB free"):
        train(make_config(tmp_path, output={"lora_dir": tmp_path / "loras"}), dataset)


def test_another_config_or_dataset_is_refused_by_name(dataset, tmp_path):
    on_step, should_stop = stop_after(2)
    state = train(make_config(tmp_path), dataset, on_step=on_step, should_stop=should_stop).state_path
    with pytest.raises(ValueError, match="rank was 4, now 8"):
        train(make_config(tmp_path, adapter=AdapterConfig(rank=8)), dataset, resume=state)
    with pytest.raises(ValueError, match="the dataset has changed"):
        train(make_config(tmp_path), replace(dataset, digest="0" * 32), resume=state)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 0\.5.*Resume with the settings of then"):
        train(make_config(tmp_path, optimizer=OptimizerConfig(learning_rate=0.5)), dataset, resume=state)
    with pytest.raises(ValueError, match="is at step 2, and the run ends at 1"):
        train(make_config(tmp_path, max_train_steps=1), dataset, resume=state)
    with pytest.raises(ValueError, match="no train state"):
        train(make_config(tmp_path), dataset, resume=tmp_path / "nowhere")


def test_a_stopped_run_can_be_finished_where_it_stopped(dataset, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 1")
    on_step, should_stop = stop_after(2)
    state = train(make_config(tmp_path / "a"), dataset, on_step=on_step, should_stop=should_stop).state_path
    shorter = make_config(tmp_path / "a", max_train_steps=2, monitor={"sample_prompts": prompts})
    result = train(shorter, dataset, resume=state)
    assert result.lora_path == tmp_path / "a" / "lora.safetensors" and len(result.samples) == 1
    assert (result.num_steps, result.stopped) == (2, False)
    whole = train(make_config(tmp_path / "b", max_train_steps=2), dataset)
    assert load_equal(result.lora_path, whole.lora_path)


def test_the_metrics_are_closed_however_a_run_ends(dataset, tmp_path, monkeypatch):
    opened, opens = [], run_log.MetricsWriter
    monkeypatch.setattr(
        run_log, "MetricsWriter", lambda *args, **more: opened.append(opens(*args, **more)) or opened[-1]
    )

    def fail(step):
        raise RuntimeError("on the way")

    train(make_config(tmp_path / "a", max_train_steps=1), dataset)
    train(make_config(tmp_path / "b", max_train_steps=1), dataset, should_stop=lambda: True)
    with pytest.raises(RuntimeError, match="on the way"):
        train(make_config(tmp_path / "c"), dataset, on_step=fail)
    assert [metrics._descriptor for metrics in opened] == [None] * 3


def test_what_does_not_change_the_steps_may_differ_in_a_resumed_run(dataset, tmp_path):
    on_step, should_stop = stop_after(2)
    state = train(make_config(tmp_path), dataset, on_step=on_step, should_stop=should_stop).state_path
    longer = make_config(tmp_path, max_train_steps=4, checkpointing="blocks", output={"save_every_n_steps": 1})
    result = train(longer, dataset, resume=state)
    whole = train(make_config(tmp_path / "whole", max_train_steps=4), dataset)
    assert load_equal(result.lora_path, whole.lora_path)


def test_only_the_last_files_are_kept(dataset, tmp_path):
    output = {"save_every_n_steps": 2, "save_last_n_steps": 4, "save_every_n_epochs": 1, "save_last_n_epochs": 2}
    config = make_config(tmp_path, output=output, max_train_steps=12)
    result = train(config, dataset)
    steps_per_epoch = math.ceil(len(dataset.items) / 2)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert [name for name in names if "step" in name] == [
        "lora-step00000008.safetensors",
        "lora-step00000010.safetensors",
    ]
    epochs = [f"lora-{epoch:06d}.safetensors" for epoch in range(1, (12 - 1) // steps_per_epoch + 1)][-2:]
    assert [name for name in names if "step" not in name] == sorted([*epochs, "lora.safetensors"])
    assert result.lora_path == tmp_path / "lora.safetensors"


def test_metadata_tells_what_was_trained_and_no_path_of_the_machine(dataset, tmp_path):
    config = make_config(tmp_path, max_train_steps=2)
    output = replace(config.output, metadata_title="Title", metadata_author="Author")
    lora = read_lora(train(replace(config, output=output), dataset).lora_path, TINY.dit)
    assert lora.metadata["modelspec.architecture"] == "Flux.2-tiny/lora"
    assert lora.metadata["modelspec.title"] == "Title" and lora.metadata["modelspec.author"] == "Author"
    assert lora.metadata["ss_steps"] == "2" and lora.metadata["ss_network_dim"] == "4"
    assert lora.metadata["flux2_kit.dataset_digest"] == dataset.digest
    assert json.loads(lora.metadata["flux2_kit.train_config"])["optimizer"]["learning_rate"] == 1e-3
    assert str(tmp_path) not in json.dumps(dict(lora.metadata))


def test_a_run_can_start_from_a_lora(dataset, tmp_path):
    first = train(make_config(tmp_path / "a", output={"save_precision": "fp32"}), dataset)
    start = {"network_weights": first.lora_path, "dim_from_weights": True, "adapter": AdapterConfig()}
    config = make_config(tmp_path / "b", **start, max_train_steps=1)
    second = train(config, dataset)
    assert second.validation_losses[0] == pytest.approx(first.validation_losses[12], rel=1e-5)
    other = OutputConfig(output_dir=tmp_path / "c")
    with pytest.raises(ValueError, match="rank 4"):
        train(replace(config, dim_from_weights=False, output=other), dataset)


@pytest.mark.parametrize("dora", [False, True])
def test_what_other_programs_misread_is_told_before_training(dataset, tmp_path, caplog, dora):
    config = make_config(tmp_path, max_train_steps=1, adapter=AdapterConfig(rank=2, dora=dora))
    train(config, dataset)
    assert ("leave out the magnitudes of DoRA" in caplog.text) == dora


def test_a_run_on_top_of_a_lora_learns_what_that_leaves_and_does_not_hold_it(dataset, tmp_path, capsys):
    from flux2_kit.training.cli import main
    from PIL import Image

    before = train(make_config(tmp_path / "first", output={"save_precision": "fp32"}), dataset)
    first = before.lora_path
    after = train(make_config(tmp_path / "whole", base_weights=(first,), max_train_steps=1), dataset)
    assert after.validation_losses[0] == pytest.approx(before.validation_losses[12], rel=1e-5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle at the top on a blue background --d 5 --s 4")
    config = make_config(
        tmp_path / "second",
        mixed_precision=None,
        base_weights=(first,),
        base_weights_multiplier=(0.7,),
        max_train_steps=2,
        monitor={"sample_prompts": prompts},
    )
    result = train(config, dataset)
    options = ["generate", "--from_file", str(prompts), "--lora_weight", str(first), str(result.lora_path)]
    assert main([*options, "--lora_multiplier", "0.7", "1", "--save_path", str(tmp_path / "generated")]) == 0
    (made,) = (Path(line) for line in capsys.readouterr().out.split())
    (sample,) = result.samples
    assert Image.open(sample).tobytes() == Image.open(made).tobytes()


def test_loras_under_a_run_count_by_their_content_when_it_goes_on(dataset, tmp_path):
    first, other = (
        train(make_config(tmp_path / name, seed=seed, max_train_steps=1), dataset).lora_path
        for name, seed in (("first", 1), ("other", 2))
    )
    stopped = train(
        make_config(tmp_path / "run", base_weights=(first,), max_train_steps=1, output={"save_state": True}), dataset
    )
    longer = make_config(tmp_path / "run", max_train_steps=2)
    with pytest.raises(ValueError, match="the LoRAs of base_weights have changed"):
        train(replace(longer, base_weights=(other,)), dataset, resume=stopped.state_path)
    moved = first.rename(tmp_path / "moved.safetensors")
    assert train(replace(longer, base_weights=(moved,)), dataset, resume=stopped.state_path).num_steps == 2


def test_dropout_stays_where_the_rest_is_taken_from_weights(dataset, tmp_path):
    first = train(make_config(tmp_path / "first", max_train_steps=1), dataset).lora_path
    results = [
        train(
            make_config(
                tmp_path / str(dropout),
                network_weights=first,
                dim_from_weights=True,
                adapter=AdapterConfig(dropout=dropout),
                max_train_steps=2,
            ),
            dataset,
        )
        for dropout in (0.0, 0.5)
    ]
    assert results[0].validation_losses[2] != results[1].validation_losses[2]
    with pytest.raises(ValueError, match="leave out network_dim"):
        make_config(tmp_path, network_weights=first, dim_from_weights=True, adapter=AdapterConfig(rank=4))


def test_norms_stay_below_their_limit(dataset, tmp_path):
    config = make_config(
        tmp_path,
        adapter=AdapterConfig(rank=4, max_norm=1e-3),
        optimizer=OptimizerConfig(learning_rate=0.1),
        output={"save_precision": "fp32"},
        max_train_steps=3,
    )
    tensors = load_file(train(config, dataset).lora_path)
    norms = [
        (tensors[name.replace("lora_A", "lora_B")] @ value).norm().item()
        for name, value in tensors.items()
        if "lora_A" in name
    ]
    assert max(norms) == pytest.approx(1e-3, rel=1e-4)


def test_a_distilled_variant_warns(dataset, tmp_path, caplog):
    files = find_train_files(TINY, makes_samples=False)
    distilled = replace(files, variant=replace(TINY, distilled=True))
    train_lora(make_config(tmp_path, max_train_steps=1, preflight=False), dataset, distilled)
    assert "is distilled: a LoRA trained on it slowly undoes that" in caplog.text


def test_it_trains_inside_inference_mode(dataset, tmp_path):
    with torch.inference_mode():
        inside = train(make_config(tmp_path / "a", max_train_steps=2), dataset)
    outside = train(make_config(tmp_path / "b", max_train_steps=2), dataset)
    assert load_equal(inside.lora_path, outside.lora_path)


def test_training_leaves_the_random_numbers_of_the_process_alone(dataset, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(make_config(tmp_path, max_train_steps=2, adapter=AdapterConfig(rank=2, dropout=0.1)), dataset)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_fp32_masters(dataset, tmp_path, precision):
    config = make_config(tmp_path, mixed_precision=precision, max_train_steps=6, output={"save_precision": "fp32"})
    result = train(config, dataset)
    exact = train(replace(config, mixed_precision="no", output=OutputConfig(output_dir=tmp_path / "exact")), dataset)
    assert result.num_bad_steps == 0
    assert result.validation_losses[6] == pytest.approx(exact.validation_losses[6], rel=0.03)
    tensors = load_file(result.lora_path)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


def test_accumulated_batches_make_one_step(dataset, tmp_path):
    steps: list[TrainStep] = []
    config = make_config(tmp_path, gradient_accumulation_steps=3, max_train_epochs=2)
    result = train(config, dataset, on_step=steps.append)
    num_batches = math.ceil(len(dataset.items) / 2)
    assert result.num_steps == 2 * math.ceil(num_batches / 3) == len(steps)
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)


def test_a_step_is_the_mean_over_all_its_samples(dataset, tmp_path):
    """However they are grouped, with their weights and masks; the same written out sample by sample."""
    timesteps = TimestepConfig(weighting_scheme="cosmap")
    config = make_config(tmp_path, gradient_accumulation_steps=2, timesteps=timesteps)
    run = LoraRun(config, dataset, find_train_files(TINY, makes_samples=False), Processes(), None, False)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1]
    with StepLoader(dataset, run.order, run.processes, run.make_batch, 0, 1) as loader:
        step, num_samples, batches = next(loader)
    batches = [replace(b, mask=torch.rand(len(b.latents), *b.latents.shape[2:], generator=generator)) for b in batches]
    assert num_samples == 4 and {len(batch.references) for batch in batches} == {1, 2}
    loss = run._gradients(step, num_samples, batches)
    found = [parameter.grad.clone() for parameter in run.parameters]
    run.optimizer.zero_grad()
    rows = [batch.map(lambda t, row=row: t[row : row + 1]) for batch in batches for row in range(len(batch.latents))]
    losses = [
        velocity_losses(run.dit, r.latents, r.text, r.noise, r.sigma, references=r.references, mask=r.mask) * r.weights
        for r in rows
    ]
    expected = torch.cat(losses).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, parameter in zip(found, run.parameters, strict=True):
        assert parameter.grad.count_nonzero()
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


def test_what_is_saved_is_the_moving_average_where_one_is_asked_for(dataset, tmp_path):
    output = {"save_every_n_steps": 1, "save_precision": "fp32"}
    train(make_config(tmp_path / "plain", max_train_steps=3, output=output), dataset)
    averaged = train(make_config(tmp_path / "average", max_train_steps=3, output=output, ema_decay=0.2), dataset)
    files = [load_file(tmp_path / "plain" / f"lora{end}.safetensors") for end in ("-step00000001", "-step00000002", "")]
    for name, found in load_file(averaged.lora_path).items():
        if name.endswith("lora_B.weight"):  # which begins as zero
            expected = torch.zeros_like(found)
            for number, file in enumerate(files, start=1):
                decay = min(0.2, (1 + number) / (10 + number))
                expected = decay * expected + (1 - decay) * file[name]
            assert found.count_nonzero()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_the_learning_rate_follows_its_schedule(dataset, tmp_path):
    rates = []
    schedule = ScheduleConfig(lr_scheduler="linear", lr_warmup_steps=4)
    train(make_config(tmp_path, schedule=schedule), dataset, on_step=lambda step: rates.append(step.learning_rate))
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[-1] == pytest.approx(1.25e-4)


def test_a_step_reads_nothing_back_from_the_device(dataset, tmp_path):
    config = make_config(tmp_path, mixed_precision="bf16", ema_decay=0.9, checkpointing="blocks")
    run = LoraRun(config, dataset, find_train_files(TINY, makes_samples=False), Processes(), None, False)
    found = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().partition(".")[0] in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
                found.append(func.name())
            return func(*args, **(kwargs or {}))

    with StepLoader(dataset, run.order, run.processes, run.make_batch, 0, 2) as loader:
        for step, num_samples, batches in loader:
            with Reads():
                loss, norm = run._take_step(step, num_samples, batches)
            assert not found
            assert loss.isfinite() and norm > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_told_late_is_told_nonetheless(dataset, tmp_path, monkeypatch, lag):
    """On a GPU steps are told when the next one has been ordered: before saves, at the end and when it is stopped."""
    make = lora_recipe.StepReports
    monkeypatch.setattr(lora_recipe, "StepReports", lambda device: with_lag(make(device), lag))
    seen, losses = [], LoraRun._losses
    config = make_config(tmp_path, max_train_steps=5, max_bad_steps=2, output={"save_every_n_steps": 3})
    result = train(config, dataset, on_step=lambda step: seen.append(step.step))
    assert seen == [1, 2, 3, 4, 5] and result.num_steps == 5
    records = [record["step"] for record in read_metrics(result.metrics_path) if "loss" in record]
    assert records == seen

    def bad(self, batch):
        return losses(self, batch) * (math.nan if self.steps_done >= 2 else 1.0)

    monkeypatch.setattr(LoraRun, "_losses", bad)
    with pytest.raises(ValueError, match="not finite in 2 steps in a row, up to step 4"):
        train(replace(config, preflight=False, output=OutputConfig(output_dir=tmp_path / "bad")), dataset)
    state = load_file(tmp_path / "bad" / "lora-state" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


def with_lag(reports, lag):
    reports.lag = lag
    return reports


def test_curves_are_drawn_only_now_and_then(dataset, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_log, "draw_curves", lambda metrics, out: drawn.append(metrics.read_text().count('"loss"')))
    config = make_config(tmp_path, max_train_steps=5, preflight=False, monitor={"validate_every_n_steps": 1})
    assert train(config, dataset).curves_path is not None
    assert drawn == [1, 5]
