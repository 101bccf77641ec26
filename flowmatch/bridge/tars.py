"""Webdataset tars with a sample a key: FastGen's, and plain npy members that any pipeline reads.

Both are written by webdataset's own writer, one tar a part, and read by the offsets of their members.
FastGen (NVlabs/FastGen, `fastgen/datasets/wds_dataloaders.py`) maps latent.pth, noise.pth, path.pth and
txt_emb.pth to what its knowledge distillation reads; its tars have numbers as names.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flowmatch.bridge.sample import (
    Facts,
    Sample,
    array_of,
    chosen_times,
    read_pickle,
    saved,
    tensor_of,
)
from flowmatch.config import UserError

Index = list[tuple[str, dict[str, tuple[int, int]]]]  # tar, and member -> its offset and size
COUNTS, ABOUT = "shard_count.json", "index.json"
WHOLE = 2**40  # bytes of a member that are handed over at once: all
PATH = 4  # points of a path that FastGen's knowledge distillation in several steps reads


def index_of(folder: Path) -> Index:
    """List the samples of all tars of a folder: the members that share a key.

    Raises:
        UserError: There is no tar, or one cannot be read.
    """
    found: Index = []
    names = sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        raise UserError(f"{folder} holds no *.tar; expected a folder of webdataset tars")
    for name in names:
        last = None
        try:
            with tarfile.open(folder / name, "r:") as tar:
                for info in tar:
                    place, _, file = info.name.rpartition("/")
                    stem, _, member = file.partition(".")
                    if not info.isfile():
                        continue
                    if (place, stem) != last:
                        found.append((name, {}))
                        last = (place, stem)
                    found[-1][1][member.lower()] = (info.offset_data, info.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{folder / name} cannot be read as a tar: {error}") from None
    return found


def npy(array: np.ndarray) -> bytes:
    """Return an array as the bytes of a .npy file."""
    head = npy_head(array.dtype.str, array.shape)
    return b"".join((head, np.ascontiguousarray(array).data.cast("B")))


@cache
def npy_head(kind: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file; kind: the dtype, as `dtype.str`."""
    file = io.BytesIO()
    entries = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, entries)
    return file.getvalue()


class TarReader:
    """Samples of tars by their numbers.

    Args:
        folder: of the tars.
        told: facts that are known of them.
        members: name of each array -> its member.
    """

    def __init__(self, folder: Path, told: dict[str, Any], members: dict[str, str]):
        self.folder, self.members = folder, members
        self.index = index_of(folder)
        self.count, self.notes = len(self.index), list[str]()
        self.names = sorted({name for name, _ in self.index})
        self._open: dict[str, int] = {}
        first = self.index[0][1]
        needed = {members["x1"], members["x0"] if members["x0"] in first else members["path"]}
        if lacking := needed - first.keys():
            raise UserError(
                f"{folder}: its samples have {', '.join(sorted(first))}; expected "
                f"{' and '.join(sorted(lacking))}"
            )
        self.whole = (
            members["path"] in first and members["x0"] not in first
        )  # noise is its first point
        if members["path"] in first:
            states = len(self._array(0, members["path"])) - (
                1 if members["path"] == "path.pth" else 0
            )
            self.times = chosen_times(states, told, self.notes)
        else:
            self.times = []
        if "txt_emb.pth" in first:
            self.notes.append(
                "txt_emb.pth is left out: flowmatch encodes prompts itself (encode_prompts)"
            )

    def sample(self, i: int) -> Sample:
        """Read one sample."""
        names, states = self.members, None
        given = self.index[i][1]
        if self.whole or self.times:
            states = self._array(i, names["path"])
        x0 = states[0] if self.whole and states is not None else self._array(i, names["x0"])
        if states is not None and names["path"] == "path.pth":
            states = states[1:]
        x1, kept = self._array(i, names["x1"]), states if self.times else None
        label = self._label(i) if "cls" in given else None
        return Sample(x0, x1, kept, label, self._text(i) if "txt" in given else None)

    def texts(self) -> list[str] | None:
        """As in `Reader`."""
        whole = "txt" in self.index[0][1]
        return [self._text(i) for i in range(self.count)] if whole else None

    def labels(self) -> list[int] | None:
        """As in `Reader`."""
        whole = "cls" in self.index[0][1]
        return [self._label(i) for i in range(self.count)] if whole else None

    def _text(self, i: int) -> str:
        try:
            return self._content(i, "txt").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self._where(i, 'txt')} is not UTF-8: {error}") from None

    def _label(self, i: int) -> int:
        content = self._content(i, "cls")
        if not content.strip().isdigit():
            raise UserError(f"{self._where(i, 'cls')} is {content[:20]!r}; expected a number")
        return int(content)

    def _where(self, i: int, member: str = "") -> str:
        name = self.index[i][0]
        return f"{self.folder / name}: sample {i}{member and f', {member}'}"

    def _content(self, i: int, member: str) -> bytes:
        name, places = self.index[i]
        if member not in places:
            raise UserError(f"{self._where(i)} lacks {member}")
        if name not in self._open:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open = {name: os.open(self.folder / name, os.O_RDONLY)}
        offset, size = places[member]
        return os.pread(self._open[name], size, offset)

    def _array(self, i: int, member: str) -> np.ndarray:
        content, where = self._content(i, member), self._where(i, member)
        if member.endswith(".pth"):
            return array_of(read_pickle(content, where), where)
        try:
            return array_of(np.load(io.BytesIO(content), allow_pickle=False), where)
        except (ValueError, EOFError) as error:
            raise UserError(f"{where} is no .npy file: {error}") from None


