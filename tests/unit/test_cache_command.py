"""``flux2 cache``: what it tells, which weights it takes, and what it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flux2_kit.flux2_core.variants import VARIANTS
from flux2_kit.flux2_core.weights import find_weights
from flux2_kit.training.cache import open_cache
from flux2_kit.training.cache_command import ProgressBar
from flux2_kit.training.cli import main
from flux2_kit.training.dataset import list_dataset, load_dataset_config
from PIL import Image

TINY = VARIANTS["tiny"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two pictures with captions, and their settings."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed, name in enumerate(("a", "b")):
        values = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    file = tmp_path / "set.toml"
    file.write_text('[general]\nresolution = [64, 64]\n[[datasets]]\nimage_directory = "pictures"\n')
    return file


@pytest.fixture
def run(config, capsys):
    def run(what: str, *options: str, code: int = 0) -> str:
        assert main([what, "--dataset_config", str(config), "--device", "cpu", *options]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def test_both_caches_are_filled_once(run, config):
    folder = config.parent / "pictures" / "flux2_cache"
    assert run("cache") == f"latents: 2 encoded, 0 kept in {folder}\ntext: 3 encoded, 0 kept in {folder}\n"
    assert run("cache-latents") == f"latents: 0 encoded, 2 kept in {folder}\n"
    assert run("cache-text") == f"text: 0 encoded, 3 kept in {folder}\n"
    assert run("cache-text", "--no-skip_existing", "--batch_size", "2").startswith("text: 3 encoded, 0 kept")
    assert len(open_cache(list_dataset(load_dataset_config(config)), TINY).items) == 2


def test_pruning_tells_what_was_deleted(run, config):
    run("cache")
    (config.parent / "pictures" / "b.txt").write_text("edited")
    assert run("cache", "--prune").endswith("pruned: 1 files, 0.0 MB\n")


def test_other_datasets_are_told_when_pruning(run, config, capsys):
    run("cache")
    config.write_text(config.read_text().replace("64", "80"))
    assert main(["cache-latents", "--dataset_config", str(config), "--prune", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "pruned: 0 files" in said.out
    assert "the files of 1 other datasets" not in said.out and "other datasets, settings or encoders" in said.err


def test_weights_that_are_given(run, random_tiny_files):
    vae, text_encoder = str(random_tiny_files.autoencoder), str(random_tiny_files.text_encoder)
    assert run("cache-latents", "--vae", vae, "--vae_dtype", "bfloat16").startswith("latents: 2 encoded")
    assert run("cache-latents", "--vae", vae, "--vae_dtype", "bf16").startswith("latents: 0 encoded")
    assert run("cache-text", "--text_encoder", text_encoder).startswith("text: 3 encoded")
    assert run("cache", "--vae", vae, "--text_encoder", text_encoder).startswith("latents: 2 encoded")


def test_what_is_refused(run, tmp_path):
    text_encoder = str(find_weights(TINY, "text_encoder"))
    dit = str(find_weights(TINY, "dit"))
    for options, message in (
        (("cache", "--text_encoder", text_encoder), "without --vae it is looked up by variant"),
        (("cache-text", "--model_version", "klein-5b"), "--model_version is 'klein-5b'; allowed are dev, klein-4b"),
        (("cache-text", "--models_dir", str(tmp_path)), "tiny comes with the package"),
        (("cache-text", "--models_dir", str(tmp_path / "none")), "is no folder"),
        (("cache-latents", "--vae", str(tmp_path / "none")), "none does not exist"),
        (("cache-latents", "--vae", dit), "not a FLUX.2 autoencoder"),
        (("cache-text", "--text_encoder", dit), "not a FLUX.2 text encoder"),
        (("cache-text", "--text_encoder", text_encoder, "--model_version", "klein-4b"), "needs Qwen/Qwen3-4B"),
        (("cache", "--batch_size", "0"), "batch_size is 0"),
    ):
        said = run(*options, code=1)
        assert message in said and "internal error" not in said, said


def test_options_of_musubi_tuner(config, capsys):
    common = ["--dataset_config", str(config), "--device", "cpu", "--batch_size", "2", "--num_workers", "1"]
    common += ["--skip_existing", "--keep_cache", "--model_version", "tiny"]
    vae, text_encoder = (str(find_weights(TINY, name)) for name in ("autoencoder", "text_encoder"))
    assert main(["cache-latents", *common, "--vae", vae, "--vae_dtype", "float32"]) == 0
    assert main(["cache-text", *common, "--text_encoder", text_encoder]) == 0
    assert capsys.readouterr().err.count("--keep_cache has no effect: cached files stay unless --prune is given") == 2


def test_options_of_musubi_tuner_that_are_refused(run):
    said = run("cache-latents", "--debug_mode", "image", "--disable_cudnn_backend", code=1)
    assert "--debug_mode is not supported: `flux2 dataset FILE --preview sheet.png` draws" in said
    assert "--disable_cudnn_backend is not supported" in said
    assert "--fp8_text_encoder is not supported: leave it out" in run("cache-text", "--fp8_text_encoder", code=1)
    assert "--prune and --keep_cache contradict each other" in run("cache", "--prune", "--keep_cache", code=1)


def test_the_bar_follows_each_kind_of_work(capsys):
    bar = ProgressBar(is_shown=False)
    bar.show("pictures encoded", 1, 2)
    first = bar.bar
    bar.show("pictures encoded", 2, 2)
    assert bar.bar is first
    bar.show("captions encoded", 1, 1)
    assert bar.bar is not first
    bar.close()
    assert bar.bar is None and not capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo over TCP")
def test_processes_of_one_launch_share_the_work(config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "flux2_kit.training", "cache", "--device", "cpu"]
    processes = [
        subprocess.Popen(
            [*command, "--dataset_config", str(config)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert "latents: 2 encoded, 0 kept" in first and "text: 3 encoded, 0 kept" in first and not second
    assert len(open_cache(list_dataset(load_dataset_config(config)), TINY).items) == 2
