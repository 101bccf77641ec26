"""The panel: every measure in closed form, intervals that cover, and judges that no loss has used."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowmatch.config import UserError
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.evaluation import encoders, features, metrics, panel, scoring, spaces
from flowmatch.evaluation.panel import Cloud, interval
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import module_digest
from flowmatch.runs import manifest
from flowmatch.runs.command import load
from pipelines import evaluate, train_classifier
from tests.stages import UNET, run


def cloud(x, which=0, classes=None):
    x = x.double()
    classes = torch.zeros(len(x), dtype=torch.int64) if classes is None else classes
    return Cloud(x, panel.weights(len(x), 0, which), classes)


def values(real, fake):
    found = {name: float(v[0]) for name, v in panel.neighbourhoods(real, fake).items()}
    return found | {"frechet": float(panel.frechet(real, fake)[0])}


def normal(n, seed, d=3):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


def test_equal_sets_and_disjoint_sets():
    """A sample lies in its own neighbourhood and in k others on average: density (k + 1) / k."""
    x = normal(60, 0)
    found = values(cloud(x), cloud(x))
    assert found == pytest.approx(
        {"precision": 1, "recall": 1, "density": 1.2, "coverage": 1, "frechet": 0}, abs=1e-9
    )
    apart = values(cloud(x), cloud(x + 100))
    distance = apart.pop("frechet")
    assert apart == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert distance == pytest.approx(3 * 100**2)


def test_the_measures_of_a_known_layout():
    """Real points 0 to 9 on a line: the 5th neighbour of 4 and 5 is 3 away, of 0 and 9 it is 5."""
    real = torch.arange(10.0)[:, None]
    radius = torch.tensor([5.0, 4, 3, 3, 3, 3, 3, 3, 4, 5])
    assert torch.equal(cloud(real).radii.sqrt(), radius.double())
    fake = torch.tensor([[-4.5], [0.25], [4.6], [20.0], [20.0], [20.0], [20.0]])
    inside = (fake - real.T).abs() <= radius
    found = values(cloud(real), cloud(fake))
    assert inside.sum(1).tolist()[:4] == [1, 4, 10, 0]
    assert found["density"] == pytest.approx((1 + 4 + 10) / 5 / 7)
    assert found["precision"] == pytest.approx(3 / 7)
    assert found["coverage"] == pytest.approx(inside.any(0).double().mean().item())
    assert float(panel.nearest(cloud(fake[:3]), real.double())[0]) == pytest.approx(
        (4.5 + 0.25 + 0.4) / 3
    )
    apart = panel.nearest(cloud(real), torch.cat([real, real + 0.125]).double(), apart=True)
    assert float(apart[0]) == pytest.approx(0.125)


def test_they_agree_with_the_measures_of_the_table_across_chunks(monkeypatch):
    monkeypatch.setattr(panel, "CHUNK", 200)
    real, fake = normal(80, 0, 5), 0.7 * normal(70, 1, 5) + 0.2
    found = values(cloud(real), cloud(fake))
    k = scoring.NEIGHBOURS
    assert found["precision"] == metrics.covered(fake, real, metrics.radii(real, k))
    assert found["recall"] == metrics.covered(real, fake, metrics.radii(fake, k))
    assert found["frechet"] == pytest.approx(metrics.frechet(real, fake))
    labels = torch.arange(70) % 3
    each = [torch.pdist(fake[labels == c]).mean() * (labels == c).sum() for c in range(3)]
    spread = panel.diversity(cloud(fake, classes=labels))
    assert float(spread[0]) == pytest.approx(float(sum(each)) / 70)
    alone = torch.cat([torch.zeros(69, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])
    kept = panel.diversity(cloud(fake, classes=alone))  # a class of one sample has no pair
    assert float(kept[0]) == pytest.approx(float(torch.pdist(fake[:69]).mean()))


def test_each_measure_sees_what_it_is_for():
    """On the pixels of digits: held-out real ones, copies, a class left out, blur, and repetition."""
    digits = dataset.load(DataConfig(source="digits", labels=True))
    batch = dataset.reference(digits, 1797, 0)
    x, label = batch["x1"], batch["label"]
    training, test, other = x[:600], x[600:1200].flatten(1), x[1200:1797]
    blurred = torch.nn.functional.avg_pool2d(other, 3, 1, 1)
    repeated = training[:20].repeat(30, 1, 1, 1) + 0.01 * normal(600, 0, 64).view(-1, 1, 8, 8)
    sets = {
        "real": other,
        "copies": training,
        "nine": other[label[1200:1797] != 3],
        "blurred": blurred,
        "repeated": repeated,
    }
    real, found = cloud(test, 1), {}
    for name, images in sets.items():
        fake = cloud(images.flatten(1))
        found[name] = values(real, fake)
        found[name]["nearest"] = float(panel.nearest(fake, training.flatten(1).double())[0])
        found[name]["diversity"] = float(panel.diversity(fake)[0])
    good = found.pop("real")
    assert min(good[name] for name in ("precision", "recall", "density", "coverage")) > 0.85
    assert all(
        each["frechet"] > good["frechet"] for name, each in found.items() if name != "copies"
    )
    assert found["copies"]["nearest"] < 1e-5 < good["nearest"]
    assert found["copies"]["precision"] > 0.85  # which alone does not see them
    assert found["nine"]["coverage"] < good["coverage"] - 0.05
    assert found["nine"]["precision"] > 0.85
    assert found["blurred"]["precision"] < good["precision"] - 0.1
    assert found["repeated"]["recall"] < 0.2
    assert found["repeated"]["coverage"] < 0.5
    assert found["repeated"]["diversity"] < good["diversity"]


def test_a_resample_is_the_set_that_it_draws():
    real, fake = cloud(normal(50, 0), 1), cloud(normal(40, 1))
    again = [x.x.repeat_interleave(x.weights[7].long(), 0) for x in (real, fake)]
    found = panel.frechet(real, fake)[7]
    assert float(found) == pytest.approx(metrics.frechet(*again))
    labels = torch.arange(40) % 2
    x = cloud(normal(40, 1), classes=labels)
    w = x.weights[7]
    pairs = (w[:, None] * w * (labels[:, None] == labels)).fill_diagonal_(0)
    per_class = [pairs[labels == c][:, labels == c] for c in range(2)]
    d = torch.cdist(x.x, x.x)
    means = [
        (p * d[labels == c][:, labels == c]).sum() / p.sum() * w[labels == c].sum()
        for c, p in enumerate(per_class)
    ]
    assert float(panel.diversity(x)[7]) == pytest.approx(float(sum(means) / 40))


def test_intervals_cover_the_truth_of_normal_sets():
    """In 9 dimensions; that of the Frechet distance is for sets of the same size, here 500 and 90."""
    trials, shift = 60, 0.5
    length = 2**0.5 * math.gamma(5) / math.gamma(4.5)  # E|x|
    found = {"frechet": [], "small": [], "diversity": [], "nearest": []}
    for trial in range(trials):
        real, fake = (cloud(normal(500, 2 * trial + i, 9), i) for i in (0, 1))
        moved = cloud(fake.x + shift)
        found["frechet"].append(interval(panel.frechet(real, moved), centred=True))
        few = [cloud(x.x[:90], i) for i, x in enumerate((real, fake))]
        found["small"].append(interval(panel.frechet(*few), centred=True))
        found["diversity"].append(interval(panel.diversity(fake)))
        origin = torch.zeros(1, 9, dtype=torch.float64)
        found["nearest"].append(interval(panel.nearest(fake, origin)))
    mean, small = (
        sum(each["value"] for each in found[name]) / trials for name in ("frechet", "small")
    )
    assert 0 < mean - 9 * shift**2 < 0.3  # by chance sets lie farther apart than their sources
    assert small > 0.3  # of one source
    truths = {"frechet": mean, "small": small, "diversity": 2**0.5 * length, "nearest": length}
    for name, truth in truths.items():
        hits = sum(each["low"] <= truth <= each["high"] for each in found[name])
        assert hits >= 53, f"{name}: {hits} of {trials} intervals of 95% cover {truth:.3g}"
        assert name == "small" or all(x["high"] - x["low"] < 0.5 * truth for x in found[name])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images of three classes, a model of them, and a folder of each feature network."""
    root = tmp_path_factory.mktemp("panel")
    rng = np.random.default_rng(0)
    for name, n in (("train", 40), ("test", 30)):
        x = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        np.savez(root / f"{name}.npz", x=x, y=np.arange(n) % 3)
    networks.save(
        networks.build(NetConfig(name="UNet2DModel", **UNET), (1, 8, 8), None, 0), root / "net"
    )
    few = ["steps=3", "batch_size=8", "device=cpu"]
    for name, labels, *words in (
        ("plain", "true"),
        ("residual", "true", "network=residual"),
        ("encoder", "false", "network=residual", "task=denoising"),
        ("again", "false", "network=residual", "task=denoising"),
    ):
        data = f"data={{source: npz, path: {root}/train.npz, labels: {labels}}}"
        run(train_classifier, f"run_dir={root}/{name}", data, *few, *words)
    return root


