"""How generated digits are judged against real ones."""

import numpy as np
import torch
from numpy import ndarray

from ..data.digits import LEVELS, Digits
from ..evaluation import metrics
from ..evaluation.metrics import gaussian


class Judge:
    """Measures images against real digits; knows only real training images, except to state what real is.

    - class accuracy: share of images that a support vector machine, fitted to the real training digits,
      takes for their label.
    - spread of a class: standard deviation of each pixel, averaged over pixels, over that of the real held-out
      digits of the class; 0 where all images are equal, about 1 where they vary as real ones do.
    - copies: d(x) is the root mean square difference of x from the nearest training image. x is an exact copy
      if it has that image's grey levels, a near copy if d(x) is below the least distance between any two
      different real digits. Held-out digits show what d is for new images of the same kind.
    """

    def __init__(self, digits: Digits):
        from sklearn.svm import SVC

        self.digits = digits
        # The settings of scikit-learn's own digits example, on this scale: γ = 0.001·8².
        self.classifier = SVC(gamma=0.001 * (LEVELS / 2) ** 2).fit(
            digits.train_images.reshape(len(digits.train_images), -1), digits.train_labels
        )
        real = np.concatenate([digits.train_images, digits.held_out_images])
        self.copy_threshold = float(_nearest_distances(real, real, exclude_self=True).min())
        self.held_out_distances = _nearest_distances(digits.held_out_images, digits.train_images)

    def accuracy(self, images: ndarray, labels: ndarray) -> float:
        return float(self.classifier.score(images.reshape(len(images), -1), labels))

    def judge(self, images: ndarray, labels: ndarray) -> dict:
        """Figures for images (N, 1, 8, 8) on the scale −1 to 1, with labels (N,); at least two a class."""
        distances = _nearest_distances(images, self.digits.train_images)
        spread = self._spread(images, labels)
        return {
            "images": len(images),
            "class_accuracy": self.accuracy(images, labels),
            "spread_over_real": float(np.mean(spread)),
            "smallest_class_spread_over_real": float(np.min(spread)),
            "exact_copies": _count_exact_copies(images, self.digits.train_images),
            "near_copies": int((distances < self.copy_threshold).sum()),
            "median_distance_to_training": float(np.median(distances)),
            "frechet_distance": frechet_distance(images, self.digits.held_out_images),
            # 1 % for real held-out digits, by definition.
            "share_nearer_than_real_1st_percentile": float(
                (distances < np.percentile(self.held_out_distances, 1)).mean()
            ),
        }

    def judge_real(self) -> dict:
        """The same figures where they make sense for the real held-out digits."""
        return {
            "images": len(self.digits.held_out_images),
            "class_accuracy": self.accuracy(self.digits.held_out_images, self.digits.held_out_labels),
            "median_distance_to_training": float(np.median(self.held_out_distances)),
            "frechet_distance": frechet_distance(self.digits.train_images, self.digits.held_out_images),
            "smallest_distance_to_training": float(self.held_out_distances.min()),
            "near_copy_threshold": self.copy_threshold,
        }

    def _spread(self, images: ndarray, labels: ndarray) -> list[float]:
        """Per class of `labels`."""

        def of_class(images, labels, c):
            return images[labels == c].std(axis=0, ddof=1).mean()

        real = (self.digits.held_out_images, self.digits.held_out_labels)
        return [float(of_class(images, labels, c) / of_class(*real, c)) for c in np.unique(labels)]


def frechet_distance(images: ndarray, others: ndarray) -> float:
    """Of the pixels' means and covariances: FID without a network."""
    return metrics.frechet_distance(*(gaussian(torch.from_numpy(x).flatten(1)) for x in (images, others)))


def _nearest_distances(images: ndarray, others: ndarray, exclude_self: bool = False) -> ndarray:
    """Root mean square difference of each image from the nearest of the others: (len(images),)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (images, others))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    if exclude_self:
        np.fill_diagonal(squared, np.inf)
    return np.sqrt(squared.min(axis=1).clip(min=0) / a.shape[1])


def _count_exact_copies(images: ndarray, originals: ndarray) -> int:
    def levels(x: ndarray) -> ndarray:
        return np.round((x.reshape(len(x), -1) + 1) * (LEVELS / 2)).astype(np.int64)

    known = {row.tobytes() for row in levels(originals)}
    return sum(row.tobytes() in known for row in levels(images))
