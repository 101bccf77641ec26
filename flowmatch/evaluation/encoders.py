"""Feature networks that judge and are never part of a loss: another architecture, or no labels.

A residual classifier, and a denoising autoencoder, which needs no labels (Vincent et al. 2008,
Extracting and composing robust features with denoising autoencoders).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.evaluation import features
from flowmatch.evaluation.config import Network, Task
from flowmatch.flow import noise

MEASURED = {"classification": "accuracy", "denoising": "explained"}  # on held-out images
CORRUPTION = 0.5  # standard deviation of the noise on images in [-1, 1]
WIDTHS = (16, 32, 64)  # channels of the levels; further ones have the last
SMALLEST = 4  # a side that is not halved further


class Block(nn.Module):
    """A residual block: x + conv(f(conv(f(x)))), f a group norm and SiLU."""

    def __init__(self, width: int):
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.body = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, [B, width, h, w]."""
        return x + self.body(x)


def residual(shape: tuple[int, ...], num_features: int) -> nn.Sequential:
    """Build a residual network, x [B, C, H, W] -> [B, num_features].

    Its sides are halved until they are at most SMALLEST, by at least three levels in all.
    """
    channels, high, wide = shape
    layers: list[nn.Module] = []
    while len(layers) < 2 * len(WIDTHS) or max(high, wide) > SMALLEST:
        width = WIDTHS[min(len(layers) // 2, len(WIDTHS) - 1)]
        stride = 2 if max(high, wide) > SMALLEST else 1
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), Block(width)]
        channels, high, wide = width, -(-high // stride), -(-wide // stride)
    return nn.Sequential(
        *layers,
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(channels * high * wide, num_features),
    )


class Decoder(nn.Module):
    """Return an image from features: [B, num_features] -> [B, C, H, W], doubling sides of 4 or less."""

    def __init__(self, num_features: int, shape: tuple[int, ...]):
        super().__init__()
        channels, *side = shape
        sides = [tuple(side)]
        while max(sides[-1]) > SMALLEST:
            high, wide = sides[-1]
            sides.append((-(-high // 2), -(-wide // 2)))
        width = WIDTHS[-1]
        layers: list[nn.Module] = [nn.Linear(num_features, width * sides[-1][0] * sides[-1][1])]
        layers.append(nn.Unflatten(1, (width, *sides[-1])))
        for size in reversed(sides[:-1]):
            narrow = max(8, width // 2)
            layers += [nn.SiLU(), nn.Conv2d(width, narrow, 3, padding=1), nn.Upsample(size)]
            width = narrow
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the image of features x."""
        return self.body(x)


class Encoder(nn.Module):
    """A network whose features judge images.

    forward(x: [B, C, H, W]) -> features [B, num_features]. `head` maps features to class scores
    [B, classes], or to the image that they come from.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        network: Network,
        classes: int | None,
        num_features: int = 64,
    ):
        """Build the layers.

        Args:
            shape: Of an image, (C, H, W).
            network: The architecture: that of `features.Classifier`, or `residual`.
            classes: Number of classes; None denoises.
            num_features: Width of the features.
        """
        super().__init__()
        self.num_features, self.classes = num_features, classes
        if network == "residual":
            self.body = residual(shape, num_features)
        else:
            self.body = features.Classifier(shape, 1, num_features).body
        if classes is None:
            self.head: nn.Module = Decoder(num_features, shape)
        else:
            self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of x, [B, num_features]."""
        return self.body(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the class scores of x, [B, classes]."""
        return self.head(self.body(x))


def train(
    data: Data,
    seed: int,
    network: Network,
    task: Task,
    *,
    held_out: Data | None = None,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 4e-3,
    show: Callable[[int], Any] = lambda step: None,
) -> tuple[Encoder, float]:
    """Train an encoder; it depends on data and seed alone, as `features.train_classifier` says.

    Args:
        data: Images, with labels for classification; mirrored copies are not used.
        seed: Of weights, order and noise.
        network: The architecture.
        task: classification, or denoising: the squared error of the image that `head` makes from the
            features of the image with normal noise of standard deviation CORRUPTION.
        held_out: Images that measure the result; None holds out a fifth of data, at most 4,000.
        steps: Updates.
        batch: Images per update.
        lr: Peak learning rate of the one-cycle schedule.
        show: Called with the number of finished steps after each.

    Returns:
        The encoder in eval mode, and on held-out images the accuracy of a classifier, or the share of
        the variance of the images that the reconstructions from noisy images explain.

    Raises:
        UserError: If `features.check_images` rejects the data.
    """
    denoising = task == "denoising"
    features.check_images(data, "data", alone=held_out is None, labels=not denoising)
    held, kept = features.split(data, seed, held_out)
    classes = None if denoising else data.classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Encoder(data.shape, network, classes)

    def loss(found: dict[str, Tensor], step: int) -> Tensor:
        x = found["x1"]
        if denoising:
            return functional.mse_loss(net.logits(corrupted(x, seed, step)), x)
        return functional.cross_entropy(net.logits(x), found["label"])

    features.fit(net, data, kept, seed, loss, steps=steps, batch=batch, lr=lr, show=show)
    return net, (explained(net, *held, seed) if denoising else features.accuracy(net, *held))


def corrupted(x: Tensor, seed: int, number: int) -> Tensor:
    """Add the noise of batch `number` to images."""
    drawn = noise.generator(seed, number, noise.CORRUPTION).standard_normal(
        x.shape, dtype=np.float32
    )
    return x + CORRUPTION * torch.from_numpy(drawn)


@torch.no_grad()
def explained(net: Encoder, data: Data, ids: np.ndarray, seed: int) -> float:
    """Compute the share of the variance of images that reconstructions explain; at most 1.

    Args:
        net: A denoising encoder.
        data: The images.
        ids: Numbers of the images, int64 [N].
        seed: Of the noise.
    """
    errors, squares, count = 0.0, 0.0, 0
    total = torch.zeros(data.shape, dtype=torch.float64)
    parts = np.array_split(ids, max(1, len(ids) // features.BATCH))
    for number, part in enumerate(parts):
        x = data.batch(part)["x1"]
        made = net.logits(corrupted(x, seed + 1, number))
        errors += float((made - x).double().square().sum())
        squares += float(x.double().square().sum())
        total += x.double().sum(0)
        count += len(x)
    variance = squares - float(total.square().sum()) / count
    return 1 - errors / variance if variance else 0.0


def load(path: str, key: str, shape: tuple[int, ...]) -> tuple[Encoder, dict[str, Any]]:
    """Load an encoder from a sealed folder of train_classifier.

    Args:
        path: The folder.
        key: Name of the config key, for errors.
        shape: Of the images, (C, H, W).

    Returns:
        The encoder in eval mode, and the facts of its manifest.

    Raises:
        UserError: For a classifier that a loss may use, for images of another shape, and for files
            that have changed.
        NotReady: If the folder does not exist or is not sealed.
    """
    facts = features.opened(path, key, shape)
    if facts.get("network", "convolutional") == "convolutional" and "explained" not in facts:
        raise UserError(
            f"{key}={path}: a convolutional classifier, which losses use, does not judge a panel; train "
            "one with network=residual or task=denoising"
        )
    net = Encoder(shape, facts["network"], facts["classes"])
    features.restore(net, path, key)
    return net.eval(), facts
