"""Faster sampling without training: what some denoising steps compute, the steps after them reuse."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edt_kernels._checks import shown

REUSES = ("deep", "encoder")

_FIRST_POWER, _POWER_STEP = 1.2, 0.02
_MOST_STEPS = 10_000  # far beyond the 1999 of a scheduler of second order


@dataclass(frozen=True)
class StepCacheConfig:
    """Which steps of a sampling are computed in full, and what the steps between reuse of the last full one.

    Steps count from 0, the noisiest. Give either `interval` or `full_steps`.

    Args:
        interval: step i is full where i mod interval = 0; 1 reuses nothing.
        full_steps: the full steps, increasing, the first of them 0.
        num_steps: of the sampling, if it is known; a longer one raises. With `full_steps`, whose last one would
            else serve every step that follows.
        reuse: what is reused.

            - "deep": the tokens before the last skip joins them. A step between computes the conditioning, the
              patch embedding and, from that skip on, the last split, the last stage and the final layer: 38 to
              40 % of the multiply-adds. After DeepCache (arXiv 2312.00858).
            - "encoder": what leaves the middle stage, and the skip into stage 3. A step between computes the
              conditioning, the patch embedding, which is the other skip, and the decoder: 55 to 58 %. After
              Faster Diffusion (arXiv 2312.09608), step by step, without its noise injection.

    Raises:
        TypeError, ValueError: for values that do not fit.
    """

    interval: int | None = None
    full_steps: tuple[int, ...] | None = None
    num_steps: int | None = None
    reuse: Literal["deep", "encoder"] = "deep"

    def __post_init__(self) -> None:
        if not isinstance(self.reuse, str) or self.reuse not in REUSES:
            raise ValueError(f"reuse is {shown(self.reuse)}; it must be one of {', '.join(map(repr, REUSES))}")
        if (self.interval is None) == (self.full_steps is None):
            raise ValueError(
                f"interval is {shown(self.interval)} and full_steps is {shown(self.full_steps)}; give one "
                "of the two"
            )
        if self.num_steps is not None:
            _check_positive("num_steps", self.num_steps)
        if self.interval is not None:
            _check_positive("interval", self.interval)
            return
        steps = self.full_steps
        if not isinstance(steps, tuple) or not all(type(step) is int for step in steps):
            raise TypeError(f"full_steps is {shown(steps)}; it must be a tuple of integers")
        if steps[:1] != (0,) or any(a >= b for a, b in pairwise(steps)) or steps[-1] >= _MOST_STEPS:
            raise ValueError(
                f"full_steps is {shown(steps)}; it must begin with 0 and increase, to below {_MOST_STEPS}"
            )
        if self.num_steps is not None and steps[-1] >= self.num_steps:
            raise ValueError(f"full_steps has {steps[-1]}; of {self.num_steps} num_steps the last is one less")

    @classmethod
    def non_uniform(
        cls,
        num_steps: int,
        interval: int,
        *,
        center: int | None = None,
        reuse: Literal["deep", "encoder"] = "deep",
    ) -> "StepCacheConfig":
        """⌈num_steps/interval⌉ full steps, closest to each other around step `center`.

        Full are step 0 and center + ⌊Re zᵖ⌋ (towards 0) for the inner points z of a linspace in the complex plane
        from (−center)^(1/p) to (num_steps − center)^(1/p). p starts at 1.2 and falls by 0.02 until as many of
        these steps differ as are needed; at p = 1 they would be evenly spaced.

        Args:
            num_steps: of the sampling.
            interval: of which the full steps' number is that of a uniform schedule.
            center: 0 to num_steps − 1; by default 30 % of the steps, the published 15 of 50.

        Raises:
            ValueError: also where no p above 1 gives that many steps.

        Source: DeepCache (arXiv 2312.00858) and its authors' code, whose powers of negative numbers are complex.
        """
        _check_positive("num_steps", num_steps)
        _check_positive("interval", interval)
        center = round(0.3 * num_steps) if center is None else center
        if type(center) is not int or not 0 <= center < num_steps:
            raise ValueError(f"center is {shown(center)}; it must be a step, 0 to {num_steps - 1}")
        count = -(-num_steps // interval)
        power = _FIRST_POWER
        while power > 1:
            first, last = (complex(end) ** (1 / power) for end in (-center, num_steps - center))
            offsets = (np.linspace(first, last, count + 1) ** power).real.astype(int)
            steps = (0, *(center + int(offset) for offset in np.unique(offsets)[1:-1]))
            if len(steps) == count:
                return cls(full_steps=steps, num_steps=num_steps, reuse=reuse)
            power -= _POWER_STEP
        raise ValueError(
            f"interval is {interval}; around center {center} there are no {count} different steps of {num_steps}, "
            "give another center or a uniform interval"
        )

    @classmethod
    def faster_diffusion(cls, num_steps: int) -> "StepCacheConfig":
        """Reuses the encoder in the steps i with 1 ≤ i ≤ 229/250·num_steps and i mod 10 < 6; all others are full.

        As published for DiT at 250 steps; for others the range is scaled and the rhythm of ten steps stays.
        Source: Faster Diffusion (arXiv 2312.09608).
        """
        _check_positive("num_steps", num_steps)
        last = 229 * num_steps // 250
        full = tuple(i for i in range(num_steps) if not (1 <= i <= last and i % 10 < 6))
        return cls(full_steps=full, num_steps=num_steps, reuse="encoder")

    def is_full(self, step: int) -> bool:
        return step % self.interval == 0 if self.interval is not None else step in (self.full_steps or ())


class Features(NamedTuple):
    """What a step takes over from an earlier one; None is computed anew."""

    middle: Tensor | None = None  # (B, N/16, C2), out of the middle stage
    skip: Tensor | None = None  # (B, N/4, C1), into stages 1 and 3
    expanded: Tensor | None = None  # (B, N/4, 4·C4), before the last skip joins


NOTHING = Features()


class StepCache:
    """Where a sampling stands, and the features of its last full step."""

    def __init__(self, config: StepCacheConfig):
        self.config = config
        self.reset()

    def reset(self) -> None:
        """The next step is the first, and nothing is stored."""
        self.step, self.features, self.inputs = 0, NOTHING, None

    @torch.compiler.disable()  # a graph of its own for each step number would be compiled
    def begin_step(self, inputs: object) -> Features:
        """Counts a step and returns what it reuses, `NOTHING` for a full one.

        Full is also a step whose `inputs`, such as (shape, dtype, device), are not equal to those of the stored
        features. What is not reused is let go before its successor is computed.
        """
        if self.step == self.config.num_steps:
            raise ValueError(
                f"the step cache is for {self.step} steps and this is one more; a new sampling begins with "
                "reset_cache()"
            )
        if self.config.is_full(self.step) or inputs != self.inputs:
            self.features, self.inputs = NOTHING, inputs
        self.step += 1
        return self.features

    def store(self, middle: Tensor | None, skip: Tensor | None, expanded: Tensor | None) -> None:
        """Keeps what later steps reuse."""
        deep = self.config.reuse == "deep"
        self.features = Features(expanded=expanded) if deep else Features(middle, skip)


def _check_positive(name: str, value: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} is {shown(value)}; it must be an integer")
    if not 1 <= value <= _MOST_STEPS:
        raise ValueError(f"{name} is {shown(value)}; it must be 1 to {_MOST_STEPS}")
