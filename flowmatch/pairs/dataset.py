"""The pair store in training: any pair by its number, read from memory-mapped tars.

The offset of a pair is computed from the manifest's layout, so a set of ten million pairs opens at
once, and a batch in any order is one gather. The tars of a set in an object store are fetched whole to
a local folder (`flowmatch.pairs.cache`) and mapped there.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from flowmatch.config import UserError
from flowmatch.flow import noise
from flowmatch.flow.noise import GroupedOrder, Order
from flowmatch.pairs.cache import Cache, default_folder, repair, room
from flowmatch.pairs.layout import (
    PROMPT,
    STATES,
    Layout,
    head_bytes,
    npy_header,
    read_prompts,
    shape_of,
)
from flowmatch.pairs.shards import tar_name
from flowmatch.runs import manifest, storage
from flowmatch.runs.storage import Bucket, Place

SHOWN = 8  # damaged shards that an error lists
TEXTS = 256  # blocks whose parsed prompts are kept
READ = 1 << 24  # values of x0 that a pass over a set reads at once


def transport_cost(x0: torch.Tensor, x1: torch.Tensor) -> np.ndarray:
    """Return |x1 - x0|^2 of pairs [B, *shape]; float64 [B].

    The difference is taken in the dtype of the tensors and summed in float64, with the same result for
    any number of torch's threads.
    """
    difference = (x1 - x0).flatten(1).numpy().astype(np.float64)
    return np.einsum("bd,bd->b", difference, difference)


class PairData(Dataset[dict[str, Any]]):
    """Map-style dataset of the pairs of a sealed folder or URL, numbered from 0 to count - 1.

    Pair i is pair i % shard_size of shard i // shard_size. A tar is mapped, and hashed, when it is first
    read, by each process for itself; the mappings hold no file descriptors.
    """

    def __init__(
        self,
        folder: Place,
        key: str = "pairs",
        group: int = 0,
        cache: str | os.PathLike[str] | None = None,
        cache_gb: float | None = None,
        states: bool = False,
    ):
        """Open a set.

        Args:
            folder: path or URL of a sealed set.
            key: the config key that names the folder, for errors.
            group: shards that `order` shuffles together; 0 for all.
            cache: local folder for the tars of a URL; default: in the user's cache folder.
            cache_gb: 10^9 bytes that they may take there; default: nine tenths of the free space.
            states: whether batches hold the states of the paths, which take K times the bytes of x1.

        Raises:
            UserError: if the set is not sealed, or shards are missing or have another size than their
                layout requires; lists them.
        """
        self.folder, self.key, self.group = storage.at(folder), key, group
        options = {"cache": cache, "cache_gb": cache_gb}
        useless = [f"{name}={value}" for name, value in options.items() if value is not None]
        if useless and not isinstance(self.folder, Bucket):
            raise UserError(
                f"{key}={folder}: {', '.join(useless)} has no effect, because a local folder is read "
                "without a cache; remove it, or give the URL of a store"
            )
        self.sealed, self.digest = manifest.read_hashed(self.folder, key, manifest.PAIR_STAGES)
        facts = self.sealed["facts"]
        try:
            self.layout = Layout(**facts["layout"])
            self.shards, count = int(facts["shards"]), int(facts["count"])
            self.seed = 0 if self.layout.noise else int(self.sealed["config"]["seed"])
        except (KeyError, TypeError, OverflowError, ValueError) as error:
            raise UserError(f"{key}={folder} is not a folder of pairs: {error!r}") from None
        if self.shards < 1 or count != self.shards * self.layout.shard_size:
            raise UserError(
                f"{key}={folder}: its manifest has count={count}; expected shards={self.shards} x "
                f"shard_size={self.layout.shard_size}, with 1 shard at least; {self._repair}"
            )
        if len(self.times) != self.layout.states:
            raise UserError(
                f"{key}={folder}: its manifest gives {len(self.times)} times of states, and its layout "
                f"has {self.layout.states}; {self._repair}"
            )
        if states and not self.times:
            raise UserError(f"{key}={folder} has no states of the paths; make it with states=[...]")
        self.reads_states = states
        self._check_tars()
        self._sound: set[int] = set()  # shards whose tars are those that were sealed
        self._full = self._heads(0)
        self._last = self._heads(self.layout.blocks - 1)
        self._maps: dict[int, np.ndarray] = {}
        self._texts: dict[int, list[str]] = {}
        self._ready: tuple[range, int] | None = None
        self.cache: Cache | None = None
        self.takes_what_is_free = cache_gb is None
        if isinstance(self.folder, Bucket):
            place = Path(cache or default_folder()) / self.digest[:16]
            limit = room(place) if cache_gb is None else int(cache_gb * 1e9)
            size = self.layout.tar_bytes
            self.cache = Cache(self.folder, place, limit // size, size, self.sealed["outputs"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one x0 or x1."""
        return self.layout.shape

    @property
    def remark(self) -> str:
        """What is not known of a set that was imported; "" for any other."""
        facts = self.sealed["facts"]
        if facts.get("kind") != "imported":
            return ""
        unknown = ", ".join(facts.get("unknown", [])) or "nothing"
        return (
            f"{self.key}={self.folder} is imported from {facts.get('format')}; unknown: {unknown}"
        )

    @property
    def times(self) -> list[float]:
        """Times of the states that are stored."""
        return list(self.sealed["facts"].get("times", []))

    @property
    def has_labels(self) -> bool:
        """Whether pairs have class labels."""
        return self.layout.labels

    @property
    def has_prompts(self) -> bool:
        """Whether pairs have prompts."""
        return self.layout.prompt_bytes > 0

    @property
    def _repair(self) -> str:
        return repair(self.folder)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.shards * self.layout.shard_size

    def batch(self, ids: np.ndarray | Sequence[int]) -> dict[str, Any]:
        """Gather pairs.

        Args:
            ids: int [B] in [0, len), in any order.

        Returns:
            x0, x1: float32 [B, *shape]; xt: float32 [B, K, *shape], the states of the paths at `times`,
            if the set was opened with states=True; label: int64 [B], if pairs have labels; prompt: a
            list of B strings, if pairs have prompts.

        Raises:
            IndexError: for no ids, or ids out of range.
            UserError: for a tar whose content is not that of its layout.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= len(self):
            raise IndexError(
                f"{self.key}: got ids {ids}; expected one or more, from 0 to {len(self) - 1}"
            )
        shards, index = np.divmod(ids, self.layout.shard_size)
        tars = [self._map(k) for k in shards.tolist()]
        gathered: dict[str, Any] = {}
        for name, starts in self.layout.offsets(index).items():
            if name in ("i", PROMPT):  # i: the pair's own number
                continue
            if name == STATES and not self.reads_states:
                continue
            dtype, size = self.layout.members[name]
            parts = [tar[a : a + size] for tar, a in zip(tars, starts.tolist(), strict=True)]
            values = torch.from_numpy(np.concatenate(parts).view(dtype))
            lead = (-1, self.layout.states) if name == STATES else (-1,)
            gathered[name] = values if name == "y" else values.view(*lead, *self.shape).float()
        if not self.layout.noise:
            x0 = noise.normal(self.seed, ids, self.shape, noise.PAIR_NOISE)
            gathered["x0"] = torch.from_numpy(x0.astype(self.layout.dtype)).float()
        if self.has_labels:
            gathered["label"] = gathered.pop("y")
        if self.has_prompts:
            blocks, rows = np.divmod(index, self.layout.block)
            places = zip(shards.tolist(), blocks.tolist(), rows.tolist(), strict=True)
            gathered[PROMPT] = [self._prompts(k, block)[row] for k, block, row in places]
        return gathered

    def stored(self, i: int) -> dict[str, Any]:
        """Read one pair as it is stored, without a copy.

        Args:
            i: its number in the set.

        Returns:
            x0, x1 [*shape] and xt [K, *shape], where states are stored, of the stored dtype; y: an int
            and prompt: a string, where the set has them.
        """
        k, index = divmod(i, self.layout.shard_size)
        tar, found = self._map(k), dict[str, Any]()
        if not self.layout.noise:
            x0 = noise.normal(self.seed, [i], self.shape, noise.PAIR_NOISE)
            found["x0"] = x0[0].astype(self.layout.dtype)
        for name, place in self.layout.offsets(index).items():
            dtype, size = self.layout.members[name]
            if name not in ("i", PROMPT):
                values = tar[int(place) : int(place) + size].view(dtype)
                shape = shape_of(self.layout, name, 1)[1:]
                found[name] = int(values[0]) if name == "y" else values.reshape(shape)
        if self.has_prompts:
            block, row = divmod(index, self.layout.block)
            found[PROMPT] = self._prompts(k, block)[row]
        return found

    def unchecked(self, k: int) -> Callable[[], None]:
        """Map the tar of shard k, and return what checks it: for one who reads it at the same time.

        What was read is not to be used before the check has returned.
        """
        if k in self._sound:
            return lambda: None
        self._sound.add(k)
        try:
            mapped = self._map(k)
        finally:
            self._sound.discard(k)
        return lambda: self._check(k, mapped)

    def parts(self, ids: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield the pairs of `ids` as batches of at most READ values of x0, but at least two pairs."""
        rows = max(2, READ // int(np.prod(self.shape)))
        for start in range(0, len(ids), rows):
            yield self.batch(ids[start : start + rows])

    def order(self, seed: int) -> Order | GroupedOrder:
        """Return the endless shuffled order in which training reads the pairs."""
        if not self.group:
            return Order(len(self), seed)
        return GroupedOrder(self.shards, self.layout.shard_size, self.group, seed)

    def check_room(self, share: int) -> None:
        """Raise UserError if the cache cannot hold the shards of `share` pairs in a row of the order."""
        if self.cache is None:
            return
        apart = max(share - 2, 0) // self.layout.shard_size  # shards of groups between two others
        need = min(self.shards, 2 * self.group + apart) if self.group else self.shards
        if need <= self.cache.capacity:
            return
        entry, size = self.key.removesuffix(".path"), self.layout.tar_bytes
        ways = [f"{entry}.cache_gb={need * size / 1e9:.3g} or more"]
        if (most := (self.cache.capacity - apart) // 2) > 0:
            ways.append(f"{entry}.group={most} or less")
        together = f"{self.group} together (group)" if self.group else "all together (group=0)"
        raise UserError(
            f"{self.key}={self.folder}: its {self.shards} shards of {size / 1e6:,.1f} MB are shuffled "
            f"{together}, which needs {need} of them in the cache; {self.cache.folder} has room for "
            f"{self.cache.capacity}; use {', or '.join(ways)}"
        )

    def prepare(self, order: Order | GroupedOrder, counters: np.ndarray) -> None:
        """Fetch the tars that the counters read, and begin to fetch the group after them."""
        if self.cache is None:
            return
        span = order.span(counters) if isinstance(order, GroupedOrder) else range(0)
        if self._ready == (span, order.seed):
            return
        if isinstance(order, GroupedOrder):
            now = list(dict.fromkeys(k for number in span for k in order.members(number).tolist()))
            ahead = [k for k in order.members(span.stop).tolist() if k not in now]
        else:
            now, ahead = list(range(self.shards)), []
        ahead = ahead[: max(self.cache.capacity - len(now), 0)]
        self._maps = {k: tar for k, tar in self._maps.items() if k in now}
        self.cache.keep = {tar_name(k) for k in [*now, *ahead]}
        self.cache.fetch(tar_name(k) for k in [*now, *ahead])
        for k in now:  # mapped, a tar stays readable even where another process evicts it
            self._map(k)
        self._ready = (span, order.seed)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Read one pair, without batch dimension."""
        return {name: values[0] for name, values in self.batch([i]).items()}

    def __getitems__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Read pairs with one gather, as the list that a stock DataLoader collates."""
        gathered = self.batch(ids)
        return [{name: values[j] for name, values in gathered.items()} for j in range(len(ids))]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the mappings: another process makes its own."""
        return self.__dict__ | {"_maps": {}, "_texts": {}, "_ready": None}

    def _prompts(self, k: int, block: int) -> list[str]:
        """Parse the prompts of a block; those of the last blocks are kept."""
        number = k * self.layout.blocks + block
        if number not in self._texts:
            pairs = int(self.layout.pairs(block))
            start = int(self.layout.offsets(block * self.layout.block)[PROMPT])
            content = self._map(k)[start : start + pairs * self.layout.prompt_bytes].tobytes()
            try:
                texts = read_prompts(content, pairs)
            except ValueError as error:
                raise UserError(
                    f"{self.key}: {self.folder / tar_name(k)} is damaged: "
                    f"{self.layout.member(k, block, PROMPT)} {error}; {self._repair}"
                ) from None
            while len(self._texts) >= TEXTS:
                del self._texts[next(iter(self._texts))]
            self._texts[number] = texts
        return self._texts[number]

    def _map(self, k: int) -> np.ndarray:
        """Map the tar of shard k, and check it the first time; uint8 [bytes]."""
        if k not in self._maps:
            # torch closes the file at once; mmap.mmap and np.memmap keep a descriptor for each
            # mapping, and a thousand shards would reach the usual limit of a process.
            size = self.layout.tar_bytes
            if self.cache is None:
                path, held = os.fspath(self.folder / tar_name(k)), None
            else:
                held = self.cache.open(tar_name(k))
                path = f"/proc/self/fd/{held}"  # another process may remove the name at any moment
                while len(self._maps) >= max(self.cache.capacity, 1):
                    del self._maps[next(iter(self._maps))]
            try:
                mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8).numpy()
            except RuntimeError as error:  # torch's words for an error of the system
                told = " ".join(str(error).split())
                raise UserError(
                    f"{self.key}: {self.folder / tar_name(k)} cannot be read: {told}; {self._repair}"
                ) from None
            finally:
                if held is not None:
                    os.close(held)
            if k not in self._sound:
                self._check(k, mapped)
            self._maps[k] = mapped
        return self._maps[k]

    def _check_tars(self) -> None:
        """Check that every tar is there, and has its size and a hash; raise UserError."""
        faults, expected = [], self.layout.tar_bytes
        names = [tar_name(k) for k in range(self.shards)]
        if not self.sealed["outputs"].keys() >= set(names):
            raise UserError(
                f"{self.key}={self.folder}: {manifest.NAME} has no sha256 of some tars; {self._repair}"
            )
        for name, size in zip(names, self.folder.sizes(names), strict=True):
            path = self.folder / name
            if size is None:
                faults.append(f"{self.key}: {path} is missing; {self._repair}")
            elif size != expected:
                faults.append(
                    f"{self.key}: {path} has {size} bytes, expected {expected}; {self._repair}"
                )
        if len(faults) > SHOWN:
            faults[SHOWN:] = [f"{self.key}: and {len(faults) - SHOWN} more shards; {self._repair}"]
        if faults:
            raise UserError(faults)

    def _heads(self, block: int) -> list[tuple[str, int, bytes]]:
        """Return (name, offset of its values in the block, .npy header) of each member of a block."""
        begin, pairs = block * self.layout.block_bytes, int(self.layout.pairs(block))
        places = self.layout.offsets(block * self.layout.block)
        return [
            (name, int(place) - begin, npy_header(self.layout, name, pairs))
            for name, place in places.items()
        ]

    def _check(self, k: int, tar: np.ndarray) -> None:
        """Compare a tar with its hash, and its first and last block with the layout; raise UserError.

        A tar of the cache has been hashed there.
        """
        damage, outputs = "", self.sealed["outputs"]
        if self.cache is None and hashlib.sha256(tar.data).hexdigest() != outputs[tar_name(k)]:
            damage = "its bytes are not those that were sealed (sha256 differs)"
        for block, heads in ((0, self._full), (self.layout.blocks - 1, self._last)):
            for name, start, npy in heads:
                start += block * self.layout.block_bytes
                first = start - head_bytes(name)
                head, member = tar[first:start].tobytes(), self.layout.member(k, block, name)
                whole = head.startswith(f"{member}\0".encode()) and head.endswith(npy)
                if not (whole or damage):
                    damage = f"at byte {first} expected the header of {member}"
        if damage:
            path = self.folder / tar_name(k)
            raise UserError(f"{self.key}: {path} is damaged: {damage}; {self._repair}")
        self._sound.add(k)
