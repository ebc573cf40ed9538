"""Random numbers that depend on what they are for, not on what was drawn before: the ground of exact resume."""

import numpy as np
import torch

# What a generator is for, the second number of its key (seed, purpose, …).
INITIAL_WEIGHTS, ALIGNMENT_HEAD, STEP, SAMPLES = 1, 2, 3, 4


def keyed_seed(*key: int) -> int:
    """A seed of 63 bits for a key of non-negative integers, such as (seed, step, rank)."""
    # SeedSequence mixes well: neighbouring keys give unrelated seeds, which seed + step does not.
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def keyed_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator on `device` that draws the same numbers for the same key, whatever ran before."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))
