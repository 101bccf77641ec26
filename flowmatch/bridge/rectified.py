"""Pairs of the codes of two papers, which are read only.

`sangyun884/rfpp` (Lee et al. 2024, `dataset.py`, `generate_edm.py`): samples.zip or samples/ of PNGs;
z.zip or zs/ with the state of numpy's PCG64 before each noise, two big-endian integers of 128 bits;
images_labels.csv where there are classes. `gnobitab/RectifiedFlow` (Liu et al. 2022,
`run_lib_reflow.py`): z0.npy and z1.npy in a folder a seed.
"""

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from flowmatch.bridge.diffsynth import picture_at
from flowmatch.bridge.sample import Sample, array_of
from flowmatch.config import UserError

LABELS = "images_labels.csv"
STATE = 32  # bytes


class StateReader:
    """Samples of rfpp by their numbers, in the order of their names."""

    def __init__(self, folder: Path):
        self.folder, self.notes, self.times = folder, list[str](), list[float]()
        self.zips = [self._zip("samples.zip"), self._zip("z.zip")]
        self.files = [folder / "samples", folder / "zs"]
        images, noise = (self._names(k) for k in (0, 1))
        self.images = sorted(name for name in images if name.endswith(".png"))
        stems = {Path(name).with_suffix("").as_posix(): name for name in noise}
        self.states = [stems.get(name.removesuffix(".png"), "") for name in self.images]
        self.count = len(self.images)
        if not self.count or "" in self.states:
            raise UserError(
                f"{folder}: {self.count} pictures in samples, {len(stems)} states in z; expected a "
                "state for each picture"
            )
        self.names = ["samples.zip" if self.zips[0] else f"samples/{x}" for x in self.images]
        self.names += ["z.zip" if self.zips[1] else f"zs/{name}" for name in self.states]
        self.classes: dict[str, int] = {}
        if (folder / LABELS).is_file() and (folder / LABELS).stat().st_size:
            self.names.append(LABELS)
            with open(folder / LABELS, newline="") as file:
                self.classes = {row[0]: int(row[1]) for row in csv.reader(file) if row}
            if missing := [name for name in self.images if name not in self.classes]:
                raise UserError(
                    f"{folder / LABELS} has no class for {missing[0]} and {len(missing) - 1} others"
                )
        self.names = list(dict.fromkeys(self.names))

    def _zip(self, name: str) -> zipfile.ZipFile | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is no zip file: {error}") from None

    def _names(self, k: int) -> list[str]:
        if (packed := self.zips[k]) is not None:
            return packed.namelist()
        files = [path for path in self.files[k].rglob("*") if path.is_file()]
        return [str(path.relative_to(self.files[k])) for path in files if path.suffix != ".txt"]

    def _bytes(self, k: int, name: str) -> bytes:
        packed = self.zips[k]
        return packed.read(name) if packed is not None else (self.files[k] / name).read_bytes()

    def sample(self, i: int) -> Sample:
        """Read one picture, and draw its noise."""
        x1 = picture_at(self._bytes(0, self.images[i]), self.images[i])
        content = self._bytes(1, self.states[i])
        if len(content) != STATE:
            raise UserError(
                f"{self.folder}: {self.states[i]} has {len(content)} bytes; expected {STATE}"
            )
        state = {
            "bit_generator": "PCG64",
            "state": {
                "state": int.from_bytes(content[:16], "big"),
                "inc": int.from_bytes(content[16:], "big"),
            },
            "has_uint32": False,
            "uinteger": 0,
        }
        generator = np.random.Generator(np.random.PCG64())
        generator.bit_generator.state = state
        x0 = generator.standard_normal(x1.shape).astype(np.float32)
        return Sample(x0, x1, label=self.classes.get(self.images[i]))

    def texts(self) -> list[str] | None:
        """As in `Reader`."""
        return None

    def labels(self) -> list[int] | None:
        """As in `Reader`."""
        return [self.classes[name] for name in self.images] if self.classes else None


class ArrayReader:
    """Rows of z0.npy and z1.npy by their numbers, of the folder or of its folders in order of name."""

    def __init__(self, folder: Path):
        self.notes, self.times, self.folder = list[str](), list[float](), folder
        found = sorted(path.parent for path in folder.glob("*/z0.npy"))
        places = [folder] if (folder / "z0.npy").is_file() else found
        if not places:
            raise UserError(f"{folder} has no z0.npy, and no folder in it has one")
        self.pairs = [tuple(self._open(place / f"z{k}.npy") for k in (0, 1)) for place in places]
        for (z0, z1), place in zip(self.pairs, places, strict=True):
            if z0.shape != z1.shape:
                raise UserError(
                    f"{place}: z0 is {list(z0.shape)}, z1 is {list(z1.shape)}; expected one shape"
                )
        self.ends = np.cumsum([len(z0) for z0, _ in self.pairs])
        self.count = int(self.ends[-1])
        self.names = [str((p / f"z{k}.npy").relative_to(folder)) for p in places for k in (0, 1)]

    def _open(self, path: Path) -> np.ndarray:
        try:
            return array_of(np.load(path, mmap_mode="r", allow_pickle=False), str(path))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def sample(self, i: int) -> Sample:
        """Read one row."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        z0, z1 = self.pairs[k]
        row = i - int(self.ends[k] - len(z0))
        return Sample(np.array(z0[row]), np.array(z1[row]))

    def texts(self) -> list[str] | None:
        """As in `Reader`."""
        return None

    def labels(self) -> list[int] | None:
        """As in `Reader`."""
        return None


def read_rfpp(folder: Path, told: dict[str, Any]) -> StateReader:
    """Open a set of rfpp, as in `Format.read`."""
    return StateReader(folder)


def read_rectifiedflow(folder: Path, told: dict[str, Any]) -> ArrayReader:
    """Open a set of RectifiedFlow, as in `Format.read`."""
    return ArrayReader(folder)
