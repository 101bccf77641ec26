"""Lists of prompts: read, checked, divided into training and held-out ones, and numbered.

A prompt is a condition, and what travels through pairs and training is its number in the list. The
texts are taken as they stand: nothing is stripped, and a prompt that cannot be meant is refused with
its line or row.
"""

import csv
import hashlib
import itertools
import json
import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from tarfile import TarError
from typing import Any

import numpy as np

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig, places
from flowmatch.data.prompt_sources import Source, open_sources
from flowmatch.flow import noise

SHOWN = 8  # faults of a list
# Control characters except tab and newline, a mark of byte order, and what UTF-8 cannot write.
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class PromptList:
    """The prompts of a run.

    **Growth.** A set of pairs may grow by prompts at the end of its list. The number of a pair is drawn
    among the `count` prompts that there were when its shard was planned, with
    `first(count).number(seed, ids)`, a function of (seed, i, count) alone. A set therefore stores
    `count` and `digest_of(count)` for its shards, takes a longer list whose first prompts have that
    digest, and draws for the shards that it adds among all of them. Finished shards keep their numbers,
    and each range of shards is uniform, or as the weights say, over the prompts that it knew. (To
    number pairs i mod count would need the same record.)

    Args:
        texts: training prompts; a prompt's number is its place here.
        held_out: prompts for evaluation, none of them a training prompt.
        weights: float64 [len(texts)], positive, or None where all prompts are drawn alike.
        negative: the negative prompt of guided runs.
    """

    texts: list[str]
    held_out: list[str]
    weights: np.ndarray | None = None
    negative: str | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int) -> "PromptList":
        """Return the list as it was when it had `count` training prompts."""
        if not 1 <= count <= len(self):
            raise ValueError(f"count={count}: expected 1 to {len(self)} prompts")
        weights = None if self.weights is None else self.weights[:count]
        return replace(self, texts=self.texts[:count], weights=weights)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of the training prompts in their order, the weights and the negative."""
        sha = hashlib.sha256(json.dumps([self.negative, self.weights is not None]).encode())
        weights = itertools.repeat(None) if self.weights is None else self.weights.tolist()
        for text, weight in zip(self.texts, weights, strict=False):
            sha.update(json.dumps([text, weight]).encode())
        return sha.hexdigest()

    def digest_of(self, count: int) -> str:
        """Return the digest of the list as it was when it had `count` training prompts."""
        return self.first(count).digest

    @cached_property
    def longest(self) -> str:
        """The training prompt with most characters, the first of several."""
        return max(self.texts, key=len)

    def number(self, seed: int, ids: Iterable[int]) -> np.ndarray:
        """Draw the prompts of some pairs; each depends on (seed, i) and this list alone.

        Args:
            seed: of the set of pairs.
            ids: numbers of the pairs.

        Returns:
            Numbers of prompts, int64 [len(ids)]: uniform, as `noise.labels` draws classes, or in
            proportion to the weights.
        """
        if self.weights is None:
            return noise.labels(seed, ids, len(self))
        draws = [noise.generator(seed, i, noise.PAIR_LABEL).random() for i in ids]
        return np.searchsorted(self._edges, np.array(draws), side="right").astype(np.int64)

    @cached_property
    def _edges(self) -> np.ndarray:
        """The inner edges of the prompts' intervals in [0, 1)."""
        assert self.weights is not None
        sums = np.cumsum(self.weights)
        return sums[:-1] / sums[-1]


def load(config: PromptsConfig, key: str = "prompts") -> PromptList:
    """Read and check the lists that a config names.

    With a share as `held_out` a prompt is held out where sha256 of its text, as a number in [0, 1), lies
    below the share. The side of a prompt thus depends on nothing but its text and the share: prompts
    that are added or moved change no other's, and a larger share keeps all that a smaller one held out.

    Args:
        config: of the prompts.
        key: the key of that config, for errors.

    Raises:
        NotReady: A file does not exist.
        UserError: A list cannot be read, or has prompts that are empty, doubled or not plain text.
    """
    sources = [Source(f"{key}.templates", "prompt", ((t, 1.0) for t in _expand(config)))]
    if config.path:
        sources += open_sources(config.path, config, f"{key}.path={config.path}", key)
    texts, weights = _checked(sources)
    kept: Sequence[int] = range(len(texts))
    where = f"{key}.held_out={config.held_out}"
    if isinstance(config.held_out, str):
        column = None if config.held_out.lower().endswith(".txt") else config.column
        other = PromptsConfig(path=config.held_out, column=column)
        sources = list(open_sources(config.held_out, other, where, f"{key}.held_out"))
        held_out, _ = _checked(sources, set(texts))
    else:
        share = config.held_out
        sides = [share > 0 and _place(text) < share for text in texts]
        held_out = list(itertools.compress(texts, sides))
        kept = [i for i, side in enumerate(sides) if not side]
        if not kept or (share and not held_out):
            raise UserError(
                f"{where}: {len(held_out)} of the {len(texts)} prompts fall in this share; expected "
                "some on either side: use another share, or the path of a list"
            )
    drawn = np.array(weights)[kept] if config.weight_column else None
    return PromptList([texts[i] for i in kept], held_out, drawn, config.negative)


