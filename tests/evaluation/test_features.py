"""Features: the classifier learns, depends on data and seed alone, and is kept by content."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flowmatch.config import UserError
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.evaluation import features, metrics
from flowmatch.models.digest import module_digest
from flowmatch.runs import manifest
from flowmatch.runs.command import execute, load
from pipelines import train_classifier

FASHION = Path("/usr/share/datasets/fashion-mnist")


class Fickle(nn.Module):
    """Features whose statistics show in which mode they were run: dropout in front of a batch norm."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=1.0)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), self.training, torch.is_grad_enabled()))
        return self.norm(self.drop(2 * x.flatten(1)))[:, :, None, None]


def test_features_are_made_in_eval_mode_in_batches_and_leave_the_module_as_it_was():
    torch.manual_seed(0)
    x = torch.randn(50, 1, 1, 3)
    module = Fickle().train()
    before = module_digest(module)
    found = features.embed(x, module, batch=20)
    assert found.dtype == torch.float64
    assert torch.allclose(found, 2 * x.flatten(1).double(), rtol=1e-4)
    assert [n for n, *_ in module.seen] == [20, 20, 10]
    assert not any(training or graded for _, training, graded in module.seen)
    assert module.training
    assert module_digest(module) == before
    assert torch.equal(features.embed(x, None), x.flatten(1).double())
    with pytest.raises(UserError, match="contain NaN"):
        features.embed(x / 0, module)


@pytest.fixture(scope="module")
def digits():
    return dataset.load(DataConfig(source="digits", labels=True))


@pytest.fixture(scope="module")
def trained(digits):
    return features.train_classifier(digits, 0, steps=400)


def test_the_classifier_learns_the_digits(digits, trained):
    net, accuracy = trained
    assert accuracy >= 0.97
    assert not net.training
    assert net.num_features == net(digits.batch(np.arange(5))["x1"]).shape[1] == 64


def test_the_classifier_depends_on_data_and_seed_alone(digits):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, _ = features.train_classifier(digits, 0, steps=20)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    two, _ = features.train_classifier(digits, 0, steps=20)
    other, _ = features.train_classifier(digits, 1, steps=20)
    assert module_digest(one) == module_digest(two)
    assert module_digest(one) != module_digest(other)


