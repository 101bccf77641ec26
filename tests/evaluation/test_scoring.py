"""Scores: every measure against the one that it is named after, and the floor from real data alone."""

import numpy as np
import pytest
import torch

from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.evaluation import metrics, scoring
from flowmatch.evaluation.scoring import Scorer


def images(n, seed):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, 1, 3, 3)))


def test_images_are_scored_by_every_measure_on_the_same_features():
    real, fake, training = images(40, 0), images(30, 1) * 0.8, images(60, 2).flatten(1)
    double = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 9, bias=False)).double()
    double[1].weight.data = 2 * torch.eye(9).double()
    found = Scorer("frechet", real, double, 2 * training).score(fake)
    a, b = 2 * real.flatten(1), 2 * fake.flatten(1)
    k = scoring.NEIGHBOURS
    assert found == pytest.approx(
        {
            "distance": metrics.frechet(a, b),
            "kernel": metrics.kernel(a, b),
            "precision": metrics.covered(b, a, metrics.radii(a, k)),
            "recall": metrics.covered(a, b, metrics.radii(b, k)),
            "nearest": metrics.nearest(b, 2 * training),
        }
    )
    assert found["precision"] > 0
    assert found["recall"] < 1


def test_the_floor_compares_disjoint_halves_of_real_data():
    real = images(41, 0)
    flat = real.flatten(1)
    floor = Scorer("frechet", real, None, torch.cat([flat, flat + 9]), apart=True).floor()
    assert floor["samples"] == 20
    assert floor["distance"] == pytest.approx(metrics.frechet(flat[:20], flat[20:40]))
    assert floor["kernel"] == pytest.approx(metrics.kernel(flat[:20], flat[20:40]))
    assert floor["nearest"] == pytest.approx(metrics.nearest(flat, flat, apart=True))


def test_the_floor_is_of_the_size_of_a_row_where_there_are_images_of_training():
    flat, training = images(41, 0).flatten(1), images(50, 3).flatten(1)
    scorer = Scorer("frechet", images(41, 0), None, training)
    floor = scorer.floor()
    assert floor["samples"] == 41
    as_a_model = scorer.score(training[:41])
    assert {name: floor[name] for name in ("distance", "kernel", "precision", "recall")} == {
        name: as_a_model[name] for name in ("distance", "kernel", "precision", "recall")
    }
    assert floor["nearest"] == pytest.approx(metrics.nearest(flat, training))
    assert Scorer("frechet", images(41, 0), None, training[:40]).floor()["samples"] == 20


def test_copies_of_training_images_are_found():
    training = images(60, 0)
    scorer = Scorer("frechet", images(40, 1), None, training.flatten(1))
    copies = training[:30] + 1e-3
    assert scorer.score(copies)["nearest"] < 0.01 * scorer.floor()["nearest"]


def test_points_are_scored_by_their_distance_alone():
    real = torch.randn(20, 2)
    scorer = Scorer("sliced_wasserstein", real)
    assert set(scorer.score(real + 1)) == {"distance"}
    assert set(scorer.floor()) == {"distance", "samples"}


def test_the_reference_is_the_beginning_of_the_training_images():
    """So that `apart` leaves each of them itself alone."""
    digits = dataset.load(DataConfig(source="digits"))
    known = scoring.embed_data(digits, 600, 3, None, torch.device("cpu"))
    reference = dataset.reference(digits, 50, 3)["x1"].flatten(1).double()
    assert torch.equal(known[:50], reference)
    assert len(known) == 600
