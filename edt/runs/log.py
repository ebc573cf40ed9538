"""What a training run says of itself: a progress bar, metrics.jsonl, trackers."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..files.outputs import new_file
from ..files.text import printable

METRICS_FILE = "metrics.jsonl"

# Dense bfloat16 matrix rate in TFLOP/s with float32 accumulation, from NVIDIA's data sheets; the first name that
# is part of the device's name counts.
_PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "RTX A6000": 155,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_operations(device: torch.device, precision: str) -> float | None:
    """Operations a second that the device's data sheet promises, None where it is not known."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    # Of whole words: an A10G is no A10.
    matches = (tflops for known, tflops in _PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    return next((tflops * 1e12 for tflops in matches), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class RunLog:
    """Figures of steps → their means over `log_every` steps, as lines of metrics.jsonl and to the trackers."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        first_step: int,
        steps: int,
        batch_size: int,
        log_every: int,
        operations_per_image: float,
        peak_operations: float | None,
    ):
        self.accelerator, self.batch_size, self.log_every = accelerator, batch_size, log_every
        self.operations_per_image, self.peak_operations = operations_per_image, peak_operations
        self.file = folder / METRICS_FILE
        self.window: list[dict[str, float]] = []
        self.window_start = time.perf_counter()
        self.main = accelerator.is_main_process
        if self.main:
            keep_lines_until(self.file, first_step)
        self.shown = self.main and sys.stderr is not None and sys.stdout is not None
        with self._display():
            # Of a bar in a file each state stays.
            seconds = 0.1 if sys.stderr is not None and sys.stderr.isatty() else 10
            self.bar = tqdm(total=steps, initial=first_step, desc="training", unit="step", disable=not self.shown,
                            mininterval=seconds)  # fmt: skip

    @contextmanager
    def _display(self) -> Iterator[None]:
        """A terminal that is gone, or a pipe's reader, ends what is shown and not the run."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: of a closed file
            self.shown = False

    def say(self, text: str) -> None:
        if self.shown:
            with self._display():
                self.bar.write(text)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Of the step that made `step` of them; figures that are not finite are left out of means."""
        self.window.append(figures)
        if self.shown:
            with self._display():
                self.bar.set_postfix(self._postfix(figures), refresh=False)
                self.bar.update()
        if step % self.log_every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes the line of the steps since the last one."""
        if not self.window:
            return
        line = {"step": step, **self._means(), **self._rates()}
        self.window, self.window_start = [], time.perf_counter()
        if self.main:
            try:
                with self.file.open("a") as lines:
                    lines.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OSError(f"{self.file} cannot be written: {error.strerror or error}") from error
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens within, such as sampling, is left out of images/s."""
        start = time.perf_counter()
        yield
        self.window_start += time.perf_counter() - start

    def close(self) -> None:
        if self.shown:
            with self._display():
                self.bar.close()

    def _means(self) -> dict[str, float]:
        means = {}
        for name in self.window[-1]:
            values = [figures[name] for figures in self.window if math.isfinite(figures[name])]
            if name in ("skipped_steps", "learning_rate"):  # not of the window: as they are now
                means[name] = self.window[-1][name]
            elif values:
                means[name] = sum(values) / len(values)
        return means

    def _rates(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.window_start, 1e-9)
        images = len(self.window) * self.batch_size / seconds
        rates = {
            "images_per_second": images,
            "peak_memory_gib": peak_memory(self.accelerator.device) / 2**30,
        }
        achieved = images * self.operations_per_image / self.accelerator.num_processes
        rates["tflops"] = achieved / 1e12  # of each device
        if self.peak_operations:
            rates["model_flop_utilisation"] = achieved / self.peak_operations
        return rates

    def _postfix(self, figures: dict[str, float]) -> dict[str, str]:
        rates = self._rates()
        shown = {name.removesuffix("_loss"): f"{figures[name]:.4f}" for name in figures if name.endswith("_loss")}
        shown["lr"] = f"{figures['learning_rate']:.1e}"
        shown["images/s"] = f"{rates['images_per_second']:.0f}"
        if "model_flop_utilisation" in rates:
            shown["MFU"] = f"{rates['model_flop_utilisation']:.0%}"
        shown["GiB"] = f"{rates['peak_memory_gib']:.1f}"
        if figures["skipped_steps"]:
            shown["skipped"] = f"{figures['skipped_steps']:.0f}"
        return shown


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a kill or a power cut tore, at the end, is left out.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a line that is not one of ours, but the last where it is no JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; edt train writes it into the run's folder")
    lines = file.read_bytes().splitlines()  # not as one text: a torn line may be of any bytes
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                text = printable(line[:80].decode(errors="backslashreplace"))
                raise ValueError(f"{file} has a line {number} that is no JSON: '{text}'") from error
            break
        if fault := _fault(metrics[-1]):
            raise ValueError(f"{file} has a line {number} that edt train did not write: {fault}")
    return metrics


def _fault(line) -> str | None:
    """What keeps a JSON value from being figures of a step."""
    if not isinstance(line, dict):
        return f"it is {type(line).__name__}, not an object"
    if type(line.get("step")) is not int or not 0 <= line["step"] < 2**63:
        return "it has no step" if "step" not in line else f"its step is {str(line['step'])[:40]}"
    for name, value in line.items():
        huge = type(value) is int and abs(value) > sys.float_info.max
        if type(value) not in (int, float) or huge:
            return f"{printable(name)[:40]} is {printable(value)[:40]}, not a number that it could have written"
    return None


def keep_lines_until(file: Path, step: int) -> None:
    """Drops the lines of steps after `step`: a run that goes on from a checkpoint computes them again."""
    if file.is_file():
        kept = [line for line in read_metrics(file) if line["step"] <= step]
        with new_file(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
