"""Optimal transport in blocks: the least cost, every noise once, the same on any number of processes."""

import itertools
import json

import numpy as np
import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import coupling, noise, objectives, toy
from flowmatch.flow.config import CouplingConfig, LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder
from flowmatch.training.config import FitConfig
from flowmatch.training.draw import draw
from flowmatch.training.loop import fit

RING = toy.ring().samples(4096, 0).float()


def stream(counters):
    return {"x1": RING[counters % len(RING)], "label": torch.from_numpy(counters % 8)}


def drawn(config, counters):
    made = coupling.build(config)
    return draw(stream, made, TimesConfig(), 0.0, 8, 7, np.asarray(counters))


def cost(x0, x1):
    return (x1 - x0).square().flatten(1).sum(1).mean().item()


OT = CouplingConfig(name="optimal_transport", block=32)


def test_the_assignment_is_the_best_of_all_permutations():
    rng = torch.Generator().manual_seed(0)
    for shape in ((6, 2), (6, 1, 3, 3)):
        x0, x1 = torch.randn(2, *shape, generator=rng)
        best = min(cost(x0[list(p)], x1) for p in itertools.permutations(range(6)))
        p = coupling.assign(x0, x1)
        assert sorted(p.tolist()) == list(range(6))
        assert cost(x0[p], x1) == pytest.approx(best, rel=1e-6)


def test_a_known_permutation_is_found_again():
    x1 = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x1[shuffled][coupling.assign(x1[shuffled], x1)], x1)


def test_only_the_noise_is_permuted_and_only_within_its_block():
    free, matched = drawn(CouplingConfig(), range(128)), drawn(OT, range(128))
    assert torch.equal(matched.x1, free.x1)
    assert torch.equal(matched.label, free.label)
    assert torch.equal(matched.t, free.t)
    for b in range(0, 128, 32):
        block = slice(b, b + 32)
        assert not torch.equal(matched.x0[block], free.x0[block])
        assert sorted(matched.x0[block].tolist()) == sorted(free.x0[block].tolist())
    assert cost(matched.x0, matched.x1) < 0.8 * cost(free.x0, free.x1)


def test_what_is_matched_does_not_depend_on_how_the_batch_is_split():
    whole = drawn(OT, range(256))
    for micro in (32, 64, 128):  # ranks and micro-batches are such runs of positions
        for first in range(0, 256, micro):
            part = drawn(OT, range(first, first + micro))
            assert torch.equal(part.x0, whole.x0[first : first + micro])


def test_larger_blocks_cost_less():
    costs = [
        cost(d.x0, d.x1)
        for d in (
            drawn(OT.model_copy(update={"block": b}), range(1024)) for b in (2, 16, 128, 1024)
        )
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.6 * costs[0]


def test_a_micro_batch_that_is_not_made_of_blocks_is_refused():
    coupling.check(OT, 64)
    coupling.check(CouplingConfig(block=64), 100)
    with pytest.raises(UserError, match="block=32: the micro-batch of a process is 48 .* use 24"):
        coupling.check(OT, 48)
    with pytest.raises(UserError, match="use another fit.batch_size"):
        coupling.check(OT, 1)
    with pytest.raises(UserError, match="a batch of 48 does not consist of whole blocks of 32"):
        drawn(OT, range(48))


def test_bad_batches_are_refused():
    x = torch.zeros(4, 2)
    with pytest.raises(UserError, match="expected one shape"):
        coupling.assign(x, x[:3])
    with pytest.raises(UserError, match="NaN or infinity"):
        coupling.assign(x, x / 0)


def test_training_logs_the_cost_of_its_coupling(tmp_path):
    def costs(config):
        folder = tmp_path / config.name
        with RunFolder("train_flow", StageConfig(run_dir=str(folder), device="cpu"), {}) as opened:
            fit(
                networks.build(NetConfig(name="VelocityMLP", hidden=8), (2,), 8, 0),
                stream,
                coupling.build(config),
                opened,
                FitConfig(steps=8, batch_size=64, micro_batch=32, log_every=4),
                TimesConfig(),
                objectives.build(ObjectiveConfig(), LossConfig()),
                seed=7,
                device="cpu",
            )
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["coupling_cost"] for line in lines]

    def mean(config, steps):
        d = drawn(config, np.arange(64 * steps[0], 64 * steps[1]))
        return cost(d.x0, d.x1)

    for config in (CouplingConfig(), OT):
        expected = [mean(config, (0, 4)), mean(config, (4, 8))]
        assert costs(config) == pytest.approx(expected, rel=1e-5)


def test_the_independent_cost_is_its_closed_form():
    # E|x1 - x0|^2 = |E x1|^2 + tr cov x1 + d
    ring = toy.ring()
    x1 = ring.samples(50_000, 1)
    x0 = torch.from_numpy(noise.normal(0, range(50_000), (2,), noise.EVALUATION))
    expected = ring.covariance.trace() + ring.mean.square().sum() + 2
    assert cost(x0, x1) == pytest.approx(expected.item(), rel=0.01)
