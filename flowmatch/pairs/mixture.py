"""Several sets of pairs as one stream: which pairs of each set a training step reads."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from flowmatch.config import UserError
from flowmatch.flow.noise import Order
from flowmatch.pairs import truncation
from flowmatch.pairs.config import PairsEntry
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import PROMPT
from flowmatch.runs import storage


def open_set(number: int, entry: PairsEntry, states: bool) -> PairData:
    """Open the set of an entry of `pairs`, and check what is to be left out of it.

    Args:
        number: Of the entry.
        entry: The set, and how it is read.
        states: Whether batches hold the states of the paths.

    Raises:
        UserError: It cannot be opened, or nothing would be left.
    """
    key = f"pairs.{number}.path"
    data = PairData(entry.path, key, entry.group, entry.cache, entry.cache_gb, states)
    if entry.truncate:
        truncation.check(data, entry.truncate)
    if entry.held_out and (entry.group or storage.is_url(entry.path)):
        raise UserError(
            f"pairs.{number}.held_out={entry.held_out}: for a local set shuffled as a whole; copy it "
            "here and remove group, or remove held_out"
        )
    if entry.held_out >= len(data):
        raise UserError(f"pairs.{number}.held_out={entry.held_out}: the set has {len(data)} pairs")
    return data


class Mixture:
    """Batches drawn from several sets of pairs in fixed shares, as a function of global counters.

    Each set has its own endless shuffled order (`PairData.order`). An epoch of each set is exact, and
    training can start at any step.
    """

    def __init__(self, sets: Sequence[tuple[PairData, float]], batch_size: int, seed: int):
        """Divide the positions of a batch among the sets, with the method of largest remainders.

        Args:
            sets: (set, weight); the share of a set in a batch is proportional to its weight.
            batch_size: the global batch.
            seed: of the orders.

        Raises:
            UserError: if a set's share of a batch is less than one pair, a cache cannot hold the shards
                of a batch, or only some sets have labels or prompts.
        """
        for name in ("labels", "prompts"):
            have = [getattr(data, f"has_{name}") for data, _ in sets]
            if len(set(have)) > 1:
                with_, without = (sets[have.index(value)][0] for value in (True, False))
                raise UserError(
                    f"{with_.key}={with_.folder} has {name}, {without.key}={without.folder} has none; "
                    f"mix only sets with {name}, or only sets without"
                )
        total = sum(weight for _, weight in sets)
        exact = np.array([batch_size * weight / total for _, weight in sets])
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: batch_size - shares.sum()]] += 1
        if shares.min() < 1:
            small = sets[int(shares.argmin())][0]
            raise UserError(
                f"{small.key}: its weight is less than one pair in a batch of {batch_size}; use a "
                "larger weight, or a larger fit.batch_size"
            )
        self.sets, self.shares, self.batch_size = [data for data, _ in sets], shares, batch_size
        free = [data.cache for data in self.sets if data.cache and data.takes_what_is_free]
        for cache in free:
            cache.capacity //= len(free)
        for data, share in zip(self.sets, shares.tolist(), strict=True):
            data.check_room(share)
        self.orders, self.seed = [data.order(seed) for data in self.sets], seed
        self.ends = np.cumsum(shares)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of a student holds of the pairs: the names of their classes."""
        names = self.sets[0].sealed["facts"].get("id2label")
        return {"id2label": names} if names else {}

    def keep(self, number: int, ids: np.ndarray) -> None:
        """Draw only the pairs `ids` from set `number`, whose shards are shuffled all together."""
        self.orders[number] = Order(ids, self.seed)

    def leave_out(
        self, entries: Sequence[PairsEntry]
    ) -> tuple[list[str], list[tuple[PairData, np.ndarray]]]:
        """Leave out the pairs that the entries of the sets hold out or truncate.

        Returns:
            What a plan says of it; the sets with held-out pairs, and the ids of these.
        """
        told, unseen = [data.remark for data in self.sets if data.remark], []
        for number, (entry, data) in enumerate(zip(entries, self.sets, strict=True)):
            kept = np.arange(len(data) - entry.held_out)
            if entry.held_out:
                unseen.append((data, np.arange(len(kept), len(data))))
                told.append(f"the last {entry.held_out:,} pairs of {data.folder} are held out")
            if entry.truncate:  # reads a whole set: last
                rest, line = truncation.truncate(data, entry.truncate)
                kept = rest[rest < len(kept)]
                told.append(line)
            if entry.truncate or entry.held_out:
                self.keep(number, kept)
        return told, unseen

    @property
    def count(self) -> int:
        """Number of pairs that it draws from."""
        return sum(order.n for order in self.orders)

    def __call__(self, counters: np.ndarray) -> dict[str, Any]:
        """Gather the pairs of global sample counters.

        Args:
            counters: step * batch_size + position in the global batch, int64 [B].

        Returns:
            A batch like `PairData.batch`, in the order of the counters.
        """
        step, position = np.divmod(counters, self.batch_size)
        which = np.searchsorted(self.ends, position, side="right")
        parts, places = [], []
        for number, (data, order) in enumerate(zip(self.sets, self.orders, strict=True)):
            rows = np.flatnonzero(which == number)
            if rows.size:
                share = self.shares[number]
                local = step[rows] * share + position[rows] - (self.ends[number] - share)
                data.prepare(order, local)
                parts.append(data.batch(order(local)))
                places.append(rows)
        if len(parts) == 1:  # its pairs are in the order of the counters already
            return parts[0]
        back = np.argsort(np.concatenate(places))
        gathered: dict[str, Any] = {}
        for name in parts[0]:
            column = [part[name] for part in parts]
            if name == PROMPT:
                texts = list(chain.from_iterable(column))
                gathered[name] = [texts[i] for i in back.tolist()]
            else:
                gathered[name] = torch.cat(column)[torch.from_numpy(back)]
        return gathered
