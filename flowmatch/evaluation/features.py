"""Features of images, for distances between sets of images and for feature losses.

They come from a classifier that the stage `train_classifier` or `evaluate` trains on the data, or from
Inception with weights that the user gives. A feature loss also takes any exported module, or random
weights. Nothing is downloaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowmatch.config import UserError, require
from flowmatch.data.dataset import Data
from flowmatch.flow import noise
from flowmatch.models.digest import module_digest
from flowmatch.runs import manifest
from flowmatch.runs.files import allow_readers

WEIGHTS = "classifier.safetensors"
INCEPTION = (
    "the file weights-inception-2015-12-05-6726825d.pth (96 MB), which is at "
    "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0 (pt_inception-... of pytorch-fid is "
    "the same); nothing is downloaded"
)
VALUES = "values"  # the values of samples themselves, as features
BATCH = 256  # samples that a feature network processes together
RANDOM = "random"  # the features of a feature loss that need no training: `random_features`


@torch.no_grad()
def embed(x: Tensor, module: nn.Module | None, batch: int = BATCH) -> Tensor:
    """Compute the features of samples.

    Args:
        x: [N, ...].
        module: The feature network, x -> [B, ...]. It runs in eval mode; its mode is restored. None
            takes the values themselves.
        batch: Samples processed together.

    Returns:
        float64 [N, num_features].

    Raises:
        UserError: For samples that are not finite.
    """
    if not x.isfinite().all():
        raise UserError(
            f"the samples, of shape {list(x.shape)}, contain NaN or inf; check the model that made them"
        )
    if module is None:
        return x.flatten(1).double()
    was_training = module.training
    module.eval()
    try:
        return torch.cat([module(part).flatten(1).double() for part in x.split(batch)])
    finally:
        module.train(was_training)


class Classifier(nn.Module):
    """A small convolutional classifier whose last hidden layer provides features.

    forward(x: [B, C, H, W]) -> features [B, num_features]; logits(x) -> [B, classes].
    """

    def __init__(self, shape: tuple[int, ...], classes: int, num_features: int = 64):
        """Build the layers.

        Args:
            shape: Of an image, (C, H, W). Its sides are halved until they are at most 7, at most six
                times.
            classes: Number of classes.
            num_features: Width of the last hidden layer.
        """
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
        """Return the features of x, [B, num_features]."""
        return self.body(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the class scores of x, [B, classes]."""
        return self.head(self.body(x))


class Perceptual(nn.Module):
    """The values that a feature loss compares: pixels and a classifier's activations.

    forward(x: [B, C, H, W]) -> [B, F]: the pixels, then each activation map of the classifier,
    normalized to unit length over the channels at every position, as in LPIPS (Zhang et al. 2018, arXiv
    1801.03924, eq. 1, weights 1). The squared distance of a map is its mean over positions times the
    C H W values of an image. Pixels and maps thus have equal weight, and the constant c of the loss
    has the same unit as without features. The classifier is frozen, in eval mode and float32;
    gradients flow through it.
    """

    def __init__(self, classifier: Classifier):
        """Freeze the classifier's convolutions, in place."""
        super().__init__()
        convolutions = nn.Sequential(*list(classifier.body)[:-2])
        self.body = convolutions.float().eval().requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the activations after each ReLU, first to last: [B, width, h, w] each."""
        found = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the values to compare, [B, F]."""
        parts, values = [x.flatten(1)], x[0].numel()
        for found in self.maps(x):
            length = (found.square().sum(1, keepdim=True) + 1e-8).sqrt()
            places = found.shape[2] * found.shape[3]
            parts.append((found / length).flatten(1) * (values / places) ** 0.5)
        return torch.cat(parts, dim=1)


