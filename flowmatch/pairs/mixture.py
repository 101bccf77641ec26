"""Several sets of pairs as one stream: what each step of training reads of each."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from flowmatch.config import UserError
from flowmatch.flow.noise import Order
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import PROMPT


class Mixture:
    """Draw each batch from several sets of pairs, in fixed shares: global counters -> pairs.

    Each set is walked in its own endless shuffled order (`PairData.order`), so an epoch of each is exact
    and any step can be the first. Raises UserError where a set's share of a batch is no whole pair, a
    cache cannot hold what a batch touches, or only some sets have labels or prompts.
    """

    def __init__(self, sets: Sequence[tuple[PairData, float]], batch_size: int, seed: int):
        """Split batch_size positions among the sets by their weights, the largest rests first."""
        for name in ("labels", "prompts"):
            have = [getattr(data, f"has_{name}") for data, _ in sets]
            if len(set(have)) > 1:
                with_, without = (sets[have.index(there)][0] for there in (True, False))
                raise UserError(
                    f"{with_.key}={with_.folder} has {name}, {without.key}={without.folder} has none; "
                    "mix sets of one kind"
                )
        total = sum(weight for _, weight in sets)
        exact = np.array([batch_size * weight / total for _, weight in sets])
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: batch_size - shares.sum()]] += 1
        if shares.min() < 1:
            small = sets[int(shares.argmin())][0]
            raise UserError(
                f"{small.key}: its weight gives it no place in a batch of {batch_size}; "
                "use a larger weight or fit.batch_size"
            )
        self.sets, self.shares, self.batch_size = [data for data, _ in sets], shares, batch_size
        free = [data.cache for data in self.sets if data.cache and data.takes_what_is_free]
        for cache in free:
            cache.capacity //= len(free)
        for data, share in zip(self.sets, shares.tolist(), strict=True):
            data.check_room(share)
        self.orders, self.seed = [data.order(seed) for data in self.sets], seed
        self.ends = np.cumsum(shares)

    def keep(self, number: int, ids: np.ndarray) -> None:
        """Draw from set `number`, which is read all together, these pairs alone."""
        self.orders[number] = Order(ids, self.seed)

    def __call__(self, counters: np.ndarray) -> dict[str, Any]:
        """Gather the pairs of global sample counters, step * batch_size + position: int64 [B]."""
        step, position = np.divmod(counters, self.batch_size)
        which = np.searchsorted(self.ends, position, side="right")
        parts, places = [], []
        for number, (data, order) in enumerate(zip(self.sets, self.orders, strict=True)):
            here = np.flatnonzero(which == number)
            if here.size:
                share = self.shares[number]
                local = step[here] * share + position[here] - (self.ends[number] - share)
                data.prepare(order, local)
                parts.append(data.batch(order(local)))
                places.append(here)
        if len(parts) == 1:  # every position is its own, in the order that was asked for
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
