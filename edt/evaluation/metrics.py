"""How alike two sets of images are, judged by features of them (N, F), whatever computed these."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

MAX_FEATURES = 8192  # a covariance of half a GiB, and minutes for its eigenvalues
_ROWS = 1024  # of a block of distances: 200 MB beside 50 000 others


@dataclass(frozen=True)
class Gaussian:
    """mean (F,) and covariance (F, F), float64."""

    mean: Tensor
    covariance: Tensor


class RunningGaussian:
    """μ and the unbiased C of features that come batch by batch, accumulated in float64.

    A batch of n with mean b joins N of mean m by Σ += Σ_b + (b − m)(b − m)ᵀ·N·n/(N + n) (Chan, Golub and LeVeque,
    1979), which does not cancel where the mean is large.
    """

    def __init__(self):
        self.count = 0

    def update(self, features: Tensor) -> None:
        """Takes (n, F). Raises ValueError for features that are not finite, or too many for a covariance."""
        n, F = features.shape
        if F > MAX_FEATURES:
            raise ValueError(
                f"features has {F} per image; a covariance is computed of at most {MAX_FEATURES}. Use a feature "
                "model with fewer, or smaller images"
            )
        if self.count and len(self.mean) != F:
            raise ValueError(f"features has {F} per image, and had {len(self.mean)} before; it must be as many")
        features = features.double()
        if not features.isfinite().all():
            row = int((~features.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"features of image {self.count + row} are not finite")
        if self.count == 0:
            self.mean, self.scatter = features.new_zeros(F), features.new_zeros(F, F)
        mean = features.mean(dim=0)
        centered, shift = features - mean, mean - self.mean
        self.scatter.addmm_(centered.T, centered)
        self.scatter.addr_(shift, shift, alpha=self.count * n / (self.count + n))
        self.mean += shift * (n / (self.count + n))
        self.count += n

    def result(self) -> Gaussian:
        if self.count < 2:
            raise ValueError(f"features are of {self.count} images; a covariance needs at least 2")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance of features (N, F)."""
    running = RunningGaussian()
    running.update(features)
    return running.result()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μ − μ'‖² + tr(C + C' − 2·(C·C')^½), the squared Wasserstein-2 distance of two Gaussians; FID's formula.

    With C = R·Rᵀ the eigenvalues of C·C' are those of the symmetric Rᵀ·C'·R, not negative but for rounding, and
    tr (C·C')^½ is the sum of their square roots. Covariances of fewer images than features are singular, where a
    matrix square root of C·C' (scipy.linalg.sqrtm) may come out complex or not at all.

    Raises:
        ValueError: for different numbers of features, or numbers too large for the products.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics are of {len(a.mean)} and of {len(b.mean)} features; they must be of as many")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt()  # [F, F]
    product = root.T @ b.covariance @ root
    if not product.isfinite().all():
        raise ValueError("statistics have covariances whose product is not finite")
    shared = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    if not distance.isfinite():
        raise ValueError("statistics have means or covariances too large: their distance is not finite")
    return max(float(distance), 0.0)  # rounding alone makes it negative


def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = 3, progress: bool = False
) -> tuple[float, float]:
    """Precision: the share of samples x with ‖x − r‖ ≤ d(r) for any r of the reference, where d(r) is the distance
    of r to its k-th nearest neighbour in its own set. Recall: the same with the sets exchanged.

    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.

    Args:
        samples, reference: (N, F) and (M, F) floats on one device; the work is in their dtype.
        neighbours: k.

    Raises:
        ValueError: where a set has no k-th neighbour.
    """
    if min(len(samples), len(reference)) <= neighbours:
        raise ValueError(
            f"neighbours is {neighbours}; it must be less than the number of samples, {len(samples)}, and of the "
            f"reference, {len(reference)}"
        )
    center = reference.mean(dim=0)  # cdist takes ‖x‖² + ‖y‖² − 2·x·y, which cancels less around it
    samples, reference = samples - center, reference - center
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    inside = 0
    with tqdm(
        desc="neighbours", unit="image", total=2 * len(samples) + len(reference), disable=not progress
    ) as bar:

        def radii(features: Tensor) -> Tensor:
            found = []
            for rows in features.split(_ROWS):
                # The nearest of all is the image itself.
                found.append(torch.cdist(rows, features).kthvalue(neighbours + 1, dim=1).values)
                bar.update(len(rows))
            return torch.cat(found)

        sample_radii, reference_radii = radii(samples), radii(reference)
        for rows, radius in zip(samples.split(_ROWS), sample_radii.split(_ROWS)):
            distances = torch.cdist(rows, reference)  # [rows, M]
            inside += int((distances <= reference_radii).any(dim=1).sum())
            covered |= (distances <= radius[:, None]).any(dim=0)
            bar.update(len(rows))
    return inside / len(samples), float(covered.double().mean())


class RunningInceptionScore:
    """exp of the mean of KL(p(y|x) ‖ p(y)) over a split's images, p(y) their mean of p(y|x); then the mean and
    standard deviation over splits. Logits come batch by batch; kept are sums of each split.

    Images are dealt to splits at random, because samples often come sorted by class: by the permutation that
    torch-fidelity uses, so that the figures agree.
    """

    def __init__(self, num_images: int, splits: int = 10, seed: int = 2020):
        if num_images < splits:
            raise ValueError(f"num_images is {num_images}; {splits} splits need at least one image each")
        order = np.random.RandomState(seed).permutation(num_images)
        starts = np.arange(splits) * num_images // splits
        self.split = torch.empty(num_images, dtype=torch.long)
        self.split[order] = torch.from_numpy(np.searchsorted(starts, np.arange(num_images), side="right") - 1)
        self.counts = self.split.bincount().double()
        self.seen = 0
        self.probabilities = self.negative_entropies = 0

    def update(self, logits: Tensor) -> None:
        """Takes (n, classes) of the next n images."""
        logits = logits.double().cpu()
        split = self.split[self.seen : self.seen + len(logits)]
        self.seen += len(logits)
        log_p = logits.log_softmax(dim=1)
        p = log_p.exp()
        empty = torch.zeros(len(self.counts), p.shape[1], dtype=torch.float64)
        self.probabilities = self.probabilities + empty.index_add(0, split, p)
        self.negative_entropies += empty[:, 0].index_add(0, split, (p * log_p).sum(dim=1))

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over splits."""
        mean = self.probabilities / self.counts[:, None]
        divergence = self.negative_entropies / self.counts - torch.xlogy(mean, mean).sum(dim=1)
        scores = [math.exp(value) for value in divergence.tolist()]
        return float(np.mean(scores)), float(np.std(scores))