class Tars:
    """A format of webdataset tars."""

    half = pictures = False

    def __init__(self, name: str, members: dict[str, str]):
        self.name, self.members = name, members

    def check(self, facts: Facts) -> list[str]:
        """As in `Format`."""
        if self.name == "npy":
            return []
        notes = []
        if not facts.embedding:
            notes.append(
                "txt_emb.pth is left out; for prompts give --conditions, a folder of encode_prompts"
                if facts.prompts
                else "txt_emb.pth is left out: the set has no prompts"
            )
        if facts.times and len(facts.times) + 1 != PATH:
            notes.append(
                f"path.pth has {len(facts.times) + 1} points; FastGen trains several steps on {PATH}, "
                f"the noise and {PATH - 1} states"
            )
        return notes

    def write(
        self, folder: Path, k: int, first: int, samples: Iterable[Sample], facts: Facts
    ) -> None:
        """As in `Format`."""
        import webdataset

        with (
            open(folder / f"{k:06d}.tar", "wb") as file,
            tarfile.TarFile(fileobj=file, mode="w", copybufsize=WHOLE) as stream,
            webdataset.TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            tar.tarstream = stream  # in place of its own, which copies in small pieces
            for number, sample in enumerate(samples, first):
                tar.write({"__key__": f"{number:08d}"} | self._members(sample))

    def _members(self, sample: Sample) -> dict[str, bytes]:
        dump = (lambda array: saved(tensor_of(array))) if self.name == "fastgen" else npy
        assert sample.x1 is not None
        arrays = {"x0": sample.x0, "x1": sample.x1}
        if sample.states is not None:
            arrays["path"] = sample.path if self.name == "fastgen" else sample.states
        found = {self.members[name]: dump(array) for name, array in arrays.items()}
        if sample.embedding is not None and self.name == "fastgen":
            parts = sample.embedding
            found["txt_emb.pth"] = saved(parts[0] if len(parts) == 1 else parts)
        if sample.text is not None:
            found["txt"] = sample.text.encode()
        if sample.label is not None:
            found["cls"] = str(sample.label).encode()
        return found

    def join(self, folder: Path, built: Path, parts: list[int], facts: Facts) -> None:
        """Write the numbers of samples, and FastGen's times of a path."""
        counts = {f"{k:06d}.tar": count for k, count in enumerate(parts)}
        (built / COUNTS).write_text(json.dumps(counts, indent=1) + "\n")
        if facts.times and self.name == "fastgen":
            sigmas = [1.0, *(1 - t for t in facts.times)]
            (built / ABOUT).write_text(json.dumps({"path_timesteps": sigmas}) + "\n")

    def read(self, folder: Path, told: dict[str, Any]) -> TarReader:
        """As in `Format`."""
        return TarReader(folder, told, self.members)


FASTGEN = Tars("fastgen", {"x0": "noise.pth", "x1": "latent.pth", "path": "path.pth"})
NPY = Tars("npy", {"x0": "x0.npy", "x1": "x1.npy", "path": "xt.npy"})
