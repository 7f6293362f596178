"""``flux2 cache`` and ``flux2 train`` from the command line: alone, stopped by a signal, and in two processes."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flux2_kit.training.cli import main
from flux2_kit.training.train_options import GROUPS, NETWORK_ARGS, add_train_options, train_config
from lora_training import write_pictures
from safetensors.torch import load_file

MUSUBI_OPTIONS = """
config_file dataset_config sdpa flash_attn sage_attn xformers flash3 split_attn compile compile_backend compile_mode
compile_dynamic compile_fullgraph compile_cache_size_limit cuda_allow_tf32 cuda_cudnn_benchmark dynamo_backend
dynamo_mode dynamo_fullgraph dynamo_dynamic max_train_steps max_train_epochs max_data_loader_n_workers
persistent_data_loader_workers seed gradient_checkpointing gradient_checkpointing_cpu_offload
gradient_accumulation_steps mixed_precision save_precision logging_dir log_with log_prefix log_tracker_name
wandb_run_name log_tracker_config wandb_api_key log_config ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph
sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts optimizer_type optimizer_args learning_rate
max_grad_norm lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_scheduler_type lr_scheduler_args fp8_base blocks_to_swap
use_pinned_memory_for_block_swap block_swap_h2d_only block_swap_ring_size img_in_txt_in_offloading
disable_numpy_memmap guidance_scale timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean
logit_std mode_scale min_timestep max_timestep preserve_distribution_shape num_timestep_buckets show_timesteps
no_metadata network_weights network_module network_dim network_alpha network_dropout network_args training_comment
dim_from_weights scale_weight_norms base_weights base_weights_multiplier output_dir output_name resume
save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state save_last_n_steps
save_last_n_steps_state save_state save_state_on_train_end metadata_title metadata_author metadata_description
metadata_license metadata_tags metadata_reso metadata_arch huggingface_repo_id huggingface_repo_type
huggingface_path_in_repo huggingface_token huggingface_repo_visibility save_state_to_huggingface
resume_from_huggingface async_upload dit vae vae_dtype fp8_scaled text_encoder fp8_text_encoder model_version
"""
COMMAND = [sys.executable, "-m", "flux2_kit.training"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FAST = ["--device", "cpu", "--mixed_precision", "no", "--network_dim", "4", "--learning_rate", "1e-3", "--no-preflight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures, cached."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures", 7)
    assert main(["cache", "--dataset_config", str(folder), "--device", "cpu"]) == 0
    return folder


def options(folder: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--dataset_config", str(folder), "--output_dir", str(out), *FAST, *more]


def config_of(folder: Path, path: Path, batch_size: int) -> Path:
    path.write_text(
        f'[general]\nresolution = 64\nenable_bucket = true\nbatch_size = {batch_size}\ncaption_extension = ".txt"\n'
        f"[[datasets]]\nimage_directory = '{folder}'\n"
    )
    return path


def test_a_folder_is_cached_and_trained_without_any_config(folder, tmp_path, capsys):
    assert main(options(folder, tmp_path, "--max_train_steps", "3", "--output_name", "style")) == 0
    shown = capsys.readouterr().out.split()
    assert shown == [str(tmp_path / "style.safetensors"), str(tmp_path / "style-curves.png")]
    assert len(load_file(shown[0])) == 2 * 24
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "style-curves.png", "style-metrics.jsonl", "style.safetensors",
    ]  # fmt: skip


def test_a_toml_holds_the_options_and_the_command_line_wins(folder, tmp_path):
    file = tmp_path / "train.toml"
    file.write_text(
        f"dataset_config = '{folder}'\n[network]\nnetwork_dim = 2\nnetwork_args = ['exclude_patterns=[\"single\"]']\n"
        "[run]\nmax_train_steps = 2\nlearning_rate = 1e-3\nsdpa = true\n"
    )
    name = str(file.with_suffix(""))  # musubi-tuner's documents leave the suffix out
    command = ["train", "--config_file", name, "--output_dir", str(tmp_path), "--network_dim", "3"]
    assert main([*command, "--device", "cpu"]) == 0
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {3}
    assert not any("single" in name for name in tensors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_train_step = 3", "max_train_step', which is no option of train"),
        ("max_train_steps = 'many'", "max_train_steps is 'many'; it must be a whole number"),
        ("network_dim = true", "network_dim is True; it must be a whole number"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "sets seed twice"),
        ("lr_scheduler = 'adafactor'", "'adafactor' is not available; use lr_scheduler constant; optimizer_type"),
        ("lr_scheduler = 'cosin'", "'cosin' is not available; use one of constant, constant_with_warmup"),
        ("timestep_sampling = 'flux_shift'", "timestep_sampling is 'flux_shift'; allowed are flux2, flux2_shift"),
        ("sage_attn = true", "it has no backward pass"),
        ("network_module = 'networks.loha'", "'networks.loha'; known: lora"),
        ("network_args = ['conv_dim=4']", "'conv_dim=4', which is not supported: a DiT has no convolutions"),
        ("network_args = ['conv=4']", "'conv=4'; give name=value with one of include_patterns"),
        ("seed = ", "is not valid TOML"),
    ],
)
def test_a_wrong_toml_is_told_before_anything_is_loaded(folder, tmp_path, caplog, text, message):
    file = tmp_path / "train.toml"
    file.write_text(text)
    assert main(["train", "--config_file", str(file), "--dataset_config", str(folder)]) == 1
    assert message in caplog.text


def test_every_option_of_musubi_tuner_is_taken_or_refused_with_a_reason():
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    known = {action.dest for action in parser._actions}
    assert [name for name in MUSUBI_OPTIONS.split() if name not in known] == []


def test_what_is_not_here_is_refused_all_at_once_unless_it_is_off(folder, tmp_path, caplog):
    more = ["--xformers", "--dynamo_backend", "NO", "--huggingface_repo_id", "me/lora"]
    assert main(options(folder, tmp_path, *more)) == 1
    for part in ("--xformers is not", "--dynamo_backend is not supported: give --compile", "upload the output folder"):
        assert part in caplog.text
    assert train_config({"xformers": False, "split_attn": None}) == train_config({})


def test_a_picture_that_is_not_cached_is_told(folder, tmp_path, caplog):
    copy = write_pictures(tmp_path / "pictures", 2)
    assert main(options(copy, tmp_path / "out")) == 1
    assert "run `flux2 cache-latents" in caplog.text or "Run `flux2 cache" in caplog.text
    assert not (tmp_path / "out").exists()


def test_every_option_reaches_its_setting():
    given = {"int": 7, "float": 0.25, "bool": True, "str": "x", "Path": "y"}
    for group in GROUPS.values():
        for option in group:
            if option.name in ("max_train_steps", "seed", "network_dim", "ema_decay", "network_dropout", "output_name"):
                value = given["float"] if option.name in ("ema_decay", "network_dropout") else 7
                value = "x" if option.name == "output_name" else value
                config = train_config({option.name: value})
                for part in option.setting.split("."):
                    config = getattr(config, part)
                assert config == value, option.name
    config = train_config(
        {"network_args": ["factor=4", "use_dora=False", "loraplus_lr_ratio=16"], "min_timestep": "100"}
    )
    assert (config.adapter.lokr_factor, config.adapter.dora, config.loraplus_lr_ratio) == (4, False, 16.0)
    assert config.timesteps.min_sigma == pytest.approx(0.1)
    config = train_config(
        {"base_weights": ["a", "b"], "base_weights_multiplier": [1, "0.5"], "scale_weight_norms": "1"}
    )
    assert (config.base_weights, config.base_weights_multiplier) == ((Path("a"), Path("b")), (1.0, 0.5))
    assert config.adapter.max_norm == 1
    for wrong, text in (
        ({"base_weights": "a", "base_weights_multiplier": [1, 2]}, "has 2 numbers for 1 base_weights; give one for"),
        ({"scale_weight_norms": 0}, "must be above 0, such as 1, got 0"),
        ({"scale_weight_norms": 1, "network_module": "lokr"}, "norms are limited for plain LoRA alone"),
        ({"scale_weight_norms": 1, "optimizer_type": "schedulefree"}, "would break the averages"),
    ):
        with pytest.raises(ValueError, match=text):
            train_config(wrong)
    config = train_config({"vae_dtype": "bfloat16", "save_precision": "float", "optimizer_args": []})
    assert (config.autoencoder_precision, config.output.save_precision) == ("bf16", "fp32")
    assert set(NETWORK_ARGS) >= {"include_patterns", "exclude_patterns", "loraplus_lr_ratio"}


def test_a_place_for_logs_switches_tensorboard_on():
    assert train_config({"logging_dir": "logs"}).monitor.log_with == "tensorboard"
    assert train_config({"logging_dir": "logs", "log_with": "wandb"}).monitor.log_with == "wandb"
    with pytest.raises(ValueError, match="wandb_run_name is a, which has no effect without log_with"):
        train_config({"wandb_run_name": "a"})


def test_show_timesteps_draws_and_trains_nothing(folder, tmp_path, capsys):
    out = tmp_path / "timesteps.png"
    assert main(options(folder, tmp_path / "out", "--show_timesteps", str(out))) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and not (tmp_path / "out").exists()
    assert main(options(folder, tmp_path / "out", "--show_timesteps", "image")) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora-timesteps.png"]
    config = config_of(folder, tmp_path / "data.toml", 1)
    config.write_text(config.read_text() + "num_repeats = 3\nvalidation_fraction = 0.3\n")
    capsys.readouterr()
    assert main(options(config, tmp_path / "none", "--show_timesteps", "console")) == 0
    shown = capsys.readouterr().out
    assert "all 15 samples of an epoch" in shown and not (tmp_path / "none").exists()  # 2 of 7 are held out


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX systems send them")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_and_resume_goes_on(folder, tmp_path, number, code):
    command = options(folder, tmp_path / "parts", "--max_train_steps", "400")
    process = subprocess.Popen([*COMMAND, *command], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: count_lines(tmp_path / "parts" / "lora-metrics.jsonl") >= 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"go on with --resume {tmp_path / 'parts' / 'lora-state'}" in errors
    (saved,) = (tmp_path / "parts").glob("lora-step*.safetensors")
    num_steps = int(saved.stem.removeprefix("lora-step"))
    more = ["--max_train_steps", str(num_steps + 2)]
    assert main(options(folder, tmp_path / "parts", *more, "--resume", str(tmp_path / "parts" / "lora-state"))) == 0
    assert main(options(folder, tmp_path / "whole", *more)) == 0
    parts, whole = (load_file(tmp_path / name / "lora.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX systems")
def test_a_killed_run_goes_on_from_its_last_save(folder, tmp_path):
    more = ["--max_train_steps", "400", "--save_every_n_steps", "2", "--save_state"]
    process = subprocess.Popen([*COMMAND, *options(folder, tmp_path / "parts", *more)], env=ENVIRONMENT)
    state = tmp_path / "parts" / "lora-state"
    wait_for((state / "state.safetensors").exists, process)
    process.kill()
    process.wait()
    assert not list(state.glob(".*")) or (state / "state.safetensors").exists()
    steps = [int(path.stem.removeprefix("lora-step")) for path in (tmp_path / "parts").glob("lora-step*.safetensors")]
    end = ["--max_train_steps", str(max(steps) + 3)]
    assert main(options(folder, tmp_path / "parts", *end, "--resume", str(state))) == 0
    assert main(options(folder, tmp_path / "whole", *end)) == 0
    parts, whole = (load_file(tmp_path / name / "lora.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_two_processes_with_half_the_batch_learn_what_one_learns(folder, tmp_path, random_tiny_files):
    half, whole = config_of(folder, tmp_path / "half.toml", 2), config_of(folder, tmp_path / "whole.toml", 4)
    # Not Adam, which makes noise of gradients that are all rounding; and random weights, since the trained ones of the
    # bundled model lose ten times as much to rounding on the way back.
    more = ["--max_train_steps", "4", "--save_precision", "fp32", "--optimizer_type", "torch.optim.SGD"]
    more += ["--learning_rate", "10", "--dit", str(random_tiny_files.dit)]
    for config in (half, whole):
        assert main(["cache", "--dataset_config", str(config), "--device", "cpu"]) == 0
    assert main(options(whole, tmp_path / "one", *more)) == 0
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*COMMAND, *options(half, tmp_path / "two", *more)],
            env={
                **ENVIRONMENT,
                **{"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"},
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, two = (load_file(tmp_path / name / "lora.safetensors") for name in ("one", "two"))
    for factor in ("lora_A", "lora_B"):
        expected, actual = (
            torch.cat([tensor.flatten() for name, tensor in sorted(lora.items()) if factor in name])
            for lora in (one, two)
        )
        assert expected.norm() > 0.01
        assert (actual - expected).norm() <= 1e-5 * expected.norm(), factor


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the command ended by itself"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
