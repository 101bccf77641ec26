"""The finish: samples of the student itself in the loop, resumed, on two ranks, refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import noise
from flowmatch.flow.moments import Moments
from flowmatch.models import adapters, networks, teachers
from flowmatch.models.config import LoraConfig
from flowmatch.runs import manifest
from flowmatch.training import finishing
from flowmatch.training.feature_critic import Features
from pipelines import evaluate, finish, generate_pairs, train_classifier
from tests import ranks, stages
from tests.pairset import make_teacher
from tests.stages import run

UNET = {"name": "UNet2DModel", **stages.UNET}
SMALL = [
    *("fit.steps=8", "fit.batch_size=16", "fit.log_every=2", "fit.save_every=4", "fit.warmup=2"),
    *("for_steps=[1,2]", "fit.lr=1e-2"),
]
MATCHED = ["method.name=moments", "features=[values,random]", "method.window=32"]
METHODS = pytest.mark.parametrize(  # dmd is trained with moments beside it
    "name", ["dmd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moments", "kernel"))]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A flow on 8x8 images with two classes, and pairs of it."""
    root = tmp_path_factory.mktemp("finish")
    make_teacher(root / "flow", 2, (1, 8, 8), **UNET)
    few = ["shards=2", "shard_size=32", "block=16", "compute_batch=32", "solver.name=euler"]
    run(generate_pairs, f"run_dir={root}/pairs", f"teacher={root}/flow", *few, "solver.steps=4")
    return root


def words(base, folder, *more):
    place = [f"run_dir={folder}", f"start={base}/flow", f"pairs=[{{path: {base}/pairs}}]"]
    matched = [] if any("dmd" in word for word in more) else MATCHED
    return [*place, *SMALL, *matched, *more]


def train(base, folder, world, *more, codes=None, **environment):
    """Run the stage on some ranks, to its end."""
    if "method.name=dmd" in more:
        fake = ["method.fake_updates=2", "method.fake_lr=1e-2"]
        more = (f"teacher={base}/flow", *fake, *MATCHED, "method.moments=0.5", *more)
    argv, log = [*words(base, folder, *more), "device=cpu"], Path(f"{folder}.log")
    started = ranks.start(world, argv, log, "finish", **environment)
    for rank in started:
        rank.join(120)
    assert [rank.exitcode for rank in started] == (codes or [0] * world), log.read_text()


def weights(folder):
    return networks.load(Path(folder) / "net", "net").state_dict()


@pytest.mark.parametrize("name", ["moments", pytest.param("kernel", marks=pytest.mark.slow), "dmd"])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(base, tmp_path, name):
    more = [f"method.name={name}", "fit.micro_batch=8"]
    train(base, tmp_path / "whole", 1, *more)
    train(base, tmp_path / "cut", 1, *more, codes=[-9], FAULT="kill:0:7")
    assert [p.name for p in (tmp_path / "cut/checkpoints").iterdir()] == ["step_00000004"]
    train(base, tmp_path / "cut", 1, *more)
    for file in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        for key in ("step", "loss", "distribution_loss", "pair_loss"):
            assert one[key] == other[key]
    moved = max(
        (weights(tmp_path / "cut")[k] - v).abs().max() for k, v in weights(base / "flow").items()
    )
    assert moved > 1e-3