def test_perceptual_features_weigh_values_and_maps_alike_and_let_gradients_through(digits, trained):
    classifier = copy.deepcopy(trained[0])
    x = digits.batch(np.arange(6))["x1"]
    perceptual = features.Perceptual(classifier)
    found = perceptual(x)
    maps = perceptual.maps(x)
    assert [list(m.shape) for m in maps] == [[6, 16, 8, 8], [6, 32, 4, 4]]
    assert torch.equal(classifier.body[:3](x), maps[0])  # after the first ReLU
    torch.testing.assert_close(found[:, :64], x.flatten(1))
    at = 64
    for m in maps:  # LPIPS: unit length over channels, mean over places, times the 64 values
        unit = m / (m.square().sum(1, keepdim=True) + 1e-8).sqrt()
        wanted = 64 * (unit[:3] - unit[3:]).square().sum(1).mean((1, 2))
        part = found[:, at : at + m[0].numel()]
        torch.testing.assert_close((part[:3] - part[3:]).square().sum(1), wanted)
        at += m[0].numel()
    assert found.shape == (6, at)

    perceptual.double()
    x, direction = x.double().requires_grad_(), torch.randn(6, 1, 8, 8, dtype=torch.float64)

    def total(x):
        return perceptual(x).square().sum(1).sqrt().sum()

    (slope,) = torch.autograd.grad(total(x), x)
    step = 1e-6 * direction
    difference = (total(x + step) - total(x - step)) / 2e-6
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=1e-5, atol=0)
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_random_features_are_a_function_of_shape_and_seed(digits):
    """Their activations keep their size through the layers, and gradients flow through them."""
    state = torch.random.get_rng_state()
    one = features.random_features((1, 32, 24), 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert module_digest(one) == module_digest(features.random_features((1, 32, 24), 3))
    assert module_digest(one) != module_digest(features.random_features((1, 32, 24), 4))
    x = torch.randn(4, 1, 32, 24, requires_grad=True)
    assert [m.shape[2:] for m in one.maps(x)] == [(32, 24), (16, 12), (8, 6), (4, 3)]
    first, last = [m.square().mean() for m in (one.maps(x)[0], one.maps(x)[-1])]
    assert 0.2 < last / first < 20  # pooling takes the largest of four
    (slope,) = torch.autograd.grad(one(x)[:, x[0].numel() :].sum(), x)
    assert slope.abs().sum((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for p in one.parameters())
    with pytest.raises(UserError, match=r"features=random are those of images"):
        features.random_features((64,), 0)


def test_held_out_images_are_not_trained_on(digits, monkeypatch):
    """Nor is any of their mirror images."""
    seen, scored = set(), []
    both = dataset.load(DataConfig(source="digits", labels=True, flip=True))
    read = both.read
    monkeypatch.setattr(features, "accuracy", lambda net, found, ids: scored.extend(ids) or 0.5)
    object.__setattr__(both, "read", lambda ids: seen.update(ids.tolist()) or read(ids))
    features.train_classifier(both, 0, steps=60)
    assert len(scored) == len(set(scored)) == 1797 // 5
    assert seen.isdisjoint(scored)
    assert seen | set(scored) == set(range(1797))


def test_its_features_tell_digits_from_their_likes(digits, trained):
    net, _ = trained
    real = dataset.reference(digits, 1797, 0)["x1"]

    def distance(a, b):
        return metrics.frechet(features.embed(a, net), features.embed(b, net))

    half = real[:898]
    floor = distance(half, real[898 : 2 * 898])
    blurred = nn.functional.avg_pool2d(half, 3, 1, 1)
    assert 0 < floor < 20
    assert distance(real, half.mean(0).expand_as(half)) > 30 * floor  # the one-step teacher
    assert distance(real, blurred) > 10 * floor


def test_the_classifier_needs_labelled_images():
    for config in ({"source": "digits"}, {"source": "ring", "labels": True, "samples": 9}):
        with pytest.raises(UserError, match="images with labels"):
            features.train_classifier(dataset.load(DataConfig(**config)), 0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 20), (3, 64, 64), (3, 1, 1)])
def test_the_classifier_takes_any_size(shape):
    net = features.Classifier(shape, 7)
    assert net(torch.zeros(2, *shape)).shape == (2, 64)
    assert net.logits(torch.zeros(2, *shape)).shape == (2, 7)


def stage_config(folder, *words):
    words = ["data.source=digits", "data.labels=true", "device=cpu", *words]
    return load(train_classifier.ClassifierConfig, [f"run_dir={folder}", *words])[0]


def test_a_classifier_is_kept_by_content(tmp_path, digits):
    """What the stage seals is what evaluate would train; what was changed is refused."""
    net, _ = features.train_classifier(digits, 0, steps=20)
    execute(train_classifier.STAGE, stage_config(tmp_path / "a", "steps=20"), False)
    read, facts = features.load(tmp_path / "a", "classifier", (1, 8, 8))
    assert module_digest(read) == module_digest(net) == facts["sha256"]
    assert not read.training
    execute(train_classifier.STAGE, stage_config(tmp_path / "b", "steps=20"), False)
    assert manifest.digest(tmp_path / "a") == manifest.digest(tmp_path / "b")
    with pytest.raises(
        UserError, match="takes images of shape .1, 8, 8., but the data has shape .3, 8, 8."
    ):
        features.load(tmp_path / "a", "classifier", (3, 8, 8))
    with pytest.raises(UserError, match="steps: 20 -> 21"):
        execute(train_classifier.STAGE, stage_config(tmp_path / "a", "steps=21"), False)
    (tmp_path / "a" / features.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="is not the file that was sealed"):
        features.load(tmp_path / "a", "classifier", (1, 8, 8))


