"""The features by which a finish compares samples with data."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowmatch.config import UserError
from flowmatch.evaluation import features
from flowmatch.evaluation.decoded import Pictures
from flowmatch.models.digest import module_digest
from flowmatch.runs import manifest

FEW = 256  # values of an image that are compared
WIDEST = 1024  # features of a module: each update decomposes a matrix of as many rows


@dataclass
class Matched:
    """Feature modules.

    Attributes:
        modules: Name -> frozen module, in eval mode: x [B, ...] -> [B, ...].
        inputs: For the manifest: name -> digest.
        digests: By which an evaluation recognizes them.
        pictures: What makes the pictures that they see; None: they see samples.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    pictures: Pictures | None = None


class Values(nn.Module):
    """The values themselves; those of a large image are averages over squares, at most FEW.

    forward(x: [B, ...]) -> [B, F].
    """

    def __init__(self, shape: tuple[int, ...]):
        """Choose the squares. shape: of a sample."""
        super().__init__()
        large = len(shape) == 3 and math.prod(shape) > FEW
        self.side = math.ceil(math.sqrt(math.prod(shape) / FEW)) if large else 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of x, [B, F]."""
        if self.side > 1:
            x = functional.avg_pool2d(x, self.side, ceil_mode=True)
        return x.flatten(1)


class Random(nn.Module):
    """Means of the activations of a convolutional network with random weights.

    forward(x: [B, C, H, W]) -> [B, F].
    """

    def __init__(self, shape: tuple[int, ...], seed: int):
        """Draw the weights. shape: of an image, (C, H, W); seed: of the weights."""
        super().__init__()
        self.net = features.random_features(shape, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of x, [B, F]."""
        return torch.cat([found.mean((2, 3)) for found in self.net.maps(x)], 1)


def check(names: list[str]) -> None:
    """Check that features exist, before a network is loaded. Raises UserError, NotReady."""
    for number, name in enumerate(names):
        if name != features.VALUES:
            features.check(name, f"features.{number}")


def load(
    names: list[str],
    batch: int,
    shape: tuple[int, ...],
    device: str,
    seed: int,
    pictures: Pictures | None = None,
) -> Matched:
    """Load features.

    Args:
        names: Sealed folders of train_classifier, files of torch.export.save, `features.VALUES` or
            `features.RANDOM`.
        batch: Samples in a batch.
        shape: Of a sample.
        device: Where they are computed.
        seed: Of random weights.
        pictures: What makes the pictures that they see; None: they see samples.

    Raises:
        UserError: One of them does not take such samples, or returns too many features.
        NotReady: A folder does not exist or is not sealed.
    """
    found = Matched(pictures=pictures)
    shape = shape if pictures is None else pictures.shape
    for number, name in enumerate(names):
        key = f"features.{number}"
        if len(shape) != 3 and name != features.VALUES:
            raise UserError(
                f"{key}={name}: features of images [C, H, W]; the samples have {list(shape)}; use "
                f"features=[{features.VALUES}]"
            )
        digest = own = name
        module: nn.Module
        if name == features.VALUES:
            module = Values(shape)
        elif name == features.RANDOM:
            module = Random(shape, seed)
            own = module_digest(module.net)
        elif name.endswith(".pt2") or Path(name).is_file():
            module = features.Exported(name, key, batch, shape, device).net
            digest = own = manifest.sha256_file(name)
        else:
            module, _ = features.load(name, key, shape)
            digest, own = manifest.digest(name), module_digest(module)
        module.requires_grad_(False).to(device)
        width = module(torch.zeros(batch, *shape, device=device)).flatten(1).shape[1]
        if width > WIDEST:
            raise UserError(
                f"{key}={name}: {width} features; expected at most {WIDEST}, because each update "
                "decomposes a matrix of as many rows; use a module that returns fewer"
            )
        found.modules[f"{number}"] = module
        found.inputs[key] = digest
        found.digests.append(own)
    return found
