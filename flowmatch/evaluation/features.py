"""Features of images, for distances between sets of them: a classifier's, or Inception's.

A classifier is trained on the data by the stage `train_classifier`, or inside `evaluate`; Inception's
weights are given. Nothing is downloaded. A feature loss also looks through any module that is given.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowmatch.config import UserError
from flowmatch.flow import noise
from flowmatch.models.digest import module_digest
from flowmatch.runs import manifest

WEIGHTS = "classifier.safetensors"
BATCH = 256  # samples that a feature module sees together


@torch.no_grad()
def embed(x: Tensor, module: nn.Module | None, batch: int = BATCH) -> Tensor:
    """Give the features of samples as a float64 matrix, [N, ...] -> [N, num_features].

    module: x -> [B, ...], run in eval mode and left as it was; None takes the values themselves.
    Raises UserError for samples that are not finite.
    """
    if not x.isfinite().all():
        raise UserError(f"samples of shape {list(x.shape)} hold NaN or inf")
    if module is None:
        return x.flatten(1).double()
    was_training = module.training
    module.eval()
    try:
        return torch.cat([module(part).flatten(1).double() for part in x.split(batch)])
    finally:
        module.train(was_training)


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

    def maps(self, x: Tensor) -> list[Tensor]:
        """Give what its convolutions see in x, first to last: [B, width, h, w] each."""
        found = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


class Perceptual(nn.Module):
    """What a feature loss compares: the pixels of an image and what a classifier sees at each of them.

    forward(x: [B, C, H, W]) -> [B, F]: the values, then each map of the classifier with unit length
    over its channels at every place, as LPIPS takes them (Zhang et al. 2018, arXiv 1801.03924, eq. 1,
    weights 1). A map's squared distance is its mean over places times the C H W values of an image, so
    that values and maps weigh alike, and c has the same unit as without features. The classifier is
    frozen here, in eval mode and float32; gradients go through it.
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier.float().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of x."""
        parts, values = [x.flatten(1)], x[0].numel()
        for found in self.classifier.maps(x):
            length = (found.square().sum(1, keepdim=True) + 1e-8).sqrt()
            places = found.shape[2] * found.shape[3]
            parts.append((found / length).flatten(1) * (values / places) ** 0.5)
        return torch.cat(parts, dim=1)


class Exported(nn.Module):
    """The same of a module that is given, by a file of torch.export.save.

    forward(x: [B, C, H, W]) -> [B, F]: the values, then whatever the module gives of x, unweighted.
    Raises UserError, naming `key`, where it cannot be loaded, takes no batch of such images, or gives
    no gradient.
    """

    def __init__(self, path: str, key: str, batch: int, shape: tuple[int, ...], device: str):
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.export.passes import move_to_device_pass

        super().__init__()
        try:
            self.net = move_to_device_pass(torch.export.load(path), device).module()
            self.net.requires_grad_(False)
            with FakeTensorMode(allow_non_fake_inputs=True):  # a plan's batch may be a whole job's
                x = torch.zeros(batch, *shape, device=device, requires_grad=True)
                found = self.net(x).flatten(1)
        except Exception as error:  # whatever torch or the program raises
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{key}={path}: no module for batches of {[batch, *shape]}, by torch.export.save with a "
                f"dynamic batch: {type(error).__name__}: {reason}"
            ) from None
        if not found.requires_grad or len(found) != batch:
            raise UserError(
                f"{key}={path} gives {len(found)} rows for a batch of {batch}, with"
                f"{'' if found.requires_grad else 'out'} a gradient; expected a row a sample, with one"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of x."""
        return torch.cat([x.flatten(1), self.net(x).flatten(1)], dim=1)


def check(path: str, key: str) -> None:
    """Look whether there is what a feature loss compares, before there is a network to hold it against.

    path: as of `perceptual`. Raises UserError naming `key`; NotReady for a folder that is not there or
    not sealed.
    """
    if Path(path).is_file():
        return
    if path.endswith(".pt2"):
        raise UserError(f"{key}={path}: no such file")
    manifest.read(path, key, ["train_classifier"])


def perceptual(
    path: str, key: str, batch: int, shape: tuple[int, ...], device: str
) -> tuple[nn.Module, str, str]:
    """Load what a feature loss compares: (frozen module, digest of `path`, digest of who looks).

    path: the sealed folder of train_classifier, or a file. batch, shape: of what it is to see.
    Raises UserError naming `key`; NotReady for a folder that is not there or not sealed.
    """
    if path.endswith(".pt2") or Path(path).is_file():
        module = Exported(path, key, batch, shape, device)
        digest = manifest.sha256_file(path)
        return module, digest, digest
    classifier, _ = load(path, key, shape)
    looks = module_digest(classifier)
    return Perceptual(classifier).to(device), manifest.digest(path), looks


def check_images(data: Any, key: str, alone: bool = True) -> None:
    """Raise UserError, naming `key`, where a classifier cannot learn from a `dataset.Data`.

    alone: a fifth of it is held out, and must be an image at least.
    """
    if data.label is None or not data.images:
        raise UserError(f"{key}: expected images with labels; set {key}.labels=true")
    if alone and data.count < 5:
        raise UserError(
            f"{key}: {data.count} images, of which a fifth is to measure the accuracy of the "
            "classifier; expected 5 or more"
        )


def train_classifier(
    data: Any,
    seed: int,
    *,
    held_out: Any = None,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 4e-3,
    show: Callable[[int], Any] = lambda step: None,
) -> tuple[Classifier, float]:
    """Train the classifier whose features score images: (module in eval mode, held-out accuracy).

    data, held_out: a `dataset.Data` of images with labels; without held_out a fifth of data, 4,000 at
    most, is kept for it. The result depends on data and seed alone, at one thread of one build of
    torch. show: told the steps done. Raises UserError where `check_images` does.
    """
    check_images(data, "data", alone=held_out is None)
    shuffled = noise.Order(data.count, seed)(np.arange(data.count))  # no mirror images
    part = min(data.count // 5, 4000) if held_out is None else 0
    held, kept = np.split(shuffled, [part])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(data.shape, data.classes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    order = noise.Order(len(kept), seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        found = data.batch(kept[order(step * batch + np.arange(batch))])
        loss = functional.cross_entropy(net.logits(found["x1"]), found["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        show(step + 1)
    net.eval()
    if held_out is not None:
        return net, accuracy(net, held_out, np.arange(held_out.count))
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


def save(net: Classifier, folder: Path) -> list[str]:
    """Write a classifier; returns the names of its files."""
    from safetensors.torch import save_file

    save_file(net.state_dict(), folder / WEIGHTS)
    return [WEIGHTS]


def load(path: str, key: str, shape: tuple[int, ...]) -> tuple[Classifier, dict[str, Any]]:
    """Load a classifier from the sealed folder of its stage: (module in eval mode, facts).

    shape: of the images that it is to see. Raises UserError naming `key`; NotReady for a folder that
    is not there or not sealed.
    """
    from safetensors.torch import load_file

    sealed = manifest.read(path, key, ["train_classifier"])
    manifest.verify(path, key, sealed)
    facts = sealed["facts"]
    if list(shape) != facts["shape"]:
        raise UserError(
            f"{key}={path} looks at images of {facts['shape']}; data holds {list(shape)}"
        )
    net = Classifier(shape, facts["classes"])
    net.load_state_dict(load_file(Path(path) / WEIGHTS))
    return net.eval(), facts