def words_of(root, name, *judges):
    source = f"source: npz, path: {root}"
    words = [f"teacher={root}/net", f"student={root}/net", f"run_dir={root}/{name}", "panel=full"]
    words += [f"data={{{source}/train.npz}}", f"reference={{{source}/test.npz}}", "features=values"]
    words += ["samples=20", "steps=[1]", "converged_steps=1"]
    return words + ([f"judges=[{', '.join(f'{root}/{j}' for j in judges)}]"] if judges else [])


def test_an_evaluation_by_a_panel(made):
    run(evaluate, *words_of(made, "evaluate", "residual", "encoder"))
    inputs = manifest.read(made / "evaluate", "evaluation")["inputs"]
    assert inputs["judges.1"] == manifest.digest(made / "encoder")
    result = json.loads((made / "evaluate/metrics.json").read_text())
    assert "panel" not in result["teacher"]["rows"][0]  # which is as without a panel
    spaces = result["panel"]["spaces"]
    assert list(spaces) == ["classifier", "autoencoder"]
    facts = manifest.read(made / "encoder", "judges")["facts"]
    assert spaces["autoencoder"]["sha256"] == facts["sha256"]
    assert spaces["autoencoder"]["explained"] == facts["explained"]
    for space in spaces.values():
        rows = [*space["teacher"], *space["student"], space["floor"]]
        assert [row["steps"] for row in rows[:-1]] == [1, None, 1, None]
        for row in rows:
            for name in panel.MEASURES:
                assert row[name]["low"] <= row[name]["high"]
                assert {"value", "low", "high"} == set(row[name])
        assert rows[:2] == rows[2:4]  # the student is the teacher: the same noise, the same draws
        assert rows[1]["diversity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    table = (made / "evaluate/table.md").read_text()
    page = (made / "evaluate/report.html").read_text()
    assert "20 samples against 20 images that no model has seen" in table
    assert "20 samples against 20 images that no model has seen" in page
    first = spaces["autoencoder"]["student"][0]["coverage"]
    cell = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**first)
    assert cell in table
    assert cell.replace(" [", " <span>[") in page


