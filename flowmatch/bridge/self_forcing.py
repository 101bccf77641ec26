"""Self-Forcing's LMDB: the points of a path a row, from noise to data.

`utils/lmdb.py` and `utils/dataset.py` of guandeh17/Self-Forcing: `latents_N_data` holds float16
[S, F, C, H, W], `prompts_N_data` UTF-8, and `latents_shape`, `prompts_shape` the shapes with the number
of rows first.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flowmatch.bridge.sample import (
    Facts,
    Sample,
    check_frames,
    chosen_times,
    from_frames,
    to_frames,
)
from flowmatch.config import UserError, require

ROWS = 8  # of a transaction; more of them are slower
PAGE = 4096


class SelfForcing:
    """The format."""

    name, half, pictures = "self-forcing", True, False

    def check(self, facts: Facts) -> list[str]:
        """As in `Format`."""
        require("lmdb", "bridge", "--to self-forcing")
        check_frames(self.name, facts.shape)
        notes = []
        if facts.dtype != "float16":
            notes.append("latents become float16, which is all that its loader reads")
        if not facts.labels:
            notes.append("the set has no prompts: each row has an empty one")
        if not facts.times:
            notes.append(
                "each row has two points, noise and data; states=[...] of the pairs adds more"
            )
        return notes

    def write(
        self, folder: Path, k: int, first: int, samples: Iterable[Sample], facts: Facts
    ) -> None:
        """As in `Format`: rows in a file of the part, which `join` brings together."""
        room = facts.count * self._row(facts)
        with opened(folder / f".part-{k:06d}.mdb", room) as env, Batches(env) as writer:
            row = np.empty((len(facts.times) + 2, *facts.shape), np.float16)
            for number, sample in enumerate(samples, first):
                row[0], row[-1] = sample.x0, sample.x1
                if sample.states is not None:
                    row[1:-1] = sample.states
                if facts.dtype != "float16" and not np.isfinite(row).all():
                    raise UserError(f"pair {number} holds values that float16 cannot")
                frames = np.ascontiguousarray(to_frames(row, len(facts.shape)))
                writer.put(f"latents_{number}_data".encode(), frames.data.cast("B"))
                writer.put(f"prompts_{number}_data".encode(), (sample.text or "").encode())

    def join(self, folder: Path, built: Path, parts: list[int], facts: Facts) -> None:
        """Bring the rows of all parts into one file, in the order of its keys."""
        one = (1, *facts.shape[1:]) if len(facts.shape) == 3 else facts.shape[1:]
        shape = (facts.count, len(facts.times) + 2, one[0], facts.shape[0], *one[1:])
        names = [f".part-{k:06d}.mdb" for k in range(len(parts))]
        room = facts.count * self._row(facts)
        with opened(built / "data.mdb", room) as env, Batches(env) as writer:
            for name in names:
                with opened(folder / name) as part, part.begin(buffers=True) as rows:
                    for key, value in rows.cursor():
                        writer.put(bytes(key), value)
            writer.put(b"latents_shape", " ".join(map(str, shape)).encode())
            writer.put(b"prompts_shape", str(facts.count).encode())

    def _row(self, facts: Facts) -> int:
        size = 2 * math.prod(facts.shape) * (len(facts.times) + 2)
        return size + 3 * PAGE + 16_384  # a prompt of four pages

    def read(self, folder: Path, told: dict[str, Any]) -> "LmdbReader":
        """As in `Format`."""
        require("lmdb", "bridge", "--from self-forcing")
        return LmdbReader(folder, told)


@contextmanager
def opened(path: Path, room: int = 0) -> Iterator[Any]:
    """Open an LMDB: a file, or a folder with data.mdb. room: bytes for what is written; 0 to read."""
    import lmdb

    try:
        if not room:
            how: dict[str, Any] = dict(readonly=True, lock=False, readahead=False, meminit=False)
        else:
            how = dict(map_size=2 * room + 2**26, sync=False, lock=False)
        env = lmdb.open(str(path), subdir=path.is_dir(), **how)
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read as an LMDB: {error}") from None
    try:
        yield env
        if room:
            env.sync(True)
    finally:
        env.close()


class Batches:
    """Puts rows into an LMDB in transactions of ROWS; a context, whose end writes the last of them."""

    def __init__(self, env: Any):
        self.env, self.count = env, 0

    def __enter__(self) -> "Batches":
        self.writing = self.env.begin(write=True)
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self.writing.commit()
        else:
            self.writing.abort()

    def put(self, key: bytes, value: Any) -> None:
        """Put a row; value: any buffer of bytes."""
        self.writing.put(key, value)
        self.count += 1
        if self.count % ROWS == 0:
            self.writing.commit()
            self.writing = self.env.begin(write=True)


class LmdbReader:
    """Rows of an LMDB by their numbers."""

    def __init__(self, folder: Path, told: dict[str, Any]):
        self.folder, self.notes, self.names = folder, list[str](), ["data.mdb"]
        if not (folder / "data.mdb").is_file():
            raise UserError(f"{folder} has no data.mdb; expected the folder of an LMDB")
        self._opened = opened(folder)
        self.env = self._opened.__enter__()
        try:
            shape = [int(size) for size in self._get("latents_shape").decode().split()]
        except ValueError:
            shape = []
        if len(shape) not in (5, 6) or min(shape) < 1:
            raise UserError(f"{folder}: latents_shape={shape}; expected [N, S, F, C, H, W]")
        if len(shape) == 5:
            raise UserError(
                f"{folder}: its rows are clean latents, {shape[1:]}; expected paths [S, F, C, H, W]"
            )
        self.count, self.shape = shape[0], tuple(shape[1:])
        if self.shape[0] < 2:
            raise UserError(f"{folder}: its paths have one point; expected noise and data at least")
        self.times = chosen_times(self.shape[0] - 2, told, self.notes)
        self.has_texts = any(self._text(i) for i in range(min(self.count, 16)))

    def _get(self, key: str) -> bytes:
        with self.env.begin() as rows:
            value = rows.get(key.encode())
        if value is None:
            raise UserError(f"{self.folder}: the LMDB has no {key}")
        return value  # type: ignore[no-any-return]

    def sample(self, i: int) -> Sample:
        """Read one row."""
        content = self._get(f"latents_{i}_data")
        if len(content) != 2 * math.prod(self.shape):
            raise UserError(
                f"{self.folder}: latents_{i}_data has {len(content)} bytes; expected float16 of "
                f"{list(self.shape)}"
            )
        row = from_frames(np.frombuffer(content, "<f2").reshape(self.shape))
        text = self._text(i) if self.has_texts else None
        return Sample(row[0], row[-1], row[1:-1] if self.times else None, text=text)

    def texts(self) -> list[str] | None:
        """As in `Reader`."""
        return [self._text(i) for i in range(self.count)] if self.has_texts else None

    def labels(self) -> list[int] | None:
        """As in `Reader`."""
        return None

    def _text(self, i: int) -> str:
        try:
            return self._get(f"prompts_{i}_data").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.folder}: prompts_{i}_data is not UTF-8: {error}") from None