def numbered(rows: Iterable[Any], where: str) -> tuple[list[str], np.ndarray]:
    """Number the captions of pictures.

    Args:
        rows: the caption of each picture.
        where: key and value of the data, for errors.

    Returns:
        The distinct captions in the order of their first use, and the number of each picture's, int64
        [N].

    Raises:
        UserError: Some are empty or no plain text; the message names the first rows.
    """
    known: dict[str, int] = {}
    numbers, faults = array("q"), []
    for row, text in enumerate(rows):
        if flaw := _flaw(text):
            faults.append(f"{where}: the caption of row {row} {flaw}")
        else:
            numbers.append(known.setdefault(text, len(known)))
    if len(faults) > SHOWN:
        faults[SHOWN:] = [f"{where}: {len(faults) - SHOWN:,} more faults like these"]
    if faults:
        raise UserError(faults)
    return list(known), np.array(numbers, dtype=np.int64)


def _place(text: str) -> float:
    """Return the place of a prompt in [0, 1), from its text."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) + 0.5) / 2**48


def _expand(config: PromptsConfig) -> Iterator[str]:
    for template in config.templates:
        names = places(template)
        for words in itertools.product(*(config.words[name] for name in names)):
            yield template.format(**dict(zip(names, words, strict=True)))


def _checked(sources: list[Source], taken: Collection[str] = ()) -> tuple[list[str], array]:
    """Read all prompts and their weights; raise UserError with the first faults and their number.

    taken: prompts that may not be among them.
    """
    texts: list[str] = []
    weights, starts = array("d"), []
    faults: list[str] = []

    def place(source: Source, row: int) -> str:
        return f"{source.name}: {source.unit} {row}"

    for source in sources:
        starts.append(len(texts))
        try:
            for row, (text, weight) in enumerate(source.rows, 1):
                flaw = _flaw(text) or _flaw_of_weight(weight)
                if not flaw and text in taken:
                    flaw = "is a training prompt; remove it"
                if flaw:
                    faults.append(f"{place(source, row)} {flaw}")
                texts.append("" if flaw else text)  # one a row, so that places are known
                weights.append(1.0 if flaw else float(weight))
        except UserError:
            raise
        except (OSError, ValueError, TarError, csv.Error) as error:
            reason = next((arg for arg in error.args if isinstance(arg, str)), error)
            raise UserError(f"{source.name} cannot be read: {reason}") from None
    if len(set(texts)) < len(texts):
        seen: dict[str, str] = {}
        for i, text in enumerate(texts):
            number = bisect_right(starts, i) - 1
            here = place(sources[number], i - starts[number] + 1)
            if text and seen.setdefault(text, here) != here:
                faults.append(
                    f"{here} repeats {seen[text].removeprefix(sources[number].name + ': ')}"
                )
    if len(faults) > SHOWN:
        faults[SHOWN:] = [f"{sources[-1].name}: {len(faults) - SHOWN:,} more faults like these"]
    if not texts:
        faults.append(f"{sources[-1].name} has no prompts")
    if faults:
        raise UserError(faults)
    return texts, weights


def _flaw(text: Any) -> str:
    """Say what is wrong with a prompt, or ""."""
    if isinstance(text, ValueError):
        return str(text)
    if not isinstance(text, str):
        return f"holds {text!r:.60}; expected a string"
    if not text.strip():
        return "is empty; remove it"
    found = UNFIT.search(text)
    if found and "\ud800" <= found[0] <= "\udfff":
        return "is not UTF-8; save the list as UTF-8"
    return f"holds the character U+{ord(found[0]):04X}; remove it" if found else ""


def _flaw_of_weight(weight: Any) -> str:
    try:
        good = not isinstance(weight, bool) and 0 < float(weight) < math.inf
    except (TypeError, ValueError, OverflowError):
        good = False
    return "" if good else f"has the weight {weight!r:.60}; expected a positive number"
