"""DiffSynth-Studio's table of pictures: metadata.csv, and a PNG a sample.

`diffsynth/core/data/unified_dataset.py` of modelscope/DiffSynth-Studio reads the columns; its direct
distillation draws the noise of a picture with torch from the columns seed and rand_device. Noise of ours
is not torch's, so that we write no seed: the column `noise` names a .npy file.
"""

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.bridge.sample import Facts, Sample, array_of
from flowmatch.config import UserError

TABLE, IMAGES, NOISE = "metadata.csv", "images", "noise"
COLUMNS = ("image", "prompt", "noise", "label")
Encode = Callable[[Tensor], Tensor]  # pictures [B, C, H, W] in [-1, 1] -> states [B, *shape]


class DiffSynth:
    """The format."""

    name, half, pictures = "diffsynth", False, True

    def check(self, facts: Facts) -> list[str]:
        """As in `Format`."""
        notes = [
            "x1 becomes a PNG of 8 bits; there is no column seed, because torch does not draw our "
            "noise: the column noise names a .npy file"
        ]
        if facts.times:
            notes.append("states are left out")
        if not facts.labels:
            notes.append("the set has no prompts: the column prompt is empty")
        return notes

    def write(
        self, folder: Path, k: int, first: int, samples: Iterable[Sample], facts: Facts
    ) -> None:
        """As in `Format`."""
        from PIL import Image

        (folder / IMAGES).mkdir()
        (folder / NOISE).mkdir()
        rows = io.StringIO()
        table = csv.writer(rows, lineterminator="\n")
        for number, sample in enumerate(samples, first):
            image, noise = f"{IMAGES}/{number:08d}.png", f"{NOISE}/{number:08d}.npy"
            assert sample.picture is not None
            Image.fromarray(sample.picture).save(folder / image)
            np.save(folder / noise, sample.x0, allow_pickle=False)
            label = "" if sample.label is None else sample.label
            table.writerow((image, sample.text or "", noise, label))
        (folder / f".rows-{k:06d}.csv").write_text(rows.getvalue())

    def join(self, folder: Path, built: Path, parts: list[int], facts: Facts) -> None:
        """Write the table."""
        with open(built / TABLE, "wb") as file:
            file.write((",".join(COLUMNS) + "\n").encode())
            for k in range(len(parts)):
                file.write((folder / f".rows-{k:06d}.csv").read_bytes())

    def read(self, folder: Path, told: dict[str, Any]) -> "TableReader":
        """As in `Format`."""
        return TableReader(folder, told)


class TableReader:
    """Rows of a table by their numbers.

    A picture is x1 in [-1, 1] where the noise has its shape; else told["encode"] makes states of it.
    Without a column noise, it is drawn from seed and rand_device, in bfloat16, as DiffSynth does.
    """

    def __init__(self, folder: Path, told: dict[str, Any]):
        self.folder, self.notes, self.times = folder, list[str](), list[float]()
        self.encode: Encode | None = told.get("encode")
        try:
            with open(folder / TABLE, newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{folder / TABLE} cannot be read: {error}") from None
        given = set(self.rows[0]) if self.rows else set()
        if "image" not in given or not given & {"noise", "seed"}:
            raise UserError(
                f"{folder / TABLE} has the columns {', '.join(sorted(map(str, given))) or 'none'}; "
                "expected image, and noise or seed"
            )
        self.count = len(self.rows)
        self.has = {name for name in given if any(row.get(name) for row in self.rows)}
        self.names = [TABLE, *(row["image"] for row in self.rows)]
        self.names += [row["noise"] for row in self.rows] if "noise" in self.has else []
        for name in self.names:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{folder / TABLE}: {name} lies outside of {folder}")

    def sample(self, i: int) -> Sample:
        """Read one row."""
        row = self.rows[i]
        path = self.folder / row["image"]
        if not path.is_file():
            raise UserError(f"{path} is missing")
        x1 = picture_at(path.read_bytes(), str(path))
        x0 = self._noise(i) if "noise" in self.has else None
        if self.encode is not None:
            x1 = self.encode(torch.from_numpy(x1)[None])[0].numpy()
        x0 = self._drawn(i, x1.shape) if x0 is None else x0
        if x0.shape != x1.shape:
            raise UserError(
                f"{path} is a picture of {list(x1.shape)}, its noise is "
                f"{list(x0.shape)}: give --pipeline, the pipeline whose VAE encodes it"
            )
        label = self._label(i) if "label" in self.has else None
        text = (row.get("prompt") or "") if "prompt" in self.has else None
        return Sample(x0, x1.astype(x0.dtype), label=label, text=text)

    def texts(self) -> list[str] | None:
        """As in `Reader`."""
        return [row["prompt"] or "" for row in self.rows] if "prompt" in self.has else None

    def labels(self) -> list[int] | None:
        """As in `Reader`."""
        return [self._label(i) for i in range(self.count)] if "label" in self.has else None

    def _label(self, i: int) -> int:
        label = self.rows[i]["label"] or ""
        if not label.isdecimal():
            raise UserError(f"{self.folder / TABLE}: label={label!r} of row {i + 1} is no number")
        return int(label)

    def _noise(self, i: int) -> np.ndarray:
        path = self.folder / self.rows[i]["noise"]
        try:
            return array_of(np.load(path, allow_pickle=False), str(path))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def _drawn(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        row, where = self.rows[i], f"{self.folder / TABLE}: row {i + 1}"
        device, seed = row.get("rand_device") or "cpu", row.get("seed") or ""
        if device != "cpu" or not seed.isdecimal():
            raise UserError(
                f"{where}: seed={seed!r}, rand_device={device}; only noise of a seed on the cpu can be "
                "drawn again"
            )
        generator = torch.Generator("cpu").manual_seed(int(seed))
        noise = torch.randn((1, *shape), generator=generator, dtype=torch.bfloat16)
        return noise[0].float().numpy()


def picture_at(content: bytes, where: str) -> np.ndarray:
    """Read a picture as float32 [C, H, W] in [-1, 1]; C is 1 for grey ones, else 3."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            whole = image.convert("L" if image.mode in ("1", "L") else "RGB")
            pixels = np.asarray(whole, dtype=np.float32)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{where} cannot be read as a picture: {error}") from None
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return pixels / np.float32(127.5) - np.float32(1)


def picture_of(x: np.ndarray) -> np.ndarray:
    """Turn a picture [C, H, W] in [-1, 1], C = 1 or 3, into uint8 [H, W] or [H, W, 3]."""
    pixels = np.rint((x.astype(np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