def test_the_values_of_a_row_are_those_of_its_features(made):
    """The floor compares the test images with as many training images, in each feature space."""
    result = json.loads((made / "evaluate/metrics.json").read_text())
    sets = [
        dataset.load(DataConfig(source="npz", path=f"{made}/{n}.npz")) for n in ("test", "train")
    ]
    test, train = (dataset.reference(data, 20, 0)["x1"] for data in sets)
    for name, folder in (("classifier", "residual"), ("autoencoder", "encoder")):
        net, _ = encoders.load(made / folder, "judges", (1, 8, 8))
        floor = result["panel"]["spaces"][name]["floor"]
        real, fake = features.embed(test, net), features.embed(train, net)
        assert floor["frechet"]["value"] == pytest.approx(metrics.frechet(real, fake))
        known = features.embed(dataset.reference(sets[1], 40, 0)["x1"], net)
        near = torch.cdist(real, known).min(1).values.mean()
        assert floor["nearest"]["value"] == pytest.approx(float(near))
    net, _ = encoders.load(made / "encoder", "judges", (1, 8, 8))
    space = spaces.Space("autoencoder", "residual", "denoising", module=net)
    judge = panel.Panel([space], test, sets[1], 40, 0, apart=False)
    row = judge.add("teacher", 0.5 * test[:15])["autoencoder"]
    real, fake = (features.embed(x, net) for x in (test, 0.5 * test[:15]))
    radii = [metrics.radii(x, scoring.NEIGHBOURS) for x in (real, fake)]
    wanted = {
        "frechet": metrics.frechet(real, fake),
        "precision": metrics.covered(fake, real, radii[0]),
        "recall": metrics.covered(real, fake, radii[1]),
        "nearest": float(torch.cdist(fake, known).min(1).values.mean()),
        "diversity": float(torch.pdist(fake).mean()),
    }
    assert {name: row[name]["value"] for name in wanted} == pytest.approx(wanted)


