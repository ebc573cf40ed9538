"""The run's folder: taken by one process, with the traceback of what ended a run, and data verified once."""

import errno
import fcntl
import json
import os
import shutil

import pytest
from training_runs import (
    assert_same_run,
    forked,
    newest,
    run_to_end,
    small_arguments,
    small_config,
    write_moments,
)

from edt.cli import main
from edt.files.lock import LOCK_FILE, open_folder
from edt.runs import folder as run_folder
from edt.runs.checkpoint import list_checkpoints
from edt.runs.folder import remember_verified, verify_once
from edt.train import trainer
from edt.train.config import CONFIG_FILE
from edt.train.trainer import train

pytestmark = pytest.mark.usefixtures("_tiny_training")


@pytest.fixture
def data(tmp_path):
    return write_moments(tmp_path / "data")


def test_a_folder_is_of_one_process(data, tmp_path):
    with open_folder(tmp_path / "run"):
        with forked(small_arguments(data, tmp_path / "run"), tmp_path / "log") as run:
            assert run.wait() == [2]
        assert f"output {tmp_path / 'run'} is in use by process {os.getpid()}; give another output" in run.text()
    assert not (tmp_path / "run" / "checkpoints").exists()
    with forked(small_arguments(data, tmp_path / "run"), tmp_path / "log") as run:
        assert run.wait() == [0]


def test_a_killed_run_leaves_its_folder_free(data, tmp_path):
    arguments = small_arguments(
        data, tmp_path / "run", steps=1000, checkpoint_every=1, keep_checkpoints=1, num_workers=2
    )
    with forked(arguments, tmp_path / "log") as run:
        run.wait_for(lambda: list((tmp_path / "run").glob("checkpoints/step-*")))
        run.kill()
        train(small_config(data, tmp_path / "run", steps=2))


def test_wrong_folders(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; it must be a folder, or not there yet"):
        open_folder(tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written"):
        open_folder(tmp_path / "file" / "run")


def test_what_ends_a_run_leaves_its_traceback(data, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug in step 3")

    monkeypatch.setattr("edt.train.trainer.Trainer._backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(small_config(data, tmp_path / "run"))
    log = (tmp_path / "run" / run_folder.ERROR_FILE).read_text()
    assert "RuntimeError: a bug in step 3" in log
    assert "in step" in log


def test_data_are_verified_again_only_where_they_changed(data, tmp_path, monkeypatch):
    verified = []
    verify = run_folder.verify_dataset
    monkeypatch.setattr(run_folder, "verify_dataset", lambda *a, **k: verified.append(a) or verify(*a, **k))
    for steps, times in ((1, 1), (2, 1)):
        train(small_config(data, tmp_path / "run", steps=steps))
        assert len(verified) == times
    shard = next(data.glob("data-*.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"corrupt: .*{shard.name}"):
        train(small_config(data, tmp_path / "run", steps=3))
    content[-1] ^= 1
    shard.write_bytes(content)
    train(small_config(data, tmp_path / "run", steps=3))
    assert len(verified) == 3


def test_a_torn_memory_of_it_counts_for_nothing(data, tmp_path):
    from edt.data.dataset import open_dataset

    dataset = open_dataset(data)
    found = verify_once(dataset, tmp_path, progress=False)
    remember_verified(found, tmp_path)
    (tmp_path / "verified.json").write_text(json.dumps(found)[:-9])
    assert verify_once(dataset, tmp_path, progress=False) == found


# Read only once the folder is held


def before_the_lock(monkeypatch, action):
    """`action` happens when a run is about to take its folder."""

    def late(folder):
        monkeypatch.setattr(trainer, "open_folder", open_folder)
        action()
        return open_folder(folder)

    monkeypatch.setattr(trainer, "open_folder", late)


def test_the_checkpoint_is_chosen_once_the_folder_is_held(data, tmp_path, monkeypatch, capsys):
    """A start that another run overtakes goes on from what that one left, and throws none of it away."""
    output = tmp_path / "run"
    train(small_config(data, output, steps=2))
    quicker = small_arguments(data, output, steps=4)
    before_the_lock(monkeypatch, lambda: run_to_end(quicker, tmp_path / "log"))
    capsys.readouterr()
    assert main(small_arguments(data, output, steps=6)) == 0
    assert f"goes on from {output / 'checkpoints' / 'step-00000004'}, step 4" in capsys.readouterr().out
    assert [step for step, _ in list_checkpoints(output / "checkpoints")] == [2, 4, 6]
    for steps in (2, 4, 6):
        train(small_config(data, tmp_path / "whole", steps=steps))
    assert_same_run(output, tmp_path / "whole")


def test_a_config_that_changed_before_the_folder_was_held(data, tmp_path, monkeypatch, capsys):
    """The defaults of a command without options are the run's own, which another command may just be setting."""
    output = tmp_path / "run"
    train(small_config(data, output, steps=1))
    before_the_lock(monkeypatch, lambda: small_config(data, output, steps=3).save(output / CONFIG_FILE))
    assert main(["train", "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"edt: error: output {output} has another {CONFIG_FILE} than when this command began")
    assert main(["train", "--output", str(output)]) == 0
    assert newest(output).name == "step-00000003"


def test_an_error_before_anything_is_written_leaves_no_folder(data, tmp_path):
    """Only if the folder was not there before."""
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(ValueError, match="batch_size is 7"):
            train(small_config(data, tmp_path / name, batch_size=7, gradient_accumulation_steps=2))
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "there").iterdir()] == [LOCK_FILE]


def test_a_folder_that_is_removed_while_it_is_taken(tmp_path, monkeypatch):
    """By such an error of another run; a lock on a file that is gone would keep nobody out."""
    lockf = fcntl.lockf

    def remove_first(*args):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        shutil.rmtree(tmp_path / "run")
        lockf(*args)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with open_folder(tmp_path / "run") as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), (tmp_path / "run" / LOCK_FILE).stat())
        assert (tmp_path / "run" / LOCK_FILE).read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=os.strerror)
def test_a_file_system_without_locks(data, tmp_path, monkeypatch, capsys, code):
    """Training goes on, and says once what does not guard it."""

    def none(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", none)
    train(small_config(data, tmp_path / "run", steps=1))
    said = [line for line in capsys.readouterr().err.splitlines() if "without locks" in line]
    assert len(said) == 1
    assert said[0].startswith(f"edt: output {tmp_path / 'run'} is on a file system without locks ")


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [(errno.EIO, OSError, "cannot be locked: Input/output error"),
     (errno.EACCES, ValueError, "is in use by process unknown")],
)  # fmt: skip
def test_locks_that_fail(tmp_path, monkeypatch, code, error, message):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(error, match=f"output {tmp_path / 'run'} {message}"):
        open_folder(tmp_path / "run")


@pytest.mark.parametrize("content", [b"something of somebody's\n", b"\xff\xfe\x00"])
def test_a_lock_file_of_somebody_else_stays_as_it_is(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    open_folder(tmp_path).close()
    assert (tmp_path / LOCK_FILE).read_bytes() == content


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"data-00000.npy": 1}', "[" * 100_000, "\0\0"])
def test_a_foreign_record_of_verified_data_counts_for_nothing(data, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "verified.json").write_text(content)
    train(small_config(data, tmp_path / "run", steps=1))
    assert json.loads((tmp_path / "run" / "verified.json").read_text()).keys() == {
        path.name for path in data.glob("*.npy")
    }
