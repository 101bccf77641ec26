"""Teachers: where the velocity of stage 2, and the start of stage 3, comes from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmatch import foreign, manifest, nets
from flowmatch.config import NotReady, UserError

TRAINED = ("train_flow", "reflow")


@dataclass(frozen=True)
class Teacher:
    """A network with what is known of it."""

    net: Any  # a diffusers model, float32, eval mode
    digest: str  # of weights and config, and of the diffusion that they were trained on
    round: int  # 0 after independent coupling, k after k reflows
    diffusion: foreign.Diffusion | None = None  # None: a flow model, of diffusers' convention

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, [C, H, W] or [D]."""
        return nets.sample_shape(self.net)

    @property
    def classes(self) -> int | None:
        """Number of classes K, or None."""
        return nets.classes_of(self.net) if self.diffusion is None else foreign.classes_of(self.net)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of its pairs says of a teacher that is no flow model."""
        if self.diffusion is None:
            return {}
        return {"diffusion": self.diffusion.facts, "span": list(self.velocity().span)}

    def velocity(self, guidance: float = 1.0) -> nets.Velocity:
        """Build its velocity field. Raises UserError where it cannot be guided."""
        if self.diffusion is None:
            return nets.Velocity(self.net, guidance)
        return foreign.ForeignVelocity(self.net, self.diffusion, guidance)


def load(path: str | os.PathLike[str], key: str) -> Teacher:
    """Load a teacher from the run folder of a training stage, or from what diffusers saved.

    A run folder must be sealed, and gives its EMA weights (`net/`), whose hashes are checked. A
    diffusers pipeline (folder or hub name) is a flow model or a diffusion model as its scheduler
    says; a lone diffusers model is taken as a flow model of diffusers' convention: timestep
    1000 sigma, output noise - data. Raises UserError naming `key`; NotReady for a folder that is not
    there or not sealed.
    """
    folder = Path(path)
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):  # a hub name
        try:
            return _pipeline(path, key)
        except NotReady:
            return _flow(nets.load(path, key))
    if (folder / "config.json").is_file():
        return _flow(nets.load(path, key))
    if (folder / "model_index.json").is_file() and not manifest.sealed(folder):
        return _pipeline(path, key)
    sealed = manifest.read(folder, key, TRAINED)
    manifest.verify(folder, key, sealed)
    return _flow(nets.load(folder / "net", key), sealed["facts"]["round"])


def _flow(net: Any, reflow_round: int = 0) -> Teacher:
    return Teacher(net, nets.digest(net), reflow_round)


def _pipeline(path: str | os.PathLike[str], key: str) -> Teacher:
    net, diffusion = foreign.read(path, key)
    if diffusion is None:
        return _flow(net)
    if net.config.out_channels not in (net.config.in_channels, 2 * net.config.in_channels):
        raise UserError(
            f"{key}={path}: its network gives {net.config.out_channels} channels for "
            f"{net.config.in_channels}; expected as many, or twice as many (with a variance)"
        )
    facts = {"net": nets.digest(net), "diffusion": diffusion.facts}
    return Teacher(net, manifest.fingerprint(facts), 0, diffusion)
