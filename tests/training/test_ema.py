"""Averages of the weights: their width, and the numbers of diffusers' EMAModel."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from flowmatch.config import UserError
from flowmatch.training import ema


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_a_power_average_has_its_width(width, exponent):
    """arXiv 2312.02696: the weights of n updates are ~ k^gamma, their deviation sigma_rel of n."""
    assert ema.gamma(width) == pytest.approx(exponent, abs=5e-3)
    n, weights = 4000, np.zeros(4000)
    for k in range(1, n + 1):
        decay = ema.power_decay(k, ema.gamma(width))
        weights *= decay
        weights[k - 1] = 1 - decay
    at = np.arange(1, n + 1) / n
    assert weights.sum() == pytest.approx(1)
    mean = (weights * at).sum()
    assert np.sqrt((weights * (at - mean) ** 2).sum()) == pytest.approx(width, rel=2e-3)
    assert weights[n // 2] / weights[-1] == pytest.approx(0.5**exponent, rel=0.01)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(UserError, match=r"width .*; expected more than 0, at most 0.289"):
        ema.gamma(width)


@pytest.mark.parametrize("kind", ["exponential", "power"])
def test_an_average_is_that_of_diffusers_bit_for_bit(kind):
    """Runs that were trained with diffusers' class go on, and repeat, with the same bytes."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (33,), (2, 3, 3, 3), ()]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    weights[1].requires_grad_(False)  # a frozen one
    theirs = EMAModel(weights, decay=0.97, foreach=True)
    exponent = ema.gamma(0.1)
    decays = {
        "exponential": lambda n: ema.exponential_decay(n, 0.97),
        "power": lambda n: ema.power_decay(n, exponent),
    }
    ours = ema.Average(weights, decays[kind])
    assert all(one is not other for one, other in zip(ours.tensors, weights, strict=True))
    for n in range(1, 301):
        with torch.no_grad():
            for weight in weights:
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=rng))
        if kind == "power":
            theirs.decay = theirs.min_decay = decays[kind](n)
        theirs.step(weights)
        ours.update(weights, n)
        for one, other in zip(ours.tensors, theirs.shadow_params, strict=True):
            assert torch.equal(one, other), (
                "torch._foreach_sub and torch._foreach_sub_(..., alpha=) in ema.Average.update, which "
                "have no public counterpart, compute other numbers than a - (1 - decay) (a - p)"
            )
    plain = [a.clone().sub_(a - p, alpha=0.25) for a, p in zip(ours.tensors, weights, strict=True)]
    ours.decay = lambda n: 0.75
    ours.update(weights, 301)
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors, plain, strict=True))
