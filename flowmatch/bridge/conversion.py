"""A set of pairs as a foreign format, part by part, by any number of workers, verified at its end."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowmatch.bridge import parts
from flowmatch.bridge.diffsynth import picture_of
from flowmatch.bridge.sample import Facts, Format, Reader, Sample
from flowmatch.config import UserError
from flowmatch.pairs import leases
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import PROMPT, STATES
from flowmatch.runs import manifest, stopping, storage
from flowmatch.runs.storage import Store

if TYPE_CHECKING:
    from flowmatch.models.rows import Stored

STAGE = "convert"
VERSION = 1  # incremented when the same call would write other files
DECODED = 16  # states that are decoded together
CARRIED = (
    "times",
    "classes",
    "prompts",
    "script",
    "call",
    "latents",
    "id2label",
)  # facts of the pairs that stay true
Decode = Callable[[torch.Tensor, list[str]], torch.Tensor]  # states, prompts -> pictures in [0, 1]
ORIGIN = ("round", "kind", "evaluations")


@dataclass(frozen=True)
class Conversion:
    """What is converted, and to what.

    Args:
        data: the pairs.
        to: the format.
        out: the folder.
        table: text embeddings, or None.
        decode: makes pictures of states, or None where the pairs are pictures.
        names: of the classes by number; default: those of the pairs, or the number.
        lease_seconds: after which the part of a silent worker is taken over.
    """

    data: PairData
    to: Format
    out: Path
    table: "Stored | None" = None
    decode: Decode | None = None
    names: Sequence[str] = ()
    lease_seconds: float = 60.0
    inputs: dict[str, str] = field(default_factory=dict)

    @cached_property
    def facts(self) -> Facts:
        """What holds for all pairs."""
        data = self.data
        teacher = self.data.sealed["inputs"].get("teacher", "")
        return Facts(
            count=len(data),
            shape=data.shape,
            dtype=data.layout.dtype,
            times=data.times,
            prompts=data.has_prompts,
            labels=data.has_labels,
            embedding=self.table is not None,
            teacher=f"sha256:{teacher}",
        )

    @cached_property
    def texts(self) -> Sequence[str]:
        """Names of the classes by number; none where they have none."""
        kept = self.data.sealed["facts"].get("id2label") or {}
        return self.names or [kept[str(k)] for k in range(len(kept)) if str(k) in kept]

    @property
    def store(self) -> Store:
        """The folder."""
        return storage.at(self.out)

    @property
    def config(self) -> dict[str, Any]:
        """The options that decide the content."""
        names = list(self.names)
        return {"to": self.to.name, "version": VERSION} | ({"names": names} if names else {})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the content comes from."""
        return manifest.fingerprint({"config": self.config, "inputs": self.sources})

    @property
    def sources(self) -> dict[str, str]:
        """Digests of the inputs."""
        embeddings = {} if self.table is None else {"conditions": self.table.digest}
        return {"pairs": self.data.digest} | embeddings | self.inputs

    def check(self) -> list[str]:
        """Return what is lost, in lines; raise UserError for what cannot be converted."""
        facts, names = self.data.sealed["facts"], self.names
        classes = None if self.data.has_prompts else facts.get("classes")
        notes = self.to.check(self.facts)
        if names and len(names) != (classes or 0):
            raise UserError(
                f"--names has {len(names)} lines; the pairs have {classes or 'no'} classes"
            )
        if self.table is not None:
            theirs = self.table.sealed["facts"]["prompts"]
            if theirs != facts.get("prompts"):
                raise UserError(
                    f"--conditions={self.table.folder} is of other prompts: {theirs}; the pairs have "
                    f"{facts.get('prompts')}"
                )
        if self.to.pictures and self.decode is None and not picture_shape(self.data.shape):
            raise UserError(
                f"--to {self.to.name} holds pictures; these pairs are {list(self.data.shape)}: give "
                "--pipeline, the pipeline that decodes them"
            )
        if self.to.pictures and self.decode is not None and len(self.data.shape) > 3:
            raise UserError(f"--to {self.to.name} holds pictures, no videos; use another format")
        if classes is not None and not self.texts:
            notes.append(
                "the text of each pair is the number of its class; --names gives them names"
            )
        return notes

    # ---- the work

    def run(self) -> None:
        """Make the missing parts, join them, verify the whole, and seal it."""
        store, last = self.store, self.data.shards
        store.make(parts.META)
        parts.sweep(store)
        self._claim(range(last), self._left, self._build)
        self._claim(range(last, last + 1), parts.missing, self._join)
        parts.tidy(store, range(last))
        self.verify()
        self._seal()

    def _left(self, store: Store, numbers: Sequence[int], fingerprint: str) -> list[int]:
        """List the parts that are not made, of which another worker may have joined some by now."""
        joined = not parts.missing(store, [self.data.shards], fingerprint)
        return parts.missing(store, numbers, fingerprint, joined)

    def _claim(self, numbers: range, left: Any, build: Any) -> None:
        todo = leases.claim(
            self.store,
            numbers,
            numbers,
            self.fingerprint,
            self.lease_seconds,
            stopping.leave_if_asked,
            left,
        )
        with closing(todo):
            for k in todo:
                parts.make(self.store, k, self.fingerprint, partial(build, k))
                stopping.leave_if_asked()

    def _build(self, k: int, folder: Path) -> None:
        size = self.data.layout.shard_size
        samples = self.samples(range(k * size, (k + 1) * size))
        with ThreadPoolExecutor(1, "hash") as pool:  # of what is read and written meanwhile
            checked = pool.submit(self.data.unchecked(k))
            self.to.write(folder, k, k * size, samples, self.facts)
            checked.result()

    def _join(self, k: int, built: Path) -> None:
        sizes = [self.data.layout.shard_size] * self.data.shards
        self.to.join(self.out, built, sizes, self.facts)

    def samples(self, ids: range) -> Iterator[Sample]:
        """Yield pairs as samples, in their order."""
        if not self.to.pictures:
            for i in ids:
                stopping.leave_if_asked()
                yield self._sample(i)
            return
        for begin in range(0, len(ids), DECODED):
            some = [self._sample(i) for i in ids[begin : begin + DECODED]]
            stopping.leave_if_asked()
            for sample, picture in zip(some, self._pictures(some), strict=True):
                yield replace(sample, states=None, picture=picture)

    def _sample(self, i: int) -> Sample:
        found = self.data.stored(i)
        label = found.get("y")
        text = found.get(PROMPT)
        if text is None and label is not None:
            text = self.texts[label] if self.texts else str(label)
        embedding = None
        if self.table is not None and label is not None:
            rows = self.table.row(label)
            order = sorted(rows, key=lambda name: (-rows[name].dim(), name))
            embedding = [rows[name].squeeze(0) for name in order]
        return Sample(found["x0"], found["x1"], found.get(STATES), label, text, embedding)

    def _pictures(self, samples: list[Sample]) -> list[np.ndarray]:
        states = [sample.x1 for sample in samples if sample.x1 is not None]
        if self.decode is None:
            return [picture_of(x) for x in states]
        stacked = torch.from_numpy(np.stack(states).astype(np.float32))
        shown = self.decode(stacked, [sample.text or "" for sample in samples])
        return [picture_of(2 * x - 1) for x in shown.numpy()]

    # ---- the end

    def verify(self) -> None:
        """Read the first and last sample of each shard, and compare them with their pairs.

        Raises:
            UserError: They differ, or the number of samples does.
        """
        told: dict[str, Any] = {"times": self.data.times} if self.data.times else {}
        if self.decode is not None:  # its pictures are not encoded again
            told["encode"] = lambda x: torch.zeros(len(x), *self.data.shape)
        reader = self.to.read(self.out, told)
        if reader.count != len(self.data):
            raise UserError(f"{self.out} has {reader.count} samples; expected {len(self.data)}")
        size = self.data.layout.shard_size
        for k in range(self.data.shards):
            self.data.unchecked(k)  # whoever made its part has hashed it
            for i in dict.fromkeys((k * size, (k + 1) * size - 1)):
                self._compare(reader, i)
            stopping.leave_if_asked()

    def _compare(self, reader: Reader, i: int) -> None:
        ours = self._sample(i)
        theirs = reader.sample(i)
        for name in ["x0"] if self.to.pictures else ["x0", "x1", "states"]:
            expected, found = getattr(ours, name), getattr(theirs, name)
            if expected is not None and self.to.half:
                expected = expected.astype(np.float16)
            if expected is not None and not np.array_equal(expected, found):
                raise UserError(
                    f"{self.out}: {name} of sample {i} is not that of its pair; delete the folder and "
                    "convert again"
                )

    def _seal(self) -> None:
        kept = self.data.sealed["facts"]
        facts = {name: kept[name] for name in CARRIED if name in kept}
        facts |= {"shape": list(self.data.shape), "count": len(self.data), "unit": self.to.name}
        config = self.data.sealed["config"]
        facts["origin"] = {
            **{name: kept[name] for name in ORIGIN if name in kept},
            **{name: config[name] for name in ("solver", "guidance", "seed") if name in config},
            "teacher": self.data.sealed["inputs"].get("teacher"),
        }
        side = self.store.read(parts.sidecar_name(self.data.shards))
        files = (parts.facts_of(side) or {"files": {}})["files"]
        small = [name for name, bytes_ in files.items() if bytes_ < 2**26]
        manifest.seal(
            self.store,
            stage=STAGE,
            config=self.config,
            inputs=self.sources,
            outputs=small,
            **facts,
        )


def picture_shape(shape: tuple[int, ...]) -> bool:
    """Return whether samples of a shape are pictures as they are: [1 or 3, H, W]."""
    return len(shape) == 3 and shape[0] in (1, 3)
