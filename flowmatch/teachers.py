"""Teachers: where the velocity of stage 2, and the start of stage 3, comes from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmatch import manifest, nets

TRAINED = ("train_flow", "reflow")


@dataclass(frozen=True)
class Teacher:
    """A network with what is known of it."""

    net: Any  # a diffusers model, float32, eval mode
    digest: str  # of weights and config (decision: sha256 over the state in name order)
    round: int  # 0 after independent coupling, k after k reflows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, [C, H, W] or [D]."""
        return nets.sample_shape(self.net)

    @property
    def classes(self) -> int | None:
        """Number of classes K, or None."""
        return nets.classes_of(self.net)


def load(path: str | os.PathLike[str], key: str) -> Teacher:
    """Load a teacher from the run folder of a training stage, or from a diffusers model.

    A run folder must be sealed, and gives its EMA weights (`net/`), whose hashes are checked. A
    diffusers model (folder or hub name) is taken as a flow model of diffusers' convention: timestep
    1000 sigma, output noise - data. Raises UserError naming `key`; NotReady for a folder that is not
    there or not sealed.
    """
    folder = Path(path)
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.is_dir()
    if not hub_name and not (folder / "config.json").is_file():
        sealed = manifest.read(folder, key, TRAINED)
        manifest.verify(folder, key, sealed)
        net = nets.load(folder / "net", key)
        return Teacher(net, nets.digest(net), sealed["facts"]["round"])
    net = nets.load(path, key)
    return Teacher(net, nets.digest(net), 0)
