"""What step caching saves and what it costs: digits drawn with cached steps, timed and judged.

    python -m benchmarks step_cache --checkpoint outputs/demo

Draws the same digits from the same noise with each schedule, on the CPU, with the checkpoint of `edt demo` as it
is: AMM in its blocks, no guidance. The schedules take turns at each small batch, so that what else the machine
does meets all of them; a speed-up is the median over batches of the uncached time by the schedule's own. The
images of all batches are judged by a classifier of real digits, and by the Fréchet distance of pixels to held-out
digits.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import edt
from edt.data.digits import NUM_CLASSES, from_uint8, load_split_digits, to_uint8
from edt.demo.judge import Judge
from edt.files.outputs import write_json
from edt.model.complexity import sampling_multiply_adds
from edt.options import check_count

from .results import add_output, environment
from .tables import markdown

FILE = Path("cpu", "step_cache.json")  # in the folder of results
_UNCACHED = "no cache"


def schedules(num_steps: int) -> dict[str, edt.StepCacheConfig | None]:
    """By name; each n is of full steps, one in n."""
    cases = {_UNCACHED: None}
    cases |= {f"deep, uniform, n = {n}": edt.StepCacheConfig(n) for n in (1, 2, 3, 5)}
    cases |= {f"deep, non-uniform, n = {n}": edt.StepCacheConfig.non_uniform(num_steps, n) for n in (3, 5)}
    cases |= {f"encoder, uniform, n = {n}": edt.StepCacheConfig(n, reuse="encoder") for n in (2, 3, 5)}
    return cases | {"encoder, as published for DiT": edt.StepCacheConfig.faster_diffusion(num_steps)}


def draw(model: edt.EDTTransformer2DModel, config, labels: np.ndarray, num_steps: int, seed: int) -> np.ndarray:
    """Images (N, H, W, C) uint8."""
    if config is not None:
        model.enable_cache(config)
    try:
        latents = edt.sample(
            model,
            torch.from_numpy(labels),
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
    finally:
        model.disable_cache()
    return to_uint8(latents.numpy())


def measure(
    model: edt.EDTTransformer2DModel, *, num_images: int, batch_size: int, num_steps: int, seed: int
) -> dict:
    """Rows by schedule, and the figures of real held-out digits."""
    cases = schedules(num_steps)
    labels = np.arange(num_images) % NUM_CLASSES
    batches = [labels[start : start + batch_size] for start in range(0, num_images, batch_size)]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    images: dict[str, list[np.ndarray]] = {name: [] for name in cases}
    draw(model, edt.StepCacheConfig(2), batches[0], 4, seed)  # the first calls are slower
    with tqdm(total=len(batches) * len(cases), desc="step cache", unit="sampling", disable=None) as bar:
        for number, batch in enumerate(batches):
            for name, config in cases.items():
                begun = time.perf_counter()
                images[name].append(draw(model, config, batch, num_steps, seed + number))
                seconds[name].append(time.perf_counter() - begun)
                bar.update()

    judge = Judge(load_split_digits())
    uncached = sampling_multiply_adds(model, num_steps)
    rows = {}
    for name, config in cases.items():
        ratios = [full / own for full, own in zip(seconds[_UNCACHED], seconds[name], strict=True)]
        rows[name] = {
            "full_steps": num_steps if config is None else sum(map(config.is_full, range(num_steps))),
            "fewer_multiply_adds": uncached / sampling_multiply_adds(model, num_steps, config),
            "speedup": statistics.median(ratios),
            "speedup_quartiles": [float(np.quantile(ratios, q)) for q in (0.25, 0.75)],
            "seconds_per_batch": statistics.median(seconds[name]),
            **judge.judge(from_uint8(np.concatenate(images[name])), labels),
        }
    return {"schedules": rows, "real_held_out": judge.judge_real()}


def format_table(report: dict) -> str:
    """Markdown, with what was measured below."""
    lines = [
        [
            name,
            f"{row['full_steps']}",
            f"{row['fewer_multiply_adds']:.2f}×",
            f"{row['speedup']:.2f}×",
            f"{100 * row['class_accuracy']:.1f}",
            f"{row['frechet_distance']:.3f}",
        ]
        for name, row in report["schedules"].items()
    ]
    real, settings, found = report["real_held_out"], report["settings"], report["environment"]
    lines.append(["real digits", "", "", "", f"{100 * real['class_accuracy']:.1f}",
                  f"{real['frechet_distance']:.3f}"])  # fmt: skip
    header = ["reused", f"full steps of {settings['num_steps']}", "fewer multiply-adds", "faster",
              "class accuracy, %", "Fréchet distance"]  # fmt: skip
    return "\n\n".join([
        markdown(header, lines),
        f"EDT-digits on {found['device']}, threads: {found['threads']}, torch {found['versions']['torch']}, "
        f"commit {found['commit'][:12]}: {settings['num_images']} images of each row from the same noise, AMM on, "
        f"no guidance, batches of {settings['batch_size']}; faster by the median over batches, taking turns.",
    ])  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks step_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that edt demo wrote")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser, "file")
    options = parser.parse_args(arguments)
    if options.num_images < 2 * NUM_CLASSES:
        parser.error(f"--num-images is {options.num_images}; a spread needs {2 * NUM_CLASSES}, two of each class")
    for name in ("batch_size", "num_steps"):
        check_count(name, getattr(options, name))
    model = edt.load_checkpoint(options.checkpoint)
    settings = {name: getattr(options, name) for name in ("num_images", "batch_size", "num_steps", "seed")}
    found = environment(torch.device("cpu"))
    report = {"environment": found, "settings": settings, **measure(model, **settings)}
    print(format_table(report))
    path = options.out or options.results / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["step_cache", *sys.argv[1:]]))