@pytest.mark.slow
@METHODS
def test_two_ranks_and_bf16_train_the_network_of_one(base, tmp_path, name):
    for world, folder, more in [
        (1, "one", []),
        (2, "two", ["fit.micro_batch=4"]),
        (1, "half", ["fit.precision=bf16"]),
    ]:
        train(base, tmp_path / folder, world, f"method.name={name}", *more)
    one, two, half = (weights(tmp_path / folder) for folder in ("one", "two", "half"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(half[key], value, atol=3e-2, rtol=0)


def test_samples_are_those_of_the_students_own_steps():
    """The points of all grids come up as often as they should; the last one ends where Euler does."""
    grids = [[0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]]
    drawn = [finishing.place_of(grids, 3, step) for step in range(6000)]
    assert drawn == [finishing.place_of(grids, 3, step) for step in range(6000)]
    share = {place: drawn.count(place) / len(drawn) for place in set(drawn)}
    four = (0.0, 0.25, 0.5, 0.75)
    expected = {(0.0,): 11 / 24, (0.0, 0.5): 1 / 4, four: 5 / 24} | {
        four[:k]: 1 / 24 for k in (2, 3)
    }
    assert set(share) == set(finishing.places(grids)) == set(expected)
    for place, value in expected.items():
        assert share[place] == pytest.approx(value, abs=0.025)

    def v(x, t, cond):
        return x * (1 + t)

    x0 = torch.randn(5, 2)
    x = finishing.state_at(v, x0, four, None)
    expected = x0 * 1.25 * (1 + 1.25 / 4) * (1 + 1.5 / 4)
    torch.testing.assert_close(x, expected)
    assert torch.equal(finishing.state_at(v, x0, (0.0,), None), x0)
    fresh = noise.normal(0, [0], (4,), noise.FINISH)
    for stream in (noise.PAIR_NOISE, noise.TRAINING, noise.EVALUATION):
        assert not np.array_equal(fresh, noise.normal(0, [0], (4,), stream))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A classifier of the digits."""
    root = tmp_path_factory.mktemp("judged")
    digits = "data={source: digits, labels: true}"
    run(train_classifier, f"run_dir={root}/eyes", digits, "steps=2")
    return root / "eyes"


def test_a_judge_that_the_finish_has_seen_is_refused(base, judged, tmp_path, capsys):
    """The plan says what is compared; the manifest holds the steps, the inputs and the features."""
    more = [
        "method.name=moments",
        f"features=[{judged},values]",
        "data={source: digits}",
        "fit.steps=1",
        "anchor=0",
    ]
    run(finish, *words(base, tmp_path / "student", *more, "fit.save_every=1"))
    out = capsys.readouterr().out
    assert "samples in 1, 2 steps beside 1,797 samples of data: moments of " in out
    made = teachers.load(tmp_path / "student", "student")
    assert made.round == 1
    sealed = manifest.read(tmp_path / "student", "student")
    assert sealed["facts"]["for_steps"] == [1, 2]
    assert set(sealed["inputs"]) == {"start", "pairs.0", "data", "features.0", "features.1"}
    assert "values" in made.features
    place = [f"run_dir={tmp_path}/scores", f"student={tmp_path}/student", f"teacher={base}/flow"]
    scored = [*place, "data={source: digits, labels: true}", "samples=64", "steps=[1]"]
    for features in (f"classifier={judged}", "features=values"):
        with pytest.raises(UserError, match="student was trained with a loss on"):
            run(evaluate, *scored, features)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("for_steps=[2,1]", r"for_steps=\[2, 1\]: expected rising numbers from 1 to 16"),
        ("features=[]", r"features=\[\]: expected one or more different features"),
        ("fit.shard=true", "fit.shard=true: a finish samples outside of the training step"),
        ("fit.compile=true", "fit.compile=true: a finish evaluates the network in batches"),
        ("data=ring", r"data holds \[2\]; the network at start= makes \[1, 8, 8\]"),
        ("features=[nowhere.pt2]", "features.0=nowhere.pt2: no such file"),
        ("loss={name: mse}", "loss has no effect with anchor=0"),
        ("method={name: dmd}", "method.name=dmd needs teacher="),
        (
            "method={name: dmd, window: 32}",
            "method.window=32: window belongs to name=moments and kernel",
        ),
    ],
)
def test_what_a_finish_cannot_do_is_refused_by_its_plan(base, tmp_path, more, fault):
    with pytest.raises(UserError, match=fault):
        run(finish, *words(base, tmp_path / "refused", "anchor=0", more))


def test_an_adapter_of_a_network_without_prompts_shares_it_with_its_teacher(tmp_path):
    """Only the adapted layers change, and net/ is whole; another teacher is refused."""
    net = UNET | {"add_attention": True, "attention_head_dim": 4}
    for place, eps in (("flow", 1e-5), ("other", 1e-4)):
        make_teacher(tmp_path / place, 2, (1, 8, 8), norm_eps=eps, **net)
    few = ["shards=1", "shard_size=32", "block=16", "compute_batch=32", "solver.name=euler"]
    run(generate_pairs, f"run_dir={tmp_path}/pairs", f"teacher={tmp_path}/flow", *few, "guidance=2")
    base = [f"pairs=[{{path: {tmp_path}/pairs}}]", f"start={tmp_path}/flow", *SMALL, "method=dmd"]
    base += ["lora={rank: 2}", f"run_dir={tmp_path}/student", "fit.steps=2"]
    with pytest.raises(UserError, match="student and teacher share one network"):
        run(finish, *base, f"teacher={tmp_path}/other")
    config, _ = ranks.command.load(finish.FinishConfig, [*base, f"teacher={tmp_path}/flow"])
    plan = finish.plan(config)
    assert plan.teacher.net is plan.start.net
    assert plan.guidance == 2  # that of the pairs
    finish.run(plan)
    before, after = (networks.load(tmp_path / p / "net", "net") for p in ("flow", "student"))
    own = after.state_dict()
    changed = {
        key for key, value in before.state_dict().items() if not torch.equal(value, own[key])
    }
    assert changed == {f"{layer}.weight" for layer in adapters.layers(before, LoraConfig().targets)}


def test_samples_of_one_step_are_compared_by_themselves():
    """Those of later points count together; what a later point makes does not reach the first."""
    first, half, late = (0.0,), (0.0, 0.5), (0.0, 0.25, 0.5)
    batch = {"x0": torch.randn(64, 1, 2, 2), "x1": torch.randn(64, 1, 2, 2)}
    features = Features(
        {"values": torch.nn.Flatten()}, lambda f: Moments(f, 64), None, lambda: [batch], 32
    )
    alone = SimpleNamespace(device="cpu", gather=lambda x: x)
    features.begin(alone, lambda x, t, cond: x, [first, half, late], {})
    x = torch.randn(16, 1, 2, 2)

    def errors(place):
        return features.errors(x, finishing.Seen(place, x, x, None), 0)

    assert torch.equal(errors(half), errors(late))
    before = errors(first)
    errors(late)
    features.learn(late)
    assert torch.equal(errors(first), before)
    assert torch.equal(errors(half), errors(late))
    kept = errors(half)
    features.learn(first)
    assert not torch.equal(errors(first), before)
    assert torch.equal(errors(half), kept)