def random_features(shape: tuple[int, ...], seed: int) -> Perceptual:
    """Build the values that a feature loss compares where no network is trained for it.

    They are those of a classifier whose weights are drawn, He-normal (variance 2 / inputs), with biases
    of 0. A distance on random filters approximates one between distributions of patches (Amir and Weiss
    2021, Understanding and simplifying perceptual distances).

    Args:
        shape: Of an image, (C, H, W).
        seed: Of the weights, which are a function of shape and seed alone.

    Returns:
        The frozen module, on the CPU.

    Raises:
        UserError: The samples have another number of axes.
    """
    if len(shape) != 3:
        raise UserError(
            f"features={RANDOM} are those of images [C, H, W]; the samples have {list(shape)}"
        )
    with torch.random.fork_rng(devices=[]):
        module = Perceptual(Classifier(shape, 1))
    convolutions = [layer for layer in module.body if isinstance(layer, nn.Conv2d)]
    for number, layer in enumerate(convolutions):
        weight = layer.weight.data
        drawn = noise.normal(seed, [number], tuple(weight.shape), noise.WEIGHTS)[0]
        weight.copy_(torch.from_numpy(drawn) * (2 / weight[0].numel()) ** 0.5)
        assert layer.bias is not None
        layer.bias.data.zero_()
    return module


