"""The learning rate: its formulas, and the numbers of diffusers' schedules."""

import math

import pytest
import torch
from diffusers.optimization import get_scheduler

from flowmatch.training.learning_rate import factor


def test_it_rises_in_a_line_and_falls_as_named():
    assert [factor(step, 20, 4, "constant") for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [factor(step, 8, 4, "linear") for step in (4, 6, 8)] == [1, 0.5, 0]
    half = 0.5 * (1 + math.cos(math.pi / 4))
    assert factor(5, 8, 4, "cosine") == pytest.approx(half)
    assert factor(0, 8, 0, "cosine") == 1
    assert factor(8, 8, 4, "cosine") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(300, 0), (300, 1), (300, 70), (50, 100), (1, 0)])
def test_it_is_that_of_diffusers_bit_for_bit(decay, steps, warmup):
    """Runs that were trained with diffusers' schedules repeat with the same bytes."""
    name = "constant_with_warmup" if decay == "constant" else decay
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=max(steps, warmup + 1)
    ).lr_lambdas[0]
    for step in range(steps + 1):
        assert factor(step, steps, warmup, decay) == schedule(step)
