"""Two processes with half the batch each: what one learns, and they end together, however that comes about."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux2_kit.training.adapters import AdapterConfig
from flux2_kit.training.config import TrainConfig
from flux2_kit.training.optimizers import OptimizerConfig
from lora_training import cached, make_config, make_dataset, train, write_pictures
from safetensors.torch import load_file

BOTH = """
import json, os, sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from flux2_kit.training import samples
from flux2_kit.training.lora_recipe import LoraRun
from flux2_kit.training.processes import join_processes
from lora_training import train
from test_several_processes import few_steps, make_edits, run_config

folder = Path(sys.argv[1])
found = {}
with join_processes("cpu") as processes:
    dataset = make_edits(folder / "edits", 2)
    train(run_config(folder / "two", folder / "prompts.txt"), dataset, processes=processes)

    # One of them is asked to stop.
    seen = []
    stopped = train(
        few_steps(folder / "asked"), dataset, processes=processes, on_step=seen.append,
        should_stop=lambda: processes.index == 1 and len(seen) == 2,
    )
    found["asked"] = [stopped.stopped, stopped.num_steps]

    # One of them is stopped in its sample picture; the other has none to make.
    config = run_config(folder / "picture", folder / "prompt.txt")
    stopped = train(
        replace(config, max_train_steps=8), dataset, processes=processes,
        should_stop=lambda: (folder / "picture" / "lora-state").exists() and processes.index == 0,
    )
    found["picture"] = [stopped.stopped, stopped.num_steps]
    # What torch keeps of the group for ever; torch.optim imports it while training.
    from torch.distributed.nn import functional
    found["kept"] = functional.broadcast.__defaults__
    (folder / f"found{processes.index}.json").write_text(json.dumps(found))

    # One of them fails.
    take_step = LoraRun._gradients

    def fail(run, step, *args):
        if processes.index == 1 and step == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return take_step(run, step, *args)

    LoraRun._gradients = fail
    train(few_steps(folder / "failed"), dataset, processes=processes)
"""


def make_edits(folder: Path, batch_size: int):
    """Eleven pictures of two sizes with one or two references: the last batches are short, some have one sample."""
    if not folder.exists():
        write_pictures(folder, 11, num_references=(1, 2))
    return cached(
        make_dataset(
            folder,
            control_directory=folder / "references",
            batch_size=batch_size,
            validation_fraction=0.2,
            caption_dropout=0.2,
            flip=True,
        )
    )


def run_config(folder: Path, prompts: Path) -> TrainConfig:
    """Not Adam, which makes noise of gradients that are all rounding."""
    return make_config(
        folder,
        max_train_steps=6,
        gradient_accumulation_steps=2,
        ema_decay=0.9,
        optimizer=OptimizerConfig(optimizer_type="torch.optim.SGD", learning_rate=0.3),
        adapter=AdapterConfig(rank=4),
        output={"save_precision": "fp32", "save_every_n_steps": 3, "save_state": True},
        monitor={"sample_prompts": prompts, "sample_every_n_steps": 3},
    )


def few_steps(folder: Path) -> TrainConfig:
    return make_config(folder, max_train_steps=8, preflight=False)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """The folder of what both processes did, with exit code and errors of each."""
    folder = tmp_path_factory.mktemp("several")
    make_edits(folder / "edits", 4)
    (folder / "prompts.txt").write_text("a red circle --s 2\na blue star --s 2 --d 3\na green ring --s 2 --d 4\n")
    (folder / "prompt.txt").write_text("a red circle --s 2\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH, str(folder), str(Path(__file__).parent)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return folder, [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def test_they_learn_what_one_learns_with_the_whole_batch(ended, tmp_path):
    folder, _ = ended
    one = train(run_config(tmp_path, folder / "prompts.txt"), make_edits(folder / "edits", 4))
    expected, actual = load_file(tmp_path / "lora.safetensors"), load_file(folder / "two" / "lora.safetensors")
    assert expected.keys() == actual.keys()
    for factor in ("lora_A", "lora_B"):
        first, second = (
            torch.cat([tensor.flatten() for name, tensor in sorted(lora.items()) if factor in name])
            for lora in (expected, actual)
        )
        assert first.norm() > 0.01
        assert (second - first).norm() <= 2e-6 * first.norm(), factor
    names = [
        sorted(path.name for path in place.iterdir()) for place in (tmp_path / "sample", folder / "two" / "sample")
    ]
    assert names[0] == names[1] and len(names[0]) == 6 == len(one.samples)


def test_they_stop_after_the_same_step_when_one_is_asked_to(ended):
    folder, _ = ended
    assert [json.loads((folder / f"found{rank}.json").read_text())["asked"] for rank in range(2)] == [[True, 2]] * 2
    assert (folder / "asked" / "lora-step00000002.safetensors").exists()


def test_they_stop_together_when_one_is_stopped_in_its_picture(ended):
    folder, _ = ended
    assert [json.loads((folder / f"found{rank}.json").read_text())["picture"] for rank in range(2)] == [[True, 3]] * 2


def test_torch_keeps_no_threads_that_abort_a_process_at_its_end(ended):
    folder, _ = ended
    assert [json.loads((folder / f"found{rank}.json").read_text())["kept"] for rank in range(2)] == [[None]] * 2


def test_when_one_fails_the_other_ends_with_what_was_learned(ended):
    folder, (first, second) = ended
    assert first[0] == second[0] == 1
    assert "process 0 of 2 lost the others: one of them has ended" in first[1]
    assert "can't allocate memory" in second[1] and "lost the others" not in second[1]
    assert (folder / "failed" / "lora-state" / "state.safetensors").exists()