def test_all_images_are_learnt_where_others_are_held_out(digits, monkeypatch):
    seen, scored = set(), []
    held_out = dataset.load(DataConfig(source="digits", labels=True))
    whole = dataset.load(DataConfig(source="digits", labels=True))
    read = whole.read
    object.__setattr__(whole, "read", lambda ids: seen.update(ids.tolist()) or read(ids))

    def accuracy(net, found, ids):
        scored.append((found, len(ids)))
        return 0.5

    monkeypatch.setattr(features, "accuracy", accuracy)
    features.train_classifier(whole, 0, held_out=held_out, steps=60)
    assert seen == set(range(1797))
    assert scored == [(held_out, 1797)]


def test_the_stage_names_what_it_cannot_learn_from(tmp_path):
    words = ["data.labels=false", "held_out={source: ring, labels: true, samples: 20}"]
    with pytest.raises(UserError) as error:
        execute(train_classifier.STAGE, stage_config(tmp_path, *words), False)
    assert error.value.faults == [
        "data: expected images with labels; set data.labels=true",
        "held_out: expected images with labels; set held_out.labels=true",
    ]


def test_the_stage_refuses_what_it_would_not_do(tmp_path):
    """In a dry run, all at once: a GPU, mirror images, too few to keep any apart."""
    for n in (4, 5):
        x, y = np.zeros((n, 8, 8), np.uint8), np.arange(n) % 2
        np.savez(tmp_path / f"{n}.npz", x=x, y=y)
    source = f"source: npz, labels: true, path: {tmp_path}"

    def faults(*words):
        config = load(train_classifier.ClassifierConfig, [f"run_dir={tmp_path}/no", *words])[0]
        with pytest.raises(UserError) as error:
            execute(train_classifier.STAGE, config, True)
        return [fault.partition(":")[0] for fault in error.value.faults]

    few = f"data={{{source}/4.npz}}"
    assert faults(few, "device=cuda") == ["device=cuda", "data"]
    mirrored = f"held_out={{{source}/4.npz, flip: true}}"
    assert faults(few, "data.flip=true", mirrored) == ["data.flip=true", "held_out.flip=true"]
    gone = f"held_out={{source: npz, labels: true, path: {tmp_path}/data.npz}}"  # its own key
    assert faults(f"data={{{source}/5.npz}}", gone) == [
        f"held_out.path={tmp_path}/data.npz does not exist; expected a folder, a file, a glob, or a "
        "name on the hub"
    ]
    words = [f"data={{{source}/5.npz}}", "steps=2", "batch_size=2", f"run_dir={tmp_path}/five"]
    execute(train_classifier.STAGE, load(train_classifier.ClassifierConfig, words)[0], False)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_classifier_learns_fashion_mnist(tmp_path):
    """By its own config: at least 92% of the test images."""
    words = ["fashion_mnist", "section=classifier", f"run_dir={tmp_path}/classifier"]
    execute(train_classifier.STAGE, load(train_classifier.ClassifierConfig, words)[0], False)
    _, facts = features.load(tmp_path / "classifier", "classifier", (1, 28, 28))
    assert facts["accuracy"] >= 0.92


def test_inception_is_used_only_where_its_weights_are_given(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="features=inception needs torchmetrics, .*eval"):
            features.Inception("weights.pth")
    with pytest.raises(
        UserError, match="set inception_weights to the file weights-inception-.*http"
    ):
        features.Inception(None)
    with pytest.raises(
        UserError, match="inception_weights=nowhere: no such file; .*torch-fidelity"
    ):
        features.Inception("nowhere")
    (tmp_path / "weights.pth").write_bytes(b"")
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(UserError, match="needs torch-fidelity"):
            features.Inception(str(tmp_path / "weights.pth"))
