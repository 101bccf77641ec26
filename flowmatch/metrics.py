"""Distances between sets of samples, straightness of a flow, and the features that images need.

Two exact, independent sets already differ: every distance here is to be read beside the distance of
real data to real data at the same number of samples (`floor`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowmatch import noise
from flowmatch.config import UserError

WIDEST = 4096  # features of a Frechet distance: their covariance matrix takes a cubic time


class _Features(nn.Module):
    """A feature module as torchmetrics wants it: `num_features`, and a float64 matrix."""

    def __init__(self, module: nn.Module | None, num_features: int):
        super().__init__()
        self.module, self.num_features = module, num_features

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.module is None else self.module(x)
        return out.flatten(1).double()


def frechet(real: Tensor, fake: Tensor, features: nn.Module | None, batch: int = 256) -> float:
    """Measure the Frechet distance between Gaussian fits of two sets' features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in
    float64 by torchmetrics. real, fake: [N, ...]. features: a module x -> [B, num_features] with an int
    `num_features`, run in eval mode, `batch` samples at a time; None takes the values themselves.
    Raises UserError for fewer than two samples, non-finite ones, or too many features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    width = real[0].numel() if features is None else int(features.num_features)  # type: ignore[arg-type]
    if width > WIDEST:
        raise UserError(f"a Frechet distance on {width} values a sample; use a feature module")
    if real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) < 2:
        raise UserError(
            f"a Frechet distance between {list(real.shape)} and {list(fake.shape)}; expected two or "
            "more samples each, of one shape"
        )
    # No sync: one rank may score alone while others of its process group do something else.
    metric = FrechetInceptionDistance(
        _Features(features, width), normalize=True, sync_on_compute=False
    ).to(real.device)
    was_training = features is not None and features.training
    metric.eval()
    try:
        for x, is_real in ((real, True), (fake, False)):
            if not x.isfinite().all():
                raise UserError(f"the {'real' if is_real else 'generated'} samples hold NaN or inf")
            for part in x.split(batch):
                metric.update(part.to(real.device), real=is_real)
    finally:
        if features is not None:
            features.train(was_training)
    return max(0.0, float(metric.compute()))


def floor(real: Tensor, distance: Callable[[Tensor, Tensor], float]) -> tuple[float, int]:
    """Measure a distance between two disjoint halves of the real data: (distance, n of a half).

    real: [N, ...] in random order (as `data.reference` gives it).
    """
    n = len(real) // 2
    return distance(real[:n], real[n : 2 * n]), n


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Measure the sliced Wasserstein-2 distance of two sets: the root of the mean square.

    (Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures.) a, b: [N, ...] with the
    same N; the directions depend on seed alone. Float64. Raises UserError for unequal shapes.
    """
    if a.shape != b.shape or not len(a):
        raise UserError(
            f"a sliced Wasserstein distance between {list(a.shape)} and {list(b.shape)}; expected as "
            "many samples in both, of one shape"
        )
    a, b = a.flatten(1).double(), b.flatten(1).double()
    drawn = noise.normal(seed, range(projections), (a.shape[1],), noise.DIRECTIONS)
    directions = functional.normalize(torch.from_numpy(drawn).double(), dim=1).to(a.device)
    total = 0.0
    for part in directions.split(32):  # 32 columns of N values at a time
        gap = (a @ part.T).sort(dim=0).values - (b @ part.T).sort(dim=0).values
        total += float(gap.square().mean(dim=0).sum())
    return (total / projections) ** 0.5


@torch.no_grad()
def straightness(
    v: Callable[..., Tensor],
    x0: Tensor,
    cond: dict[str, Tensor] | None = None,
    *,
    steps: int = 50,
    batch: int = 256,
    span: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Estimate how far a flow's own paths are from straight lines; 0 is straight.

    span: the times between which v is valid, if not all.

    S = mean_i E|(x1 - x0) - v(x_ti, ti)|^2 over an Euler path of `steps` uniform steps (arXiv
    2209.03003, section 2.2). v(x, t), or v(x, t, cond) where cond is given; x0: [N, ...] noise; cond:
    tensors [N]. Returns `straightness`, summed over a sample's values, and `normalised`, divided by
    E|x1 - x0|^2. Raises UserError for fewer than 50 steps.
    """
    if steps < 50:
        raise UserError(f"straightness on a path of {steps} steps; use 50 or more")
    variance = distance = 0.0
    for start in range(0, len(x0), batch):
        x = (1 - span[0]) * x0[start : start + batch]
        given = () if cond is None else ({k: c[start : start + batch] for k, c in cond.items()},)
        # x1 - x0 is the mean of the path's velocities, S their variance: Welford's running moments
        mean, moment = torch.zeros_like(x, dtype=torch.float64), 0.0
        for i in range(steps):
            velocity = v(x, span[0] + (span[1] - span[0]) * i / steps, *given)
            gap = velocity.double() - mean
            mean += gap / (i + 1)
            moment += float((gap * (velocity.double() - mean)).sum())
            x = x + (span[1] - span[0]) * velocity / steps
        variance += moment / steps
        distance += float(mean.square().sum())
    return {
        "straightness": variance / len(x0),
        "normalised": variance / distance if distance else 0.0,
    }


