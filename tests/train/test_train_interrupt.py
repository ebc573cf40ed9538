"""Signals: what stops a run between two steps, what does not, and what acts at once."""

import multiprocessing
import os
import signal
import subprocess
from functools import partial

import pytest
from training_runs import forked, newest, small_arguments, state_of, write_moments

from edt.data.dataset import make_loader, open_dataset
from edt.interrupt import stop_on_interrupt
from edt.runs.log import read_metrics

pytestmark = pytest.mark.usefixtures("_tiny_training")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    assert {number: signal.getsignal(number) for number in NUMBERS[:2]} == {n: before[n] for n in NUMBERS[:2]}
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_is_a_request(number):
    with stop_on_interrupt() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@pytest.mark.parametrize("second", NUMBERS[:2])
def test_the_second_acts_at_once(second):
    with stop_on_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)


def test_a_closing_terminal_sends_several(capsys):
    """Its kernel and its shell a SIGHUP each, and systemd SIGTERM before it; none of them ends a step."""
    with stop_on_interrupt() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err.count("stopping after this step") == 1


def test_a_signal_after_another_process_asked_to_stop():
    """A scheduler signals all processes: one may hear of it from another before its own signal comes."""
    with stop_on_interrupt() as stop:
        stop.requested = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop


def test_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_interrupt() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_terminal_that_is_gone_keeps_no_signal_from_being_heard(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    for stream in (os.fdopen(write, "w"), None):
        monkeypatch.setattr("sys.stderr", stream)
        with stop_on_interrupt() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop
    monkeypatch.undo()


def test_workers_leave_signals_to_the_main_process(tmp_path):
    loader = make_loader(
        open_dataset(write_moments(tmp_path / "data")), seed=0, start=0, stride=1, batch_size=1, num_workers=1
    )
    others = multiprocessing.active_children()  # of earlier tests
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(others)
    for number in NUMBERS:
        assert subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True).returncode == 0
    for _ in range(10):
        next(batches)
    assert worker.is_alive()
    worker.terminate()  # as multiprocessing does at exit
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes(tmp_path, nohup):
    """The steps done are saved, also with workers, which are in the terminal's group; under nohup it goes on."""
    arguments = small_arguments(
        write_moments(tmp_path / "data"), tmp_path / "run", steps=16 if nohup else 4000, checkpoint_every=4000,
        log_every=1, num_workers=1,
    )  # fmt: skip
    heed = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    with forked(arguments, tmp_path / "log", patch=heed) as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        run.wait_for(lambda: metrics.is_file() and len(read_metrics(metrics)) >= 2)
        run.signal(signal.SIGHUP)
        assert run.wait() == [0 if nohup else 130], run.text()
    steps = state_of(newest(tmp_path / "run"))["steps"]
    assert steps == 16 if nohup else 2 <= steps < 4000
