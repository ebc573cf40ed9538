import json
import re
import time

import pytest
import torch
from accelerate import Accelerator

from edt.runs.log import METRICS_FILE, RunLog, keep_lines_until, peak_memory, peak_operations, read_metrics


def make_log(folder, **settings) -> RunLog:
    settings = {"first_step": 0, "steps": 10, "batch_size": 8, "log_every": 2, "operations_per_image": 1e9,
                "peak_operations": 1e12, **settings}  # fmt: skip
    return RunLog(Accelerator(cpu=True), folder, **settings)


def figures(loss: float, skipped: int = 0) -> dict[str, float]:
    return {"full_loss": loss, "learning_rate": loss / 100, "skipped_steps": skipped}


def lines_of(folder) -> list[dict]:
    return read_metrics(folder / METRICS_FILE)


def test_lines_are_means_over_their_steps(tmp_path):
    log = make_log(tmp_path)
    for step, loss in enumerate((1.0, 2.0, 4.0, 8.0, 16.0), start=1):
        log.step(step, figures(loss))
    log.flush(5)
    log.flush(5)  # there is nothing more
    log.close()
    assert [(line["step"], line["full_loss"]) for line in lines_of(tmp_path)] == [(2, 1.5), (4, 6.0), (5, 16.0)]
    # The rate is that of the last step: a mean of it is nobody's.
    assert [line["learning_rate"] for line in lines_of(tmp_path)] == [0.02, 0.08, 0.16]


def test_a_flush_between_makes_no_line_twice(tmp_path):
    log = make_log(tmp_path, log_every=4)
    for step in range(1, 9):
        log.step(step, figures(float(step)))
        if step == 3:
            log.flush(step)
    log.close()
    assert [(line["step"], line["full_loss"]) for line in lines_of(tmp_path)] == [(3, 2.0), (4, 4.0), (8, 6.5)]


def test_what_is_not_finite_is_left_out(tmp_path):
    log = make_log(tmp_path)
    nan, infinite = float("nan"), float("inf")
    for step, (loss, skipped) in enumerate(((1.0, 0), (nan, 1), (nan, 2), (infinite, 3)), start=1):
        log.step(step, {**figures(loss, skipped), "learning_rate": 0.5})
    log.close()
    text = (tmp_path / METRICS_FILE).read_text()
    first, second = lines_of(tmp_path)
    assert (first["full_loss"], first["skipped_steps"]) == (1.0, 1)
    assert "full_loss" not in second
    assert second["skipped_steps"] == 3
    assert "NaN" not in text  # which is no JSON
    assert "Infinity" not in text


def test_rates(tmp_path, monkeypatch):
    """16 images in 2 s of work and 3 s of a pause: 8 a second, of 1 GFLOP each."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = make_log(tmp_path)
    for step in (1, 2):
        now[0] += 1
        if step == 1:
            with log.pause():
                now[0] += 3
        log.step(step, figures(1.0))
    log.close()
    (line,) = lines_of(tmp_path)
    assert line["images_per_second"] == pytest.approx(8)
    assert line["tflops"] == pytest.approx(8e-3)
    assert line["model_flop_utilisation"] == pytest.approx(8e-3)
    assert 0.01 < line["peak_memory_gib"] < 100


def test_of_an_unknown_device_there_is_no_utilisation(tmp_path):
    log = make_log(tmp_path, peak_operations=None, log_every=1)
    log.step(1, figures(1.0))
    log.close()
    assert "model_flop_utilisation" not in lines_of(tmp_path)[0]


def test_a_run_that_goes_on_drops_what_it_will_do_again(tmp_path):
    lines = [{"step": step, "full_loss": 1.0} for step in (2, 4, 6, 8)]
    file = tmp_path / METRICS_FILE
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "full_l')
    assert [line["step"] for line in read_metrics(file)] == [2, 4, 6, 8]
    log = make_log(tmp_path, first_step=5)
    log.step(6, figures(1.0))
    log.close()
    assert [line["step"] for line in read_metrics(file)] == [2, 4, 6]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    keep_lines_until(file, 0)
    assert file.read_text() == ""
    keep_lines_until(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_metrics_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="edt train writes it into the run's folder"):
        read_metrics(tmp_path / METRICS_FILE)
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\nstep two\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"has a line 2 that is no JSON: 'step two'"):
        read_metrics(tmp_path / METRICS_FILE)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"\xff\xfe\n{}\n", r"has a line 1 that is no JSON: '\\xff"),
        (b"[]\n", "has a line 1 that edt train did not write: it is list, not an object"),
        (b'{"step": 1}\n5\n', "has a line 2 that edt train did not write: it is int, not an object"),
        (b'{"loss": 1}\n', "has a line 1 that edt train did not write: it has no step"),
        (b'{"step": true}\n', "has a line 1 that edt train did not write: its step is True"),
        (b'{"step": 1e400}\n', "has a line 1 that edt train did not write: its step is inf"),
        (b'{"step": -1}\n', "its step is -1"),
        (b'{"step": 1' + b"0" * 30 + b"}\n", "its step is 10000"),
        (b'{"step": 1, "full_loss": "a"}\n', "full_loss is a, not a number"),
        (b'{"step": 1, "full_loss": null}\n', "full_loss is None, not a number"),
        (b'{"step": 1, "full_loss": 1' + b"0" * 400 + b"}\n", "full_loss is 10000"),
        (b'{"step": 1, "\\u001b[31m": []}\n', r"\\x1b\[31m is \[\], not a number"),
    ],
)
def test_lines_of_others(tmp_path, lines, message):
    file = tmp_path / METRICS_FILE
    file.write_bytes(lines)
    for read in (read_metrics, lambda file: keep_lines_until(file, 10)):
        with pytest.raises(ValueError, match=f"{file} has a line .*") as error:
            read(file)
        assert re.search(message, str(error.value))
        assert "\x1b" not in str(error.value)
    assert file.read_bytes() == lines


@pytest.mark.parametrize("torn", [b'{"step": 2, "full', b"\0\0\0\0", b"\xff", b"[" * 100_000, b"\0\n"])
def test_a_last_line_that_a_power_cut_tore(tmp_path, torn):
    """Of any bytes; a run that goes on drops it."""
    file = tmp_path / METRICS_FILE
    file.write_bytes(b'{"step": 1, "full_loss": NaN}\n' + torn)
    assert [line["step"] for line in read_metrics(file)] == [1]
    keep_lines_until(file, 5)
    assert file.read_text() == '{"step": 1, "full_loss": NaN}\n'


def test_the_bar(tmp_path, capsys):
    log = make_log(tmp_path, first_step=3)
    log.say("a remark")
    log.step(4, {**figures(0.25), "masked_loss": 0.5})
    log.step(5, {**figures(float("nan"), skipped=1), "masked_loss": 0.5})
    log.close()
    shown = capsys.readouterr()
    assert shown.out.strip() == "a remark"
    assert "5/10" in shown.err
    assert "masked=0.5000" in shown.err
    assert "skipped=1" in shown.err


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
     ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GB200", 2500),
     ("NVIDIA B200", 2250), ("NVIDIA GH200 480GB", 989), ("NVIDIA A10G", None), ("Tesla T4", None)],
)  # fmt: skip
def test_peaks_of_devices(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert peak_operations(device, "bfloat16") == (None if tflops is None else tflops * 1e12)
    assert peak_operations(device, "float32") is None
    assert peak_operations(torch.device("cpu"), "bfloat16") is None


def test_peak_memory_of_a_cpu():
    assert 2**24 < peak_memory(torch.device("cpu")) < 2**40
