"""EDT on the CPU against its plain transcription: `python -m benchmarks.cpu_model`.

Times the forward pass (evaluation mode, AMM on) and a masked training step (full and masked pass, both losses,
backward; no optimiser, which would be the same for both) of `edt.EDTTransformer2DModel` and of
`benchmarks.plain.PlainEDT` with the same weights and inputs, in float32. Both are first checked to agree, outputs
and gradients. The two run in turn, the order changing each round, so that a busy machine slows both; what counts
is the median of each and their ratio.

Work: 2.667 G multiply-adds per EDT-S/2 forward and sample; a training step is 2 forwards and 2 backwards, 6 times
that.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

import edt
from edt.checkpoint import to_released_state_dict
from edt.diffusion import add_noise

from .plain import PlainEDT

PRESET = "EDT-S/2"
MAX_RELATIVE_ERROR = 1e-5
OUT = Path(__file__).parent / "results" / "cpu" / "model.json"


def build_pair() -> tuple[edt.EDTTransformer2DModel, PlainEDT]:
    """Our model and the transcription with the same random weights, none of them zero."""
    torch.manual_seed(0)
    ours = edt.load_preset(PRESET, class_dropout_prob=0.0)  # the two would draw other labels
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    plain = PlainEDT(amm_blocks=ours.config.amm_blocks, class_dropout_prob=0.0)
    missing, unexpected = plain.load_state_dict(to_released_state_dict(ours), strict=False)
    if unexpected or not all(name.endswith("pos_embed") for name in missing):
        raise RuntimeError(f"the two models differ in parameters: {missing}, {unexpected}")
    return ours, plain


class Task:
    """One batch, and what each model does with it."""

    def __init__(self, ours: edt.EDTTransformer2DModel, plain: PlainEDT, batch_size: int):
        self.x_start, self.noise = torch.randn(2, batch_size, 4, 32, 32)
        self.timestep = torch.randint(0, 1000, (batch_size,))
        self.labels = torch.randint(0, 1000, (batch_size,))
        self.keep_masks = ours.draw_keep_masks(batch_size)
        self.models = {"plain": plain, "ours": ours}

    def predict(self, name: str, latents, keep_masks=None):
        if name == "plain":
            return self.models[name](latents, self.timestep, self.labels, keep_masks or (None, None))
        return self.models[name](latents, self.timestep, self.labels, keep_masks).sample

    def forward(self, name: str):
        self.models[name].eval()
        with torch.no_grad():
            return self.predict(name, self.x_start)

    def train_step(self, name: str):
        model = self.models[name].train()
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for keep_masks in (None, self.keep_masks):
            noised = add_noise(self.x_start, self.noise, self.timestep)
            output = self.predict(name, noised, keep_masks)
            loss = loss + edt.training_losses(output, self.x_start, self.noise, self.timestep)["loss"].mean()
        loss.backward()
        return loss.detach()


def check_agreement(task: Task) -> dict[str, float]:
    """Relative errors (max |difference| / max |plain|) of the prediction, the loss and the worst gradient."""

    def error(actual, expected) -> float:
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    errors = {
        "forward": error(task.forward("ours"), task.forward("plain")),
        "loss": error(task.train_step("ours"), task.train_step("plain")),
    }
    plain_gradients = dict(task.models["plain"].named_parameters())
    ours = task.models["ours"]
    gradients = to_released_state_dict(ours, {name: p.grad for name, p in ours.named_parameters()})
    errors["gradient"] = max(error(grad, plain_gradients[name].grad) for name, grad in gradients.items())
    if max(errors.values()) > MAX_RELATIVE_ERROR:
        raise RuntimeError(f"the two models disagree: {errors}")
    return errors


def time_in_turn(run, repeats: int, description: str) -> dict[str, list[float]]:
    """Seconds per call of run("plain") and run("ours"), after two rounds that are not counted."""
    seconds = {"plain": [], "ours": []}
    for i in tqdm(range(-2, repeats), desc=description):
        for name in ("plain", "ours") if i % 2 else ("ours", "plain"):
            start = time.perf_counter()
            run(name)
            elapsed = time.perf_counter() - start
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict:
    row = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        row[f"{name}_ms"] = {
            "median": 1e3 * median,
            "quartiles": [1e3 * low, 1e3 * high],
            "min": 1e3 * min(values),
        }
    row["ratio"] = row["plain_ms"]["median"] / row["ours_ms"]["median"]
    row["ratio_of_each_round"] = statistics.quantiles(
        (plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)), n=4
    )
    return row


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    sources = [":/edt", ":/edt_kernels", ":/benchmarks/*.py"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", *sources], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30, help="rounds of the forward; a third of it of the step")
    parser.add_argument("--threads", type=int, default=None, help="torch's, by default all it would take")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.batch_size < 1 or args.repeats < 6:
        parser.error("--batch-size must be at least 1 and --repeats at least 6")
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    ours, plain = build_pair()
    task = Task(ours, plain, args.batch_size)
    errors = check_agreement(task)
    rows = {
        "forward": summarize(time_in_turn(task.forward, args.repeats, "forward")),
        "training step": summarize(time_in_turn(task.train_step, args.repeats // 3, "training step")),
    }
    print(f"{PRESET}, batch {args.batch_size}, float32, {torch.get_num_threads()} CPU threads, medians in ms")
    print(f"{'':15}{'plain':>18}{'ours':>18}{'plain / ours':>16}")
    for what, row in rows.items():
        cells = [
            f"{row[key]['median']:8.1f} ± {(row[key]['quartiles'][1] - row[key]['quartiles'][0]) / 2:6.1f}"
            for key in ("plain_ms", "ours_ms")
        ]
        print(f"{what:15}{cells[0]:>18}{cells[1]:>18}{row['ratio']:>16.3f}")
    result = {
        "preset": PRESET,
        "batch_size": args.batch_size,
        "dtype": "float32",
        "device": "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "relative_errors": errors,
        "results": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
