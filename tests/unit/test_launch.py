"""``flux2 generate --from_file`` in several processes: the same files as in one, and one answer for all."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from flux2_kit.flux2_core import generate_command
from flux2_kit.flux2_core import launch as launch_module
from flux2_kit.flux2_core.cli import build_parser, main
from flux2_kit.flux2_core.file_stems import claim_stem
from flux2_kit.flux2_core.launch import Launch, join_launch
from flux2_kit.flux2_core.variants import VARIANTS

FAILS_IN_THE_SECOND = """
import os, sys
from flux2_kit.flux2_core import generate_command
from flux2_kit.flux2_core.cli import main

show, calls = generate_command.show_step, []

def fail_once(*args):
    calls.append(args)
    if os.environ["RANK"] == "1" and len(calls) == 1:
        raise ValueError("this one fails")
    show(*args)

generate_command.show_step = fail_once
sys.exit(main(sys.argv[1:]))
"""


def by_seed(folder: Path) -> dict[str, bytes]:
    return {re.sub(r"^\d{8}-\d{6}", "T", path.name): path.read_bytes() for path in sorted(folder.iterdir())}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(command: list[str], count: int = 2) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    port = free_port()
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def test_two_processes_write_the_files_of_one_and_a_failure_is_everyones(random_tiny_files, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one --d 1\ntwo --d 2\nthree --d 3\nfour --d 4\nfive --d 5\n")
    options = ["generate", *random_tiny_files.options, "--device", "cpu", "--infer_steps", "1", "--output_type"]
    options += ["latent_images", "--from_file", str(prompts), "--save_path"]
    assert main([*options, str(tmp_path / "one")]) == 0
    first, second = launch(["-c", FAILS_IN_THE_SECOND, *options, str(tmp_path / "two")])
    assert (first[0], second[0]) == (1, 1)
    one, two = by_seed(tmp_path / "one"), by_seed(tmp_path / "two")
    assert len(one) == 10
    # The second process has every other line, and its first picture fails; what comes after is made.
    assert two == {name: data for name, data in one.items() if "_2" not in name}
    assert "prompts.txt:2: this one fails" in second[2]
    assert "4 of 5 lines done by 2 processes" in first[2] and "done by" not in second[2]
    assert sorted(re.findall(r"_(\d)\.png", second[1])) == ["4"]


def test_what_cannot_be_shared_is_refused():
    for request in (["--prompt", "x"], ["--interactive"], ["--latent_path", "x"], ["--save_merged_model", "x"]):
        args = build_parser().parse_args(["generate", *request])
        with pytest.raises(ValueError, match=r"2 processes were started.*give --from_file"):
            generate_command.generate(args, Launch(index=1, count=2))


def test_one_process_tells_of_a_bad_line(tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo --w 100\n")
    args = build_parser().parse_args(["generate", "--from_file", str(prompts)])
    for tells in (False, True):
        jobs, num_bad = generate_command.read_jobs(args, VARIANTS["tiny"], tells=tells)
        assert (len(jobs), num_bad, "prompts.txt:2" in caplog.text) == (1, 1, tells)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; start several"),
        ({"WORLD_SIZE": "many"}, "must be whole numbers"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK is 2",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "asked for by MPI or `accelerate launch --cpu`"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"},
            "or `accelerate launch --multi_gpu",
        ),
    ],
)
def test_an_environment_of_half_a_launch_is_refused(environment, message):
    with pytest.raises(ValueError, match=message), join_launch(environment):
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come_are_not_waited_for(monkeypatch, rank):
    monkeypatch.setattr(launch_module, "LONGEST_JOIN", timedelta(seconds=1))
    environment = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": free_port()}
    for name, value in environment.items():  # torch reads them itself
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"process {rank} of 2 waited 0:00:01 for the others"), join_launch():
        pass
    assert not torch.distributed.is_initialized()


def test_alone_nothing_is_joined():
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0"}):
        with join_launch(environment) as alone:
            assert (alone.index, alone.count, alone.share([1, 2]), alone.total(3)) == (0, 1, [1, 2], 3)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "informs"), [(None, True), ("0", True), ("1", False)])
def test_one_process_informs_and_all_warn(monkeypatch, capsys, rank, informs):
    def speak(_args) -> int:
        logger = logging.getLogger(generate_command.__name__)
        logger.info("plan")
        logger.warning("danger")
        return 0

    def add_command(commands, common) -> None:
        commands.add_parser("speak", parents=[common]).set_defaults(run=speak)

    monkeypatch.setenv("RANK", rank) if rank is not None else monkeypatch.delenv("RANK", raising=False)
    assert main(["speak"], add_command) == 0
    said = capsys.readouterr().err
    assert ("plan" in said) == informs and "danger" in said


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    third = Launch(index=6, count=8, local_index=2)
    assert third.share(list("abcdefghijklmno")) == ["g", "o"]
    assert third.device_name(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    names = [third.device_name(name) for name in (None, "cuda", "cuda:0", "cpu")]
    assert names == ["cuda:2", "cuda:2", "cuda:0", "cpu"]
    assert Launch().device_name(None) is None
    with join_launch({"ACCELERATE_USE_CPU": "True"}) as alone:  # accelerate launch --cpu
        assert [alone.device_name(name) for name in (None, "cuda")] == ["cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 3 on this machine has no GPU of its own, there are 2"):
        third.device_name(None)


def test_names_are_claimed_before_files_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    names, start = [], threading.Barrier(4)

    def claim() -> None:
        start.wait()
        for _ in range(10):
            with claim_stem(tmp_path, "7") as stem:
                assert not (tmp_path / f"{stem}.png").exists()
                names.append(stem)
                (tmp_path / f"{stem}.png").touch()

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == len(names) == 40
    assert all(path.suffix == ".png" for path in tmp_path.iterdir())