class Classifier(nn.Module):
    """A small convolutional classifier whose last hidden layer serves as features.

    forward(x: [B, C, H, W]) -> features [B, num_features]; logits(x) -> [B, classes].
    """

    def __init__(self, shape: tuple[int, ...], classes: int, num_features: int = 64):
        """shape: (C, H, W); sides are halved until they are at most 7, six times at most."""
        super().__init__()
        channels, high, wide = shape
        self.num_features = num_features
        layers: list[nn.Module] = []
        for width in (16, 32, 64, 64, 64, 64, 64):
            if layers:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                high, wide = (high + 1) // 2, (wide + 1) // 2
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
            if max(high, wide) <= 7:
                break
        layers += [nn.Flatten(), nn.Linear(channels * high * wide, num_features)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(num_features, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of x."""
        return self.body(x)

    def logits(self, x: Tensor) -> Tensor:
        """Give the class scores of x."""
        return self.head(self.body(x))


def train_classifier(
    data: Any, seed: int, *, steps: int = 1500, batch: int = 64, lr: float = 4e-3
) -> tuple[Classifier, float]:
    """Train the classifier whose features score images: (module in eval mode, held-out accuracy).

    data: a `data.Data` of images with labels; a fifth of them, 4,000 at most, are held out. The
    result depends on data and seed alone, at one thread of one build of torch. Raises UserError for
    data without labels or images.
    """
    if data.label is None or not data.images:
        raise UserError("a classifier needs images with labels; set data.labels=true")
    shuffled = noise.Order(data.count, seed)(np.arange(data.count))  # no mirror images
    held, kept = np.split(shuffled, [min(data.count // 5, 4000)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(data.shape, data.classes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    order = noise.Order(len(kept), seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        part = data.batch(kept[order(step * batch + np.arange(batch))])
        loss = functional.cross_entropy(net.logits(part["x1"]), part["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return net, accuracy(net, data, held)


@torch.no_grad()
def accuracy(net: Classifier, data: Any, ids: np.ndarray) -> float:
    """Give the share of items that a classifier names rightly. ids: int64 [N]."""
    right = 0
    for part in np.array_split(ids, max(1, len(ids) // 256)):
        found = data.batch(part)
        right += int((net.logits(found["x1"]).argmax(1) == found["label"]).sum())
    return right / len(ids)


class Inception(nn.Module):
    """Inception's features of images, as published FIDs use them, from weights that are given.

    forward(x: [B, 1 or 3, H, W] in [-1, 1]) -> [B, 2048]. weights: torch-fidelity's file
    (pt_inception-2015-12-05-*.pth). Nothing is downloaded. Raises UserError where the file or the
    library is not there.
    """

    num_features = 2048

    def __init__(self, weights: str):
        from torchmetrics.image.fid import NoTrainInceptionV3

        super().__init__()
        if not Path(weights).is_file():
            raise UserError(f"inception_weights={weights}: no such file")
        try:
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
        except ImportError as error:
            raise UserError(
                f"features='inception' needs torch-fidelity (pip install torch-fidelity): {error}"
            ) from None

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of x."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return self.net(((x.clamp(-1, 1) + 1) * 127.5).round().byte())


def module_digest(module: nn.Module) -> str:
    """Hash a module's state: name, dtype, shape and bytes in name order; hexadecimal sha256."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
