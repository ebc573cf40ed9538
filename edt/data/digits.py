"""Real handwritten digits."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

NUM_CLASSES = 10
LEVELS = 16  # the scans have grey levels 0 to 16


@dataclass(frozen=True)
class Digits:
    """8×8 grey digits on the scale −1 (paper) to 1 (ink): images (N, 1, 8, 8) float32, labels (N,) int64."""

    train_images: ndarray
    train_labels: ndarray
    held_out_images: ndarray
    held_out_labels: ndarray


def load_split_digits() -> Digits:
    """scikit-learn's 1797 digits: a stratified 80 % to train on, the rest held out to judge by.

    The split is the same for every seed, so that the figures of two runs compare.
    """
    from sklearn.datasets import load_digits  # not needed to train on anything else
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / (LEVELS / 2) - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    train_images, held_out_images, train_labels, held_out_labels = train_test_split(
        images, labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=0
    )
    return Digits(train_images, train_labels, held_out_images, held_out_labels)


def to_uint8(images: ndarray) -> ndarray:
    """(N, C, H, W) on the scale −1 to 1, clipped → (N, H, W, C) uint8, 0 to 255.

    Raises:
        ValueError: for numbers that are not finite, of which any picture could be made.
    """
    if not np.isfinite(images).all():
        raise ValueError("images have numbers that are not finite")
    scaled = np.round((np.clip(images, -1, 1) + 1) * 127.5)
    return scaled.astype(np.uint8).transpose(0, 2, 3, 1)


def from_uint8(images: ndarray) -> ndarray:
    """(N, H, W, C) uint8 → (N, C, H, W) float32 on the scale −1 to 1."""
    return (images.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
