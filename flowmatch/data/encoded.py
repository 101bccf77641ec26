"""Sets of latents that the stage `encode` has made: read by number, memory-mapped.

A set has files of equal numbers of latents, `latents-000000.npy`, the labels in `labels.npy`, and the
VAE in `vae/`. Its manifest says how the latents are scaled: the VAE decodes x / scale + shift.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowmatch.config import UserError
from flowmatch.data.files import HASHED
from flowmatch.runs import manifest

if TYPE_CHECKING:
    from flowmatch.data.config import DataConfig

LABELS = "labels.npy"
VAE = "vae"  # the folder of the VAE


def file_name(k: int) -> str:
    """Name the file with latents k * shard_size and after."""
    return f"latents-{k:06d}.npy"


class Reader:
    """Reads latents by number. folder: of the set. facts: of its manifest."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder, self.size = folder, int(facts["shard_size"])
        self._open: dict[int, np.ndarray] = {}

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [B, *shape] for numbers int64 [B]."""
        files, rows = np.divmod(ids, self.size)
        for k in np.unique(files).tolist():
            if k not in self._open:
                self._open[k] = np.load(self.folder / file_name(k), mmap_mode="r")
        return np.stack(
            [self._open[k][row] for k, row in zip(files.tolist(), rows.tolist(), strict=True)]
        ).astype(np.float32)


def open_set(config: "DataConfig", key: str) -> dict[str, Any]:
    """Open the sealed folder that a config names.

    Args:
        config: of the data.
        key: the key of that config, for errors.

    Returns:
        The arguments of a SourceData.

    Raises:
        NotReady: The folder is not there, or not sealed.
        UserError: It is damaged, of another stage, or has no labels where they are asked for.
    """
    folder, where = Path(config.path), f"{key}.path"
    sealed, digest = manifest.read_hashed(config.path, where, ["encode"])
    facts = sealed["facts"]
    names = [name for name in sealed["outputs"] if not name.startswith(f"{VAE}/")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or sum((folder / name).stat().st_size for name in names) <= HASHED:
        manifest.verify(config.path, where, sealed)
    label = None
    if config.labels:
        if LABELS not in sealed["outputs"]:
            raise UserError(
                f"{key}.labels=true: {where}={config.path} was encoded without labels; set "
                "encode.data.labels=true, and encode again into another folder"
            )
        label = np.load(folder / LABELS)
    known = facts.get("id2label")
    return {
        "read": Reader(folder, facts),
        "count": int(facts["samples"]),
        "shape": tuple(facts["shape"]),
        "digest": digest,
        "label": label,
        "classes": facts.get("classes") if config.labels else None,
        "names": tuple(known.values()) if known and config.labels else None,
        "latents": True,
        "encoding": facts["latents"],
        "vae": str(folder / VAE),
    }
