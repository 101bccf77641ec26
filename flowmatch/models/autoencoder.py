"""A VAE by itself: pictures to latents and back, for sets of latents and models trained on them.

x = scale (z - shift) for each channel, where z is what the VAE encodes and decodes. The scale and the
shift are those of the VAE's config (scaling_factor, shift_factor, latents_mean, latents_std).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.data.encoded import VAE
from flowmatch.models import networks
from flowmatch.models.digest import network_digest
from flowmatch.models.latents import encode

BATCH = 16  # latents that are decoded together
NAMES = ("vae", "vqvae")  # of the VAE in pipelines


@dataclass(frozen=True)
class Autoencoder:
    """A VAE, and how its latents are scaled.

    Attributes:
        net: A VAE of diffusers, in eval mode.
        scale: A number, or one for each channel.
        shift: Likewise.
        picture: Shape of a picture, [C, H, W].
        digest: Of its weights and config.
    """

    net: Any
    scale: float | list[float]
    shift: float | list[float]
    picture: tuple[int, ...]
    digest: str

    @property
    def facts(self) -> dict[str, Any]:
        """What manifests hold of it, and of the latents that are its own."""
        facts = {"vae": self.digest, "scale": self.scale, "shift": self.shift}
        return facts | {"picture": list(self.picture)}

    @property
    def plain(self) -> bool:
        """Whether x / scaling_factor is all that comes before its decoder."""
        return self.shift == 0 and self.scale == self.net.config.get("scaling_factor")

    def _each(self, value: float | list[float], like: Tensor) -> Tensor:
        return like.new_tensor(value).reshape(-1, *([1] * (like.ndim - 2)))

    def encode(self, x: Tensor) -> Tensor:
        """Encode pictures [B, C, H, W] in [-1, 1] to the scaled mean of their latents, float32."""
        z = encode(self.net, x)
        return (z - self._each(self.shift, z)) * self._each(self.scale, z)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode scaled latents, [B, ...]; return pictures [B, C, H, W] in [-1, 1], where x is."""
        weights, parts = next(self.net.parameters()), []
        for part in x.split(BATCH):
            z = part / self._each(self.scale, part) + self._each(self.shift, part)
            made = self.net.decode(z.to(weights.device, weights.dtype)).sample
            parts.append(made.float().clamp(-1, 1).to(x.device))
        return torch.cat(parts)

    def decoded(self, data: Data) -> Data:
        """Return a set of its latents as pictures, decoded as they are read."""

        def read(ids: np.ndarray) -> np.ndarray:
            found: np.ndarray = self.decode(torch.from_numpy(data.read(ids))).cpu().numpy()
            return found

        return replace(data, read=read, shape=self.picture, latents=False, encoding=None)


def load(
    path: str | os.PathLike[str],
    key: str,
    picture: tuple[int, ...],
    scaled: dict[str, Any] | None = None,
) -> Autoencoder:
    """Load a VAE.

    Args:
        path: Its folder or name on the hub, or that of a pipeline that has one.
        key: Name of the config's key, for the messages.
        picture: Shape of a picture, [C, H, W].
        scaled: Facts of the latents, whose scale and shift are used, and whose digest must be its own;
            default: those of the VAE's config.

    Raises:
        UserError: There is no VAE, or another one.
    """
    where, folder = f"{key}={path}", Path(path)
    inside = next((name for name in NAMES if (folder / name / "config.json").is_file()), "")
    net = networks.load(path, key, inside)
    if not (callable(getattr(net, "encode", None)) and callable(getattr(net, "decode", None))):
        raise UserError(f"{where}: {type(net).__name__} does not encode pictures; expected a VAE")
    digest = network_digest(net)
    if scaled is not None:
        if digest != scaled["vae"]:
            raise UserError(f"{where} is another VAE than the one that the latents were made with")
        return Autoencoder(net, scaled["scale"], scaled["shift"], tuple(scaled["picture"]), digest)
    config = net.config
    factor = float(config.get("scaling_factor") or 1.0)
    spread, mean = config.get("latents_std"), config.get("latents_mean")
    scale: float | list[float] = [factor / float(s) for s in spread] if spread else factor
    shift: float | list[float] = float(config.get("shift_factor") or 0.0)
    return Autoencoder(
        net, scale, [float(m) for m in mean] if mean else shift, tuple(picture), digest
    )


def of_data(data: Data, key: str) -> Autoencoder | None:
    """Load the VAE of a set of latents, from its folder; None for other data."""
    if data.encoding is None:
        return None
    return load(data.vae, key, (), data.encoding)


def find(run: str | os.PathLike[str]) -> str | None:
    """Find the VAE of a run folder: follow the inputs in config.yaml, to the set of latents."""
    for folder in _inputs(Path(run), 8):
        if (folder / VAE / "config.json").is_file():
            return str(folder / VAE)
    return None


def of_run(run: str, latents: dict[str, Any] | None) -> Autoencoder | None:
    """Load the VAE of a run folder's latents where it is found.

    Args:
        run: The folder.
        latents: What its manifest says of them.
    """
    path = find(run) if latents else None
    return None if path is None else load(path, "vae", (), latents)


def _inputs(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return
    if not isinstance(values, dict) or not depth:
        return
    data = values.get("data")
    found = [data.get("path")] if isinstance(data, dict) and data.get("source") == "latents" else []
    found += [values.get(name) for name in ("teacher", "start", "student")]
    for path in found:
        if isinstance(path, str) and Path(path).is_dir():
            yield from _inputs(Path(path), depth - 1)
