"""A set in a foreign format as a sealed set of our own, of kind `imported`."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flowmatch.bridge import conversion
from flowmatch.bridge.formats import READERS
from flowmatch.bridge.sample import Reader, Sample
from flowmatch.config import UserError
from flowmatch.data.prompts import PromptList
from flowmatch.pairs import card, leases, shards
from flowmatch.pairs.layout import Layout, bytes_per_pair
from flowmatch.runs import manifest, stopping, storage
from flowmatch.runs.files import write_atomic
from flowmatch.runs.storage import Store

STAGE, PROMPTS = "import", "prompts.jsonl"
SHARD, FEW = 4096, 64  # pairs of a shard by default; a set without a divisor between is one shard
LARGEST = 10**6  # pairs of a shard
MEMBER = 2**20  # bytes of an array of a block
KEPT = ("script", "call", "latents", "id2label")  # facts of a converted set that stay true
GIVEN = ("times", "encode")  # on the command line
FACTS = ("teacher", "solver", "guidance", "round")  # of the pairs, unknown where nothing tells


def told_of(folder: Path) -> dict[str, Any]:
    """Return the facts that `convert` has written beside a set; {} for a set of others.

    Raises:
        UserError: They are damaged.
    """
    file = folder / manifest.NAME
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(
            f"{file} is damaged, and tells no more what the set is; convert the pairs again, or remove "
            "the file to import a set of unknown origin"
        ) from None
    if not isinstance(found, dict) or found.get("stage") != conversion.STAGE:
        return {}
    return dict(manifest.read(folder, "FOLDER", [conversion.STAGE])["facts"])


def digest_of(folder: Path, reader: Reader) -> str:
    """Hash the files of a set, with their names."""
    sums = {}
    for name in reader.names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing")
        sums[name] = manifest.sha256_file(folder / name)
        stopping.leave_if_asked()
    return manifest.fingerprint(sums)


def shard_size_of(count: int) -> int:
    """Choose the pairs of a shard: the largest divisor up to SHARD, or all where there is a small one.

    Raises:
        UserError: The count has no fitting divisor.
    """
    best = max(size for size in range(1, min(count, SHARD) + 1) if count % size == 0)
    if best >= min(FEW, count):
        return best
    if count <= LARGEST:
        return count
    raise UserError(f"{count:,} pairs have no divisor from {FEW} to {SHARD}; set --count to fewer")


@dataclass(frozen=True)
class Import:
    """What is imported.

    Args:
        folder: of the set.
        format: its name.
        out: folder of the new set.
        told: facts of the set that are known.
        count: pairs to take, the first ones; default: all.
        shard_size: pairs in a shard; default: `shard_size_of`.
        lease_seconds: after which the shard of a silent worker is taken over.
    """

    folder: Path
    format: str
    out: Path
    told: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    shard_size: int | None = None
    lease_seconds: float = 60.0

    @cached_property
    def reader(self) -> Reader:
        """The set."""
        reader = READERS[self.format](self.folder, self.told)
        if reader.count < 1:
            raise UserError(f"{self.folder} has no samples")
        return reader

    @property
    def store(self) -> Store:
        """The folder of the new set."""
        return storage.at(self.out)

    @cached_property
    def number(self) -> int:
        """Number of pairs."""
        if self.count is not None and not 1 <= self.count <= self.reader.count:
            raise UserError(
                f"--count={self.count}: expected 1 to {self.reader.count}, the samples of {self.folder}"
            )
        return self.count or self.reader.count

    @cached_property
    def prompts(self) -> list[str] | None:
        """The texts of all pairs, or None where they are no prompts."""
        texts = self.reader.texts()
        names_of_classes = self.told.get("classes") is not None and not self.told.get("prompts")
        return None if texts is None or names_of_classes else texts[: self.number]

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class or prompt of each pair: the set's own where it has them, else prompts by appearance."""
        labels = self.reader.labels()
        if self.prompts is not None and not (labels and self.told.get("prompts")):
            numbers = {text: i for i, text in enumerate(self.distinct)}
            labels = [numbers[text] for text in self.prompts]
        return None if labels is None else np.array(labels[: self.number], dtype=np.int64)

    @cached_property
    def distinct(self) -> list[str]:
        """The different prompts, in the order in which they appear."""
        return list(dict.fromkeys(self.prompts or []))

    @cached_property
    def classes(self) -> int | None:
        """Number of classes or prompts."""
        if self.labels is None:
            return None
        most = int(self.labels.max()) + 1
        known = self.told.get("classes") if self.prompts is None else None
        if self.prompts is not None:
            listed = self.told.get("prompts") if self.reader.labels() else None
            known = listed["count"] if listed else len(self.distinct)
        if known is not None and known < most:
            raise UserError(f"{self.folder}: a label is {most - 1}; expected less than {known}")
        return known or most

    @cached_property
    def layout(self) -> Layout:
        """The layout of the new set."""
        first = self.reader.sample(0)
        size = self.shard_size or shard_size_of(self.number)
        if self.number % size:
            divisors = [d for d in range(1, self.number + 1) if self.number % d == 0]
            raise UserError(
                f"--shard-size={size} does not divide {self.number} pairs; divisors: "
                f"{', '.join(map(str, divisors[-12:]))}"
            )
        arrays = [array for array in (first.x0, first.x1, first.states) if array is not None]
        return Layout(
            shape=first.x0.shape,
            dtype=max((array.dtype for array in arrays), key=lambda kind: kind.itemsize).name,
            labels=self.labels is not None,
            shard_size=size,
            block=max(1, min(64, size, MEMBER // first.x0.nbytes)),
            prompt_bytes=bytes_per_pair(self.distinct) if self.prompts is not None else 0,
            states=len(self.reader.times or []),
        )

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The digest of the set, and of what is known of it."""
        known = {name: fact for name, fact in self.told.items() if name not in GIVEN}
        facts = {"facts": manifest.fingerprint(known)} if known else {}
        return {"source": digest_of(self.folder, self.reader)} | facts

    @property
    def config(self) -> dict[str, Any]:
        """The options that decide the content."""
        sizes = {"shard_size": self.layout.shard_size, "block": self.layout.block}
        return {"format": self.format, "count": self.number, "times": self.times} | sizes

    @property
    def times(self) -> list[float]:
        """Times of the states."""
        return list(self.reader.times or [])

    @property
    def origin(self) -> dict[str, Any]:
        """What is known of the pairs' making."""
        origin = self.told.get("origin") or {}
        return {name: value for name, value in origin.items() if value is not None}

    @property
    def unknown(self) -> list[str]:
        """What is not known of it."""
        return [name for name in FACTS if name not in self.origin]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the bytes come from."""
        return manifest.pair_fingerprint(self.config, self.inputs, self.round)

    @property
    def round(self) -> int:
        """Round of the teacher; 0 where it is unknown."""
        return int(self.origin.get("round", 0))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.number // self.layout.shard_size

    def lines(self) -> list[str]:
        """Describe the new set."""
        layout = self.layout
        kinds = "no labels" if self.labels is None else f"{self.classes:,} classes"
        if self.prompts is not None:
            kinds = f"{len(self.distinct):,} prompts"
        unknown = ", ".join(self.unknown)
        return [
            f"{self.number:,} pairs of {list(layout.shape)} in {self.shards} shards, {layout.dtype}, "
            f"{kinds}, {layout.states} states; {self.shards * layout.tar_bytes / 1e6:,.1f} MB on disk",
            *self.reader.notes,
            *([f"unknown, and so in the manifest: {unknown}"] if unknown else []),
        ]

    # ---- the work

    def run(self) -> None:
        """Make the missing shards, and seal the set."""
        store, every = self.store, range(self.shards)
        store.make()
        about = card.imported(self.number, self.layout, self.format, self.unknown)
        environment = {"imported": self.format}
        todo = leases.claim(
            store, every, every, self.fingerprint, self.lease_seconds, stopping.leave_if_asked
        )
        with closing(todo):
            for k in todo:
                blocks = self._blocks(k)
                try:
                    shards.write_shard(
                        store, k, self.layout, blocks, self.fingerprint, environment, about
                    )
                except shards.Vanished:
                    continue
                stopping.leave_if_asked()
        if self.prompts is not None and not self.told.get("prompts"):
            rows = (json.dumps({"prompt": text}, ensure_ascii=False) for text in self.distinct)
            write_atomic(self.out / PROMPTS, "\n".join(rows) + "\n")
        self._seal()

    def _blocks(self, k: int) -> Iterator[Any]:
        layout = self.layout
        for block in range(layout.blocks):
            stopping.leave_if_asked()
            ids = layout.numbers(k, block)
            some = [self._checked(i) for i in ids.tolist()]
            x0, x1 = (np.stack([getattr(one, name) for one in some]) for name in ("x0", "x1"))
            y = None if self.labels is None else self.labels[ids]
            more: list[Any] = [np.stack([one.states for one in some])] if layout.states else []  # type: ignore[misc]
            if self.prompts is not None:
                more.append([self.prompts[i] for i in ids.tolist()])
            yield x0, x1, y, *more

    def _checked(self, i: int) -> Sample:
        sample, layout = self.reader.sample(i), self.layout
        kind = np.dtype(layout.dtype)
        for name, lead in (("x0", ()), ("x1", ()), ("states", (layout.states,))):
            array = getattr(sample, name)
            if name == "states" and not layout.states:
                continue
            if array is None or array.shape != (*lead, *layout.shape):
                told = "missing" if array is None else list(array.shape)
                raise UserError(
                    f"{self.folder}: {name} of sample {i} is {told}; that of sample 0 is "
                    f"{[*lead, *layout.shape]}"
                )
            if array.dtype.itemsize > kind.itemsize:
                raise UserError(
                    f"{self.folder}: {name} of sample {i} is {array.dtype}; sample 0 is {kind}"
                )
            sample = replace(sample, **{name: array.astype(kind, copy=False)})
        return sample

    def _seal(self) -> None:
        kept = {name: self.told[name] for name in KEPT if name in self.told}
        listed = self.told.get("prompts")
        if self.prompts is not None and not listed:
            texts = PromptList(self.distinct, [])
            listed = {"count": len(texts), "digest": texts.digest}
        sides = shards.sidecars(self.store, range(self.shards))
        manifest.seal(
            self.store,
            stage=STAGE,
            config=self.config,
            inputs=self.inputs,
            outputs={shards.tar_name(k): side["sha256"] for k, side in enumerate(sides) if side},
            fingerprint=self.fingerprint,
            kind="imported",
            format=self.format,
            unknown=self.unknown,
            origin=self.origin,
            round=self.round,
            classes=self.classes,
            evaluations=self.origin.get("evaluations"),
            layout=self.layout.entries(),
            shards=self.shards,
            count=self.number,
            convention="x0 noise, x1 data, x_t = (1 - t) x0 + t x1, v = x1 - x0",
            **({"times": self.times} if self.times else {}),
            **({"prompts": listed} if self.prompts is not None else {}),
            **kept,
        )