def test_a_panel_without_judges_trains_them_and_without_labels_says_so(made, monkeypatch, capsys):
    monkeypatch.setitem(encoders.train.__kwdefaults__, "steps", 2)
    words = words_of(made, "unlabelled")
    run(evaluate, *words)
    assert "data has no labels: the diversity is that of all samples" in capsys.readouterr().out
    found = json.loads((made / "unlabelled/metrics.json").read_text())["panel"]["spaces"]
    assert [space["task"] for space in found.values()] == ["denoising", "denoising"]
    assert len({space["sha256"] for space in found.values()}) == 2
    assert "of two samples of any class" in (made / "unlabelled/table.md").read_text()


def test_judges_that_cannot_be_trusted_are_refused(made, monkeypatch):
    for judges, fault in (
        (["residual"], "expected two or more folders"),
        (["residual", "plain"], r"judges\[1\].*, which losses use, does not judge a panel"),
        (["encoder", "residual", "again"], "hold the same network"),
    ):
        with pytest.raises(UserError, match=fault):
            run(evaluate, *words_of(made, "no", *judges))
    with pytest.raises(UserError, match="judges panels alone"):  # so no loss can take it
        features.perceptual(str(made / "encoder"), "loss.features", 4, (1, 8, 8), "cpu")
    sha = manifest.read(made / "encoder", "judges")["facts"]["sha256"]
    taught = {"student": SimpleNamespace(features=[sha])}
    config, _ = load(evaluate.EvaluateConfig, words_of(made, "no", "residual", "encoder"))
    data = dataset.load(DataConfig(source="npz", path=f"{made}/train.npz"))
    with pytest.raises(
        UserError, match=r"student was trained with a loss on the same .*another judges\[1\]"
    ):
        spaces.choose(config, data, taught)
    with pytest.raises(UserError, match="belongs to panel=full"):
        load(evaluate.EvaluateConfig, [*words_of(made, "no", "residual"), "panel=none"])
    assert not (made / "no").exists()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 29, 20), (1, 64, 64), (3, 1, 1)])
@pytest.mark.parametrize("network", ["residual", "convolutional"])
def test_encoders_take_any_shape_and_decode_to_it(shape, network):
    x = torch.randn(2, *shape)
    assert encoders.Encoder(shape, network, None).logits(x).shape == x.shape
    assert encoders.Encoder(shape, network, 5).logits(x).shape == (2, 5)


def test_an_autoencoder_learns_and_depends_on_data_and_seed_alone():
    digits = dataset.load(DataConfig(source="digits"))
    _, explained = encoders.train(digits, 0, "residual", "denoising", steps=40)
    still = encoders.Encoder((1, 8, 8), "residual", None).eval()
    assert encoders.explained(still, digits, np.arange(300), 0) < 0.1 < explained < 1
    one, two, other = (
        module_digest(encoders.train(digits, seed, "residual", "denoising", steps=3)[0])
        for seed in (0, 0, 1)
    )
    assert one == two != other
