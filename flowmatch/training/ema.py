"""The power-function average of weights, whose width is a share of the training done so far (EDM2).

The weights after update k count ~ k^gamma (Karras et al. 2023, arXiv 2312.02696, section 3.1): what
early training leaves behind fades, however long a run is. sigma_rel is the standard deviation of that
profile, as a share of the run; the widths that the paper keeps are .05 and .10.
"""

import numpy as np

from flowmatch.config import UserError

WIDEST = 12**-0.5  # of gamma = 0: all updates weigh the same


def gamma(sigma_rel: float) -> float:
    """Solve sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for gamma >= 0 (its appendix C).

    Raises UserError for widths outside (0, 1/sqrt(12)].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"fit.ema: width {sigma_rel:g}; expected more than 0, at most {WIDEST:.3f}")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(0.0, roots.real.max()))


def power_decay(n: int, exponent: float) -> float:
    """Give the decay of update n = 1, 2, ...: (1 - 1/n)^(gamma + 1); 0 at the first, a copy."""
    return (1 - 1 / n) ** (exponent + 1)
