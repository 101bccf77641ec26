"""The levers of few-step quality as options of the stages, on small networks, in this process."""

import json

import pytest
import torch
from pairset import make_teacher

from flowmatch import features, losses, manifest, nets, pairs, path
from flowmatch.config import UserError, load
from pipelines import evaluate, generate_pairs, reflow, train_classifier, train_flow

UNET = {
    "name": "UNet2DModel",
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "add_attention": False,
}
SMALL = ["fit.steps=6", "fit.batch_size=16", "fit.log_every=2", "fit.save_every=3", "fit.warmup=2"]
MODELS = {
    train_flow: train_flow.FlowConfig,
    train_classifier: train_classifier.ClassifierConfig,
    generate_pairs: generate_pairs.PairsConfig,
    reflow: reflow.ReflowConfig,
    evaluate: evaluate.EvaluateConfig,
}


def run(stage, *words):
    """Run a stage in this process."""
    config, _ = load(MODELS[stage], ["device=cpu", *words])
    stage.main(config, False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A flow on 8x8 images, 64 pairs of it, and two classifiers of the digits."""
    root = tmp_path_factory.mktemp("levers")
    make_teacher(root / "flow", None, (1, 8, 8), **UNET)
    few = ["shards=1", "shard_size=64", "block=16", "compute_batch=32", "solver.steps=2"]
    run(generate_pairs, f"run_dir={root}/pairs", f"teacher={root}/flow", *few)
    for seed in (0, 1):
        words = ["data.source=digits", "data.labels=true", "steps=5", f"seed={seed}"]
        run(train_classifier, f"run_dir={root}/classifier_{seed}", *words)
    return root


def reflow_words(base, folder, *more):
    place = [f"run_dir={folder}", f"start={base}/flow", f"pairs=[{{path: {base}/pairs}}]"]
    return [*place, *SMALL, *more]


def facts(folder):
    return manifest.read(folder, "x")["facts"]


def test_reflow_learns_by_a_feature_loss_that_never_scores_it(base, tmp_path):
    loss = f"loss={{name: feature, c: 0.5, features: {base}/classifier_0}}"
    run(reflow, *reflow_words(base, tmp_path / "reflow", loss))
    seal = manifest.read(tmp_path / "reflow", "student")
    assert seal["inputs"]["features"] == manifest.digest(base / "classifier_0")
    assert seal["facts"]["features"] == [facts(base / "classifier_0")["sha256"]]
    again = [f"start={tmp_path}/reflow", "fit.steps=1"]  # what it has looked through stays known
    run(reflow, *reflow_words(base, tmp_path / "again", *again))
    assert facts(tmp_path / "again")["features"] == seal["facts"]["features"]
    assert "features" not in seal["config"]["loss"]  # its path is no content
    assert "features" not in facts(base / "flow")

    # the loss that was logged is the formula's: at the start weights, on the first batch
    lines = (tmp_path / "reflow/metrics.jsonl").read_text().splitlines()
    classifier, _ = features.load(str(base / "classifier_0"), "x", (1, 8, 8))
    batch = pairs.PairData(base / "pairs").batch(range(64))
    x0, x1, net = batch["x0"], batch["x1"], nets.load(base / "flow/net", "x")
    with torch.no_grad():
        t = torch.zeros(64)
        found = path.data_prediction(x0, nets.Velocity(net)(x0, t), t)
        seen = features.Perceptual(classifier)
        error = ((seen(found) - seen(x1)).square().sum(1) + 0.25).sqrt() - 0.5
    first = json.loads(lines[0])["loss"]
    assert error.mean() * 0.3 < first < error.mean() * 1.5  # half of it is at t = 0, as here

    scored = ["data={source: digits}", "samples=16", "steps=[1]", "converged_steps=1"]
    words = [f"teacher={base}/flow", f"student={tmp_path}/reflow", *scored]
    own = f"classifier={base}/classifier_0"
    with pytest.raises(UserError, match="student was trained with loss.features on the very class"):
        run(evaluate, f"run_dir={tmp_path}/no", *words, own)
    run(evaluate, f"run_dir={tmp_path}/evaluate", *words, f"classifier={base}/classifier_1")


def test_a_feature_loss_is_refused_where_it_means_nothing(base, tmp_path):
    loss = f"loss={{name: feature, features: {base}/classifier_0}}"
    net = f"net={json.dumps(UNET)}"
    with pytest.raises(UserError, match="without pairs the network predicts the mean"):
        run(train_flow, f"run_dir={tmp_path}/no", "data.source=digits", net, loss, *SMALL)
    loss = f"loss={{name: feature, features: {base}/flow}}"
    with pytest.raises(UserError, match=r"loss.features=.* holds the result of train_flow"):
        run(reflow, *reflow_words(base, tmp_path / "no", loss))
    assert losses.LossConfig().features is None
