"""Matching by a kernel: the energy distance of generated features and a target's.

2 E|f - g| - E|f - f'| - E|g - g'|, with g of the target, is the squared maximum mean discrepancy of the
kernel -|a - b|, is zero for equal distributions alone, and has no bandwidth (Szekely and Rizzo 2013;
Sejdinovic et al. 2013, arXiv 1207.6076). Its gradient in a generated f of N is that of
2 (mean |f - g| - mean |f - h|) / N, where h are other generated features.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

BANK = 1 << 14  # most features of a target


class Energy:
    """The newest generated features beside some of a target.

    Args:
        target: Features of the target in random order, [N, D] a part; the first BANK of them are kept.
        window: Generated features that are kept, and target's that an update compares.
    """

    def __init__(self, target: Iterable[Tensor], window: int):
        parts: list[Tensor] = []
        for part in target:
            parts.append(part.float())
            if sum(map(len, parts)) >= BANK:
                break
        self.bank = torch.cat(parts)[:BANK]
        assert len(self.bank) > 1, "a target of two samples or more"
        few = self.bank[:window]
        within = torch.cdist(few, few).sum() / (len(few) * (len(few) - 1))
        self.scale = within.clamp(min=torch.finfo(torch.float32).tiny)  # E|g - g'|
        self.window = window
        self.newest = few  # generated features
        self.updates = torch.zeros((), dtype=torch.int64)

    def errors(self, f: Tensor) -> Tensor:
        """Return the energy distance over that within the target, E|g - g'|, sample by sample.

        Args:
            f: Generated features, [B, D].

        Returns:
            One number for each sample, [B]; unbiased, so values below 0 occur.
        """
        count = min(self.window, len(self.bank))
        rows = (int(self.updates) * count + torch.arange(count)) % len(self.bank)
        apart = torch.cdist(f, self.bank[rows.to(self.bank.device)]).mean(1)
        own = torch.cdist(f, self.newest).mean(1)
        return (2 * apart - 2 * own + own.detach()) / self.scale - 1

    def fill(self, f: Tensor) -> None:
        """Begin with some generated features, [N, D]."""
        self.newest = f.detach().float()[-self.window :]

    def add(self, f: Tensor) -> None:
        """Count a batch of generated features, [B, D]."""
        finite = f.isfinite().all()  # else the run stops, and keeps these
        kept = torch.cat([self.newest, f.detach().float()])[-self.window :]
        self.newest = (
            torch.where(finite, kept, self.newest) if len(kept) == len(self.newest) else kept
        )
        self.updates = self.updates + 1

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {"newest": self.newest, "updates": self.updates}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take what a checkpoint held."""
        self.newest = saved["newest"].to(self.bank)
        self.updates = saved["updates"]
