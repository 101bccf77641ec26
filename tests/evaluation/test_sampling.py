"""Samples of an evaluation: what the progress bar counts, and the paths of the report."""

from types import SimpleNamespace

import numpy as np
import torch

from flowmatch.evaluation import sampling
from flowmatch.flow import solvers
from flowmatch.flow.config import SamplerConfig, SolverConfig
from flowmatch.models import networks, teachers
from flowmatch.models.config import NetConfig


def sampler(samples):
    net = networks.build(NetConfig(name="VelocityMLP", hidden=4), (2,), None, 0)
    alone = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        gather=lambda x: x,
    )
    model = teachers.Teacher(net, "", 0)
    return sampling.Sampler(model, samples, 4, 0, 1.0, "fp32", alone, "teacher")


def test_the_bar_counts_the_network_evaluations_of_all_samples(monkeypatch):
    """The padding of the last batch is not counted."""
    shown = []

    class Bar(sampling.tqdm):
        def close(self):
            shown.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(sampling, "tqdm", Bar)
    found = sampler(10).rows([1, 2], SamplerConfig(), SolverConfig(name="heun", steps=3))
    assert [row.evaluations for row in found] == [1, 2, 6]
    assert shown[0] == (10 * 9, 10 * 9)
    drawn, at = sampler(10), []  # each row is handed over before the next one is begun
    drawn.rows(
        [1, 2], SamplerConfig(), SolverConfig(name="heun", steps=3),
        lambda row: at.append((row.steps, drawn.velocity.evaluations)),
    )  # fmt: skip
    assert at == [(1, 3), (2, 9), (None, 27)]  # three batches
    sampler(10).rows([1], SamplerConfig(), SolverConfig(name="dopri5"))
    assert shown[-1][0] > 20
    assert shown[-1][1] is None


def test_the_paths_are_those_of_euler_from_the_noise_of_the_samples():
    found = sampler(10)
    times, states = found.paths()
    assert states.shape == (sampling.STRAIGHT_STEPS + 1, 10, 2)  # of few samples all, and no more
    assert found.velocity.evaluations == sampling.STRAIGHT_STEPS
    x0, _ = found.noise(np.arange(10))
    assert torch.equal(states[0], x0)
    with torch.no_grad():
        end = solvers.integrate(lambda x, t: found.velocity(x, t), x0, times)
    torch.testing.assert_close(states[-1], end, rtol=0, atol=1e-5)
    assert found.straightness()["normalised"] > 0