class Exported(nn.Module):
    """The values that a feature loss compares: pixels and the output of a module of the user.

    forward(x: [B, C, H, W]) -> [B, F]: the pixels, then the output of the module, unweighted.
    """

    def __init__(self, path: str, key: str, batch: int, shape: tuple[int, ...], device: str):
        """Load the module, and run it once without data.

        Args:
            path: File of torch.export.save, with a dynamic batch dimension.
            key: Name of the config key, for errors.
            batch: Images in a batch.
            shape: Of an image, (C, H, W).
            device: Where the module runs.

        Raises:
            UserError: If the module cannot be loaded, rejects such batches, or returns no gradient.
        """
        from torch.export.passes import move_to_device_pass

        super().__init__()
        try:
            # On the meta device nothing is allocated: a plan's batch may be that of a whole job.
            trial = move_to_device_pass(torch.export.load(path), "meta").module()
            trial.requires_grad_(False)
            x = torch.zeros(batch, *shape, device="meta", requires_grad=True)
            found = trial(x).flatten(1)
            self.net = move_to_device_pass(torch.export.load(path), device).module()
            self.net.requires_grad_(False)
        except Exception as error:  # torch and the program may raise anything
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{key}={path}: cannot load this file as a module that takes batches "
                f"{[batch, *shape]}; write it with torch.export.save and a dynamic batch dimension "
                f"({type(error).__name__}: {reason})"
            ) from None
        if not found.requires_grad or len(found) != batch:
            raise UserError(
                f"{key}={path} returns {len(found)} rows for a batch of {batch}, with"
                f"{'' if found.requires_grad else 'out'} a gradient; expected one row per image, with "
                "a gradient"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the values to compare, [B, F]."""
        return torch.cat([x.flatten(1), self.net(x).flatten(1)], dim=1)


def check(path: str, key: str) -> None:
    """Check that the features of a feature loss exist, before a network is loaded to test them with.

    Args:
        path: As in `perceptual`.
        key: Name of the config key, for errors.

    Raises:
        UserError: If the file does not exist, or the folder is that of another stage.
        NotReady: If the folder does not exist or is not sealed.
    """
    if path == RANDOM or Path(path).is_file():
        return
    if path.endswith(".pt2"):
        raise UserError(f"{key}={path}: no such file")
    manifest.read(path, key, ["train_classifier"])


def perceptual(
    path: str,
    key: str,
    batch: int,
    shape: tuple[int, ...],
    device: str,
    seed: int = 0,
    whole: tuple[int, ...] | None = None,
) -> tuple[nn.Module, str, str]:
    """Load the features that a feature loss compares.

    Args:
        path: A sealed folder of train_classifier, a file of torch.export.save, or RANDOM.
        key: Name of the config key, for errors.
        batch: Images in a batch.
        shape: Of an image, (C, H, W).
        device: Where the features are computed.
        seed: Of random weights.
        whole: Shape of the images that a classifier was trained on, where `shape` is that of crops.

    Returns:
        The frozen module; the digest of `path`, or of random weights; the digest of the classifier
        itself, by which an evaluation recognizes it.

    Raises:
        UserError: If `path` holds no features for such images.
        NotReady: If the folder does not exist or is not sealed.
    """
    if path == RANDOM:
        drawn = random_features(shape, seed)
        digest = module_digest(drawn)
        return drawn.to(device), digest, digest
    if path.endswith(".pt2") or Path(path).is_file():
        digest = manifest.sha256_file(path)
        return Exported(path, key, batch, shape, device), digest, digest
    classifier, _ = load(path, key, whole or shape)
    own_digest = module_digest(classifier)
    return Perceptual(classifier).to(device), manifest.digest(path), own_digest


def check_images(data: Data, key: str, alone: bool = True, labels: bool = True) -> None:
    """Check that a feature network can be trained on data.

    Args:
        data: The images.
        key: Name of the config key, for errors.
        alone: Whether a fifth of the images is held out, which must be at least one.
        labels: Whether labels are needed.

    Raises:
        UserError: If the data has no images, no labels, or too few of them.
    """
    if not data.images and not labels:
        raise UserError(f"{key}: expected images, got samples of shape {list(data.shape)}")
    if not data.images or (labels and data.label is None):
        raise UserError(f"{key}: expected images with labels; set {key}.labels=true")
    if alone and data.count < 5:
        raise UserError(
            f"{key}: {data.count} images; expected 5 or more, because a fifth is held out to measure "
            "the accuracy of the classifier"
        )


def train_classifier(
    data: Data,
    seed: int,
    *,
    held_out: Data | None = None,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 4e-3,
    show: Callable[[int], Any] = lambda step: None,
) -> tuple[Classifier, float]:
    """Train a classifier whose features score images.

    The result depends on data and seed alone, with one thread of one build of torch.

    Args:
        data: Images with labels; mirrored copies are not used.
        seed: Of weights and order.
        held_out: Images with labels that measure the accuracy; None holds out a fifth of data, at
            most 4,000 images.
        steps: Updates.
        batch: Images per update.
        lr: Peak learning rate of the one-cycle schedule.
        show: Called with the number of finished steps after each.

    Returns:
        The classifier in eval mode, and its accuracy on the held-out images, in [0, 1].

    Raises:
        UserError: If `check_images` rejects the data.
    """
    check_images(data, "data", alone=held_out is None)
    assert data.classes is not None  # labels come with their number of classes
    held, kept = split(data, seed, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(data.shape, data.classes)

    def loss(found: dict[str, Tensor], step: int) -> Tensor:
        return functional.cross_entropy(net.logits(found["x1"]), found["label"])

    fit(net, data, kept, seed, loss, steps=steps, batch=batch, lr=lr, show=show)
    return net, accuracy(net, *held)


def split(
    data: Data, seed: int, held_out: Data | None
) -> tuple[tuple[Data, np.ndarray], np.ndarray]:
    """Choose the images that measure a feature network, and those that train it.

    Args:
        data: The images.
        seed: Of the choice.
        held_out: Images that measure; None holds out a fifth of data, at most 4,000 images.

    Returns:
        The data that measure, with the numbers of their items; the numbers of the items of `data` that
        train. No mirrored copies.
    """
    shuffled = noise.Order(data.count, seed)(np.arange(data.count))
    if held_out is not None:
        return (held_out, np.arange(held_out.count)), shuffled
    held, kept = np.split(shuffled, [min(data.count // 5, 4000)])
    return (data, held), kept


def fit(
    net: nn.Module,
    data: Data,
    kept: np.ndarray,
    seed: int,
    loss: Callable[[dict[str, Tensor], int], Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    show: Callable[[int], Any],
) -> None:
    """Train a feature network in place, and set it to eval mode.

    Args:
        net: The network.
        data: The images.
        kept: Numbers of the items that train it.
        seed: Of their order.
        loss: loss(batch, step) -> scalar.
        steps: Updates.
        batch: Images per update.
        lr: Peak learning rate of the one-cycle schedule.
        show: Called with the number of finished steps after each.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    order = noise.Order(len(kept), seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        found = data.batch(kept[order(step * batch + np.arange(batch))])
        optimizer.zero_grad()
        loss(found, step).backward()
        optimizer.step()
        schedule.step()
        show(step + 1)
    net.eval()


@torch.no_grad()
def accuracy(net: Any, data: Data, ids: np.ndarray) -> float:
    """Compute the share of items that a classifier assigns to their class. ids: int64 [N]."""
    right = 0
    for part in np.array_split(ids, max(1, len(ids) // 256)):
        found = data.batch(part)
        right += int((net.logits(found["x1"]).argmax(1) == found["label"]).sum())
    return right / len(ids)


class Inception(nn.Module):
    """Inception's features of images, as published FIDs use them. Nothing is downloaded.

    forward(x: [B, 1 or 3, H, W] in [-1, 1]) -> [B, 2048].
    """

    num_features = 2048

    def __init__(self, weights: str | None):
        """Load the network.

        Args:
            weights: File of the weights, see INCEPTION.

        Raises:
            UserError: If the file does not exist or torch-fidelity is not installed.
        """
        require("torchmetrics", "eval", "features=inception")
        from torchmetrics.image.fid import NoTrainInceptionV3

        super().__init__()
        if weights is None:
            raise UserError(f"features='inception': set inception_weights to {INCEPTION}")
        if not Path(weights).is_file():
            raise UserError(f"inception_weights={weights}: no such file; expected {INCEPTION}")
        try:
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
        except ImportError as error:
            raise UserError(
                f"features='inception' needs torch-fidelity (pip install torch-fidelity): {error}"
            ) from None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of x, [B, 2048]."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return self.net(((x.clamp(-1, 1) + 1) * 127.5).round().byte())


def save(net: nn.Module, folder: Path) -> list[str]:
    """Write a feature network, and return the names of its files."""
    from safetensors.torch import save_file

    save_file(net.state_dict(), folder / WEIGHTS)
    allow_readers(folder / WEIGHTS)
    return [WEIGHTS]


def load(path: str, key: str, shape: tuple[int, ...]) -> tuple[Classifier, dict[str, Any]]:
    """Load a classifier from a sealed folder of train_classifier.

    Args:
        path: The folder.
        key: Name of the config key, for errors.
        shape: Of the images to classify, (C, H, W).

    Returns:
        The classifier in eval mode, and the facts of its manifest (accuracy, sha256, shape, classes).

    Raises:
        UserError: If it judges panels, was trained on images of another shape, or its files have
            changed.
        NotReady: If the folder does not exist or is not sealed.
    """
    facts = opened(path, key, shape)
    network, task = facts.get("network", "convolutional"), facts.get("task", "classification")
    if (network, task) != ("convolutional", "classification"):
        raise UserError(
            f"{key}={path}: a network of network={network}, task={task} judges panels alone, where no "
            "loss has seen its features; train one with network=convolutional, task=classification"
        )
    net = Classifier(shape, facts["classes"])
    restore(net, path, key)
    return net.eval(), facts


def opened(path: str, key: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Check a sealed folder of train_classifier, and return the facts of its manifest.

    Raises what `load` raises.
    """
    sealed = manifest.read(path, key, ["train_classifier"])
    manifest.verify(path, key, sealed)
    facts: dict[str, Any] = sealed["facts"]
    if list(shape) != facts["shape"]:
        raise UserError(
            f"{key}={path} takes images of shape {facts['shape']}, but the data has shape "
            f"{list(shape)}; train one on this data"
        )
    return facts


def restore(net: nn.Module, path: str, key: str) -> None:
    """Load the weights of a folder into a network. Raises UserError if they do not fit."""
    from safetensors.torch import load_file

    try:
        net.load_state_dict(load_file(Path(path) / WEIGHTS))
    except (RuntimeError, TypeError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"{key}={path}: {WEIGHTS} does not hold the network of its manifest ({told}); "
            f"delete {manifest.NAME} there and repeat its stage"
        ) from None
