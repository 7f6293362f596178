"""What the train command does with signals, and what it shows of a run."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys

import pytest
from flux2_kit.training.train_command import STOP_SIGNALS, progress_bar, stop_on_signal
from flux2_kit.training.train_progress import TrainStep

posix = pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX systems send them")


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_collected_and_the_handlers_come_back(name):
    number = getattr(signal, name)
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with stop_on_signal() as received:
        send(number)
        assert received == [number]
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


@posix
def test_a_second_ctrl_c_interrupts_and_a_second_request_to_end_does_not():
    with stop_on_signal() as received:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert received == [signal.SIGTERM] * 2


@posix
@pytest.mark.parametrize(("name", "is_heard"), [("SIGHUP", False), ("SIGINT", True)])
def test_nohup_is_obeyed_and_a_job_in_the_background_can_be_stopped(name, is_heard):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signal() as received:
            send(number)
        assert received == ([number] if is_heard else [])
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(first: int, last: int):
    for step in range(first, last + 1):
        yield TrainStep(
            step=step,
            num_steps=last,
            epoch=1,
            loss=0.5,
            average_loss=0.4321,
            learning_rate=1e-4,
            seconds_per_step=20.0,
            seconds_left=20.0 * (last - step),
        )


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    with progress_bar(True) as show:
        assert sys.stderr.getvalue() == "", "shown before anything was done"
        for step in steps(8, 12):
            show(step)
    lines = [line for line in sys.stderr.getvalue().replace("\n", "\r").split("\r") if line.strip()]
    assert "8/12" in lines[1] and "12/12" in lines[-1] and "loss 0.4321, lr 1.00e-04" in lines[-1]
    assert "20.0" in lines[1], "the time of the first step counts"
    assert max(map(len, lines)) <= 80


def test_without_a_terminal_there_is_a_line_now_and_then(caplog):
    with caplog.at_level(logging.INFO, "flux2_kit"), progress_bar(True) as show:
        for step in steps(1, 100):
            show(step)
    assert len(caplog.messages) == 20
    assert caplog.messages[-1].startswith("step 100/100, loss 0.4321, 20.0 s/step, 0:00 left")


def test_processes_beside_the_main_one_show_nothing(caplog):
    with caplog.at_level(logging.INFO, "flux2_kit"), progress_bar(False) as show:
        for step in steps(1, 3):
            show(step)
    assert not caplog.messages
