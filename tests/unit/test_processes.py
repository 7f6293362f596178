"""Several processes of one launch: what accelerate was told, and hosts that talk beside their devices."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from flux2_kit.training.processes import Processes, join_processes, launcher_precision
from torch import distributed


@pytest.mark.parametrize(
    ("environment", "precision"),
    [
        ({}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"}, "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16"),
    ],
)
def test_the_precision_that_accelerate_was_told_is_taken(environment, precision):
    assert launcher_precision(environment) == precision


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8; allowed are no, fp16 and bf16"),
        ({"ACCELERATE_USE_FSDP": "true"}, "told to use FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "told to use DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "give --compile"),
    ],
)
def test_what_accelerate_was_told_and_is_not_done_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        launcher_precision(environment)


def test_alone_nothing_is_joined():
    with join_processes("cpu") as alone:
        assert (alone.count, alone.is_main, alone.any(True), alone.any(False)) == (1, True, True, False)
        assert torch.equal(alone.sum_(torch.ones(2)), torch.ones(2))
        alone.barrier()
        assert not distributed.is_initialized()


def test_hosts_talk_without_the_group_of_the_devices():
    """A sum over the devices' group would make the host wait for its device."""
    processes = Processes(count=2, device=torch.device("meta"), device_group="devices")
    with mock.patch.object(distributed, "all_reduce") as all_reduce:
        assert processes.any(True) and not processes.any(False)
        processes.barrier()
        processes.sum_(torch.ones(3, device="meta"))
    calls = [(call.args[0].device.type, call.kwargs["group"]) for call in all_reduce.call_args_list]
    assert calls == [("cpu", None)] * 3 + [("meta", "devices")]


def test_a_process_that_has_lost_the_others_says_so():
    processes = Processes(index=1, count=2)
    with (
        mock.patch.object(distributed, "all_reduce", side_effect=RuntimeError("Connection closed by peer")),
        pytest.raises(ValueError, match=r"process 1 of 2 lost the others: .*Connection closed"),
    ):
        processes.any(False)
    with (
        mock.patch.object(distributed, "all_reduce", side_effect=torch.OutOfMemoryError("none left")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        processes.any(False)
