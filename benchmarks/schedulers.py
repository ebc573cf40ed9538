"""What other schedulers make of few steps: digits drawn by `edt.EDTPipeline`, judged.

    python -m benchmarks schedulers --checkpoint outputs/demo

Draws the same digits from the same noise with each scheduler and number of steps, with the checkpoint of `edt
demo` as it is: AMM in its blocks, no guidance. They are judged by a classifier of real digits, their spread over
that of real ones, and the Fréchet distance of pixels to held-out digits.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from edt.data.digits import NUM_CLASSES, from_uint8, load_split_digits, to_uint8
from edt.demo.judge import Judge
from edt.files.outputs import write_json
from edt.sampling.pipeline import EDTPipeline, load_pipeline
from edt.sampling.sample_set import SCHEDULERS

from .results import add_output, environment
from .tables import markdown

FILE = Path("cpu", "schedulers.json")  # in the folder of results
STEPS = (10, 15, 25)


def measure(pipe: EDTPipeline, *, num_images: int, seed: int) -> list[dict]:
    """A row for each scheduler and number of steps."""
    pipe.set_progress_bar_config(disable=True)
    released = pipe.scheduler.config
    labels = np.arange(num_images) % NUM_CLASSES
    judge, rows = Judge(load_split_digits()), []
    cases = [(scheduler, steps) for scheduler in SCHEDULERS for steps in STEPS]
    for scheduler, steps in tqdm(cases, desc="schedulers", unit="sampling", disable=None):
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(released)
        images = pipe(
            torch.from_numpy(labels),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        figures = judge.judge(from_uint8(to_uint8(images.numpy())), labels)
        rows.append({"scheduler": SCHEDULERS[scheduler], "name": scheduler, "steps": steps, **figures})
    return rows


def format_table(report: dict) -> str:
    """Markdown, with what was measured below."""
    rows = [
        [row["name"], f"`{row['scheduler']}`", f"{row['steps']}", f"{100 * row['class_accuracy']:.1f}",
         f"{row['spread_over_real']:.2f}", f"{row['frechet_distance']:.2f}"]
        for row in report["rows"]
    ]  # fmt: skip
    header = ["--scheduler", "diffusers", "steps", "class accuracy, %", "spread", "Fréchet distance"]
    settings, found = report["settings"], report["environment"]
    return "\n\n".join([
        markdown(header, rows),
        f"EDT-digits, {settings['num_images']} images of each row from the same noise, AMM on, no guidance; "
        f"commit {found['commit'][:12]}.",
    ])  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks schedulers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that edt demo wrote")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser, "file")
    options = parser.parse_args(arguments)
    if options.num_images < 2 * NUM_CLASSES:
        parser.error(f"--num-images is {options.num_images}; a spread needs {2 * NUM_CLASSES}, two of each class")
    settings = {"num_images": options.num_images, "seed": options.seed}
    found = environment(torch.device("cpu"))
    report = {
        "environment": found,
        "settings": settings,
        "rows": measure(load_pipeline(options.checkpoint), **settings),
    }
    print(format_table(report))
    path = options.out or options.results / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["schedulers", *sys.argv[1:]]))
