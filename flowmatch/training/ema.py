"""Averages of the weights over the updates: exponential, or with a width that grows with training.

The weights after update k count ~ k^gamma in a power-function average (Karras et al. 2023, arXiv
2312.02696, section 3.1): early weights fade, however long a run is. sigma_rel is the standard deviation
of that profile as a share of the run; the paper keeps the widths 0.05 and 0.10.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from flowmatch.config import UserError

WIDEST = 12**-0.5  # of gamma = 0: all updates weigh the same


def gamma(sigma_rel: float) -> float:
    """Solve sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for gamma >= 0.

    Args:
        sigma_rel: Width of the average, in (0, 1/sqrt(12)].

    Returns:
        The exponent (arXiv 2312.02696, appendix C).

    Raises:
        UserError: The width is outside that range.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"fit.ema: width {sigma_rel:g}; expected more than 0, at most {WIDEST:.3f}")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(0.0, roots.real.max()))


def power_decay(n: int, exponent: float) -> float:
    """Return the decay of update n = 1, 2, ...: (1 - 1/n)^(gamma + 1); 0 at the first, a copy."""
    return (1 - 1 / n) ** (exponent + 1)


def exponential_decay(n: int, longest: float) -> float:
    """Return the decay of update n = 1, 2, ...: min(longest, n / (9 + n)); 0 at the first, a copy."""
    return min(longest, n / (9 + n)) if n > 1 else 0.0


class Average:
    """The running average of some parameters: a <- a - (1 - decay) (a - p).

    Args:
        parameters: The parameters, which are copied.
        decay: The decay of update n = 1, 2, ..., in [0, 1].
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: Callable[[int], float]):
        self.tensors: list[Tensor] = [p.detach().clone().float() for p in parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], n: int) -> None:
        """Add the parameters after update n = 1, 2, ..., in their order at the start."""
        # one kernel for many tensors; `a.sub_(a - p, alpha=...)` would launch two for each
        gaps = torch._foreach_sub(self.tensors, list(parameters))
        torch._foreach_sub_(self.tensors, gaps, alpha=1 - self.decay(n))
