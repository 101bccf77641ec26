"""MeanFlow on pairs: its target in closed form and by differences, its networks, its export."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmatch.config import UserError
from flowmatch.flow import objectives, path, solvers, toy
from flowmatch.flow.config import LossConfig, ObjectiveConfig
from flowmatch.models import networks, teachers, two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.models.velocity import Velocity
from flowmatch.pairs.dataset import PairData
from pipelines import evaluate, export, generate_pairs, reflow
from tests.pairset import make_teacher
from tests.stages import run

ROOT = Path(__file__).parents[2]
BLOCKS = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
UNET = {
    **{"name": "UNet2DModel", **BLOCKS, "add_attention": False},
    **{"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
}
MLP = {"name": "VelocityMLP", "hidden": 16}
KINDS = {"unet": (UNET, (1, 8, 8), None), "mlp": (MLP, (2,), None), "mlp-labels": (MLP, (2,), 3)}
SMALL = ["fit.steps=6", "fit.batch_size=16", "fit.log_every=2", "fit.save_every=3", "fit.warmup=2"]
SHARES = ObjectiveConfig(name="meanflow", equal=0.25, end=0.5)


def build(kind):
    net, shape, classes = KINDS[kind]
    return networks.build(NetConfig(**net), shape, classes, 0).eval(), shape, classes


def shaken(net):
    """The network with weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def drawn(shape, classes, n=6, dtype=torch.float32):
    """x, v, t, r > t and labels."""
    generator = torch.Generator().manual_seed(2)
    x, v = torch.randn(2, n, *shape, generator=generator, dtype=dtype)
    t = torch.rand(n, generator=generator, dtype=dtype)
    r = t + (1 - t) * torch.rand(n, generator=generator, dtype=dtype)
    return x, v, t, r, None if classes is None else {"label": torch.arange(n) % (classes + 1)}


class Average:
    """The average velocity of a Gaussian's flow in closed form: (x_r - x_t) / (r - t)."""

    def __init__(self):
        root = torch.tensor([[1.0, 0.3], [0.0, 0.4]], dtype=torch.float64)
        self.target = toy.Gaussian([0.5, -1.0], root @ root.T)

    def carry(self, x0, t):
        """x_t = t mu + (t^2 S + (1 - t)^2 I)^(1/2) x0, for times [B, 1]."""
        axes, variances = self.target.axes[0], self.target.variances[0]
        scale = (t**2 * variances + (1 - t) ** 2).sqrt()
        return t * self.target.means[0] + ((x0 @ axes) * scale) @ axes.T

    def __call__(self, x, t, r):
        t, r = t[:, None], r[:, None]
        axes, variances = self.target.axes[0], self.target.variances[0]
        scale = (t**2 * variances + (1 - t) ** 2).sqrt()
        x0 = (((x - t * self.target.means[0]) @ axes) / scale) @ axes.T
        return (self.carry(x0, r) - x) / (r - t)


def test_the_average_velocity_of_a_gaussian_is_its_own_target():
    u = Average()
    x, _, t, r, _ = drawn((2,), None, 50, torch.float64)
    x0 = torch.randn(5, 2, dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(x0 + u(x0, 0 * ones, ones), u.target.flow(x0))  # the oracle itself
    v = u.target.velocity(x, t)
    torch.testing.assert_close(objectives.average_target(u, x, t, r, v, 0), u(x, t, r))
    wrong = objectives.average_target(u, x, t, r, v + 0.1, 0)
    assert (wrong - u(x, t, r)).abs().min() > 1e-3


def test_differences_of_a_gaussians_average_velocity_approach_its_derivative():
    """Second order in the step; at t = 0 a one-sided one, first order; never outside [0, r]."""
    u = Average()
    seen = []

    def watched(x, t, r):
        seen.append((t, r))
        return u(x, t, r)

    x, _, t, _, _ = drawn((2,), None, 50, torch.float64)
    for at, order in [(0.2 + 0.6 * t, 2), (0 * t, 1)]:
        r, v = torch.ones_like(at), u.target.velocity(x, at)
        worst = [
            (objectives.average_target(watched, x, at, r, v, step) - u(x, at, r)).abs().max()
            for step in (0.02, 0.01)
        ]
        assert worst[1] < 0.02
        assert math.log2(worst[0] / worst[1]) == pytest.approx(order, abs=0.1)
    r = 0.1 + 0.05 * t  # nearer than the step: t + on is r itself, where u is no ratio but v
    objectives.average_target(lambda x, t, r: (seen.append((t, r)), x)[1], x, r / 2, r, x, 0.5)
    assert all(((t >= 0) & (t <= r)).all() for t, r in seen)
    same = objectives.average_target(lambda x, t, r: x, x, 0 * t, 0 * t, x, 0.05)
    assert torch.equal(same, x)  # t = r = 0: v alone, and no 0 / 0


@pytest.mark.parametrize("step", [0, 0.05])
def test_a_straight_flow_is_its_own_average(step):
    """After reflow of a Gaussian the lines are x0 + t (A x0 + m): u is their velocity for every r."""
    a = torch.tensor([[0.5, 0.1], [0.1, -0.2]], dtype=torch.float64)
    m = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x0 = torch.randn(40, 2, dtype=torch.float64)
    _, _, t, r, _ = drawn((2,), None, 40, torch.float64)

    def u(x, t, r):
        lines = torch.eye(2, dtype=torch.float64) + t[:, None, None] * a
        start = torch.linalg.solve(lines, (x - t[:, None] * m)[..., None])[..., 0]
        return start @ a.T + m

    x1 = x0 + x0 @ a.T + m
    target = objectives.average_target(u, path.interpolate(x0, x1, t), t, r, x1 - x0, step)
    torch.testing.assert_close(target, x1 - x0)


class Exact(torch.nn.Module):
    """diffusers' sinusoids, which it computes in float32, in float64."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, timesteps):
        half = self.channels // 2
        angle = timesteps[:, None] * torch.exp(
            -math.log(10000) * torch.arange(half).double() / half
        )
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_target_of_every_network_is_its_central_difference(kind):
    net, shape, classes = build(kind)
    net = shaken(two_time.add(net, 0)).double()
    if kind == "unet":
        at = torch.tensor([0.0, 3.2, 977.7])
        exact = Exact(net.time_proj.num_channels)
        torch.testing.assert_close(
            net.time_proj(at).double(), exact(at.double()), atol=1e-4, rtol=0
        )
        net.time_proj = exact
    x, v, t, r, cond = drawn(shape, classes, dtype=torch.float64)
    velocity = Velocity(net)

    def u(x, t, r):
        return velocity(x, t, cond, r)

    with torch.no_grad():
        h = 1e-7
        slope = (u(x + h * v, t + h, r) - u(x - h * v, t - h, r)) / (2 * h)
        wanted = v + path.expand(r - t, x) * slope
    found = objectives.average_target(u, x, t, r, v, 0)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert ((found - v).abs() > 1e-3).any()


ATTENTION = [{"add_attention": True}, {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}]


@pytest.mark.parametrize("values", ATTENTION)
def test_small_differences_through_attention_are_the_derivative(values):
    """The derivative by two reverse passes, since forward differentiation fails there."""
    net = networks.build(NetConfig(**UNET | values), (1, 8, 8), None, 0).eval()
    net = shaken(two_time.add(net, 0)).double()
    net.time_proj = Exact(net.time_proj.num_channels)
    x, v, t, r, _ = drawn((1, 8, 8), None, dtype=torch.float64)
    velocity = Velocity(net)

    def u(x, t, r):
        return velocity(x, t, None, r)

    along = (v, torch.ones_like(t), torch.zeros_like(r))
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.autograd.functional.jvp(u, (x, t, r), along)
    wanted = v + path.expand(r - t, x) * slope
    found = objectives.average_target(u, x, t, r, v, 1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert ((found - v).abs() > 1e-3).any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_second_time_changes_nothing_at_first_and_folds_away_at_the_end(kind):
    net, shape, classes = build(kind)
    x, _, t, r, cond = drawn(shape, classes)
    two = two_time.add(net, 0)
    assert two_time.argument(net) is None is not two_time.argument(two)
    assert network_digest(two) == network_digest(two_time.add(net, 0)) != network_digest(net)
    with torch.no_grad():
        assert torch.equal(Velocity(two)(x, t, cond, r), Velocity(net)(x, t, cond))
        shaken(two)
        velocity = Velocity(two)
        assert torch.equal(velocity(x, t, cond), velocity(x, t, cond, t))  # u(x, t, t) = v(x, t)
        assert not torch.allclose(velocity(x, t, cond), velocity(x, t, cond, 1.0))
        folded = two_time.fold(two)
        public = {k: v for k, v in net.config.items() if k[0] != "_"}
        assert {k: v for k, v in folded.config.items() if k[0] != "_"} == public
        found = Velocity(folded)(x, 0.0, cond)
        torch.testing.assert_close(found, velocity(x, 0.0, cond, 1.0), atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="takes a single time"):
        Velocity(folded)(x, t, cond, r)


def test_networks_without_a_place_for_a_second_time_are_refused():
    net = networks.build(NetConfig(**UNET), (1, 8, 8), 4, 0)
    with pytest.raises(UserError, match="objective.name=meanflow needs .*with labels has no place"):
        two_time.add(net, 0)
    with pytest.raises(UserError, match="net.class_embed_type: unknown key"):
        networks.build(NetConfig(**UNET, class_embed_type="timestep"), (1, 8, 8), None, 0)


@pytest.mark.parametrize("values", ATTENTION)
def test_attention_takes_differences_and_refuses_the_derivative(tmp_path, values):
    make_teacher(tmp_path / "flow", None, (1, 8, 8), **(UNET | values))
    pairs_of(tmp_path, tmp_path / "flow")
    words = reflow_words(tmp_path, "meanflow", f"{tmp_path}/flow", MEANFLOW)
    with pytest.raises(UserError, match="has attention, .* use objective.step=0.05"):
        run(reflow, *words, "objective.step=0")
    net = networks.load(tmp_path / "flow/net", "x")  # the reason is true of this torch
    x, v, t, _, _ = drawn((1, 8, 8), None)
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(Velocity(net), (x, t), (v, torch.ones_like(t)))
    run(reflow, *words)


def test_a_compiled_network_in_channels_last_trains_alike(tmp_path, monkeypatch):
    """By the backend that generates no code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    small = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"]}
    small |= {"up_block_types": ["UpBlock2D"]}
    make_teacher(tmp_path / "flow", None, (1, 8, 8), **UNET | small)
    pairs_of(tmp_path, tmp_path / "flow")
    losses = {}
    for name, more in {"plain": [], "fast": ["fit.compile=true", "fit.channels_last=true"]}.items():
        run(reflow, *reflow_words(tmp_path, name, f"{tmp_path}/flow", MEANFLOW, *more))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["plain"]) == 3
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-4)


def test_second_times_follow_their_shares():
    rng = np.random.default_rng(0)
    t, w = (torch.from_numpy(rng.random(200_000)) for _ in range(2))
    r = objectives.later(t, w, 0.25, 0.5)
    assert ((r >= t) & (r <= 1)).all()
    assert (r == t).double().mean().item() == pytest.approx(0.25, abs=0.005)
    assert (r == 1).double().mean().item() == pytest.approx(0.5, abs=0.005)
    between = ((r - t) / (1 - t))[(r > t) & (r < 1)]
    quantiles = torch.quantile(between[:100_000], torch.tensor([0.25, 0.5, 0.75]).double())
    torch.testing.assert_close(
        quantiles, torch.tensor([0.25, 0.5, 0.75]).double(), atol=0.01, rtol=0
    )
    assert (objectives.later(t, w, 0.0, 1.0) == 1).all()


def test_the_objective_is_the_loss_to_the_target_and_its_gradient_stops_there():
    net, shape, _ = build("mlp")
    net = shaken(two_time.add(net, 0))
    x0, x1, t, _, _ = drawn(shape, None)
    w = torch.linspace(0, 0.99, 6)
    loss = LossConfig(name="pseudo_huber", c=0.1)
    v = Velocity(net)
    error = objectives.build(SHARES, loss)(v, v, x0, x1, t, w, None, 0)
    x, r = path.interpolate(x0, x1, t), objectives.later(t, w, SHARES.equal, SHARES.end)
    target = objectives.average_target(
        lambda x, t, r: v(x, t, None, r), x, t, r, x1 - x0, SHARES.step
    )
    wanted = ((v(x, t, None, r) - target).square().sum(1) + 0.01).sqrt() - 0.1
    torch.testing.assert_close(error, wanted)
    found = torch.autograd.grad(error.sum(), list(net.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), list(net.parameters())))
    equal = ObjectiveConfig(name="meanflow", equal=1.0, end=0.0)  # then it is flow matching
    error = objectives.build(equal, loss)(v, v, x0, x1, t, w, None, 0)
    plain = ((v(x, t) - (x1 - x0)).square().sum(1) + 0.01).sqrt() - 0.1
    torch.testing.assert_close(error, plain)


def test_dropout_is_no_part_of_the_slope():
    """Else a difference over a step divides by it what two masks make."""
    net = shaken(
        two_time.add(networks.build(NetConfig(**UNET, dropout=0.5), (1, 8, 8), None, 0), 0)
    )
    x0, x1, t, _, _ = drawn((1, 8, 8), None)
    v, w = Velocity(net.train()), torch.full((6,), 0.5)

    def error(step):
        torch.manual_seed(0)
        config = SHARES.model_copy(update={"step": step})
        return objectives.build(config, LossConfig())(v, v, x0, x1, t, w, None, 7)

    torch.testing.assert_close(error(1e-5), error(0), rtol=0.01, atol=0)


def test_the_masks_of_the_slope_are_those_of_the_seed_that_is_given():
    net = shaken(
        two_time.add(networks.build(NetConfig(**UNET, dropout=0.5), (1, 8, 8), None, 0), 0)
    ).train()
    x0, x1, t, _, _ = drawn((1, 8, 8), None)
    still, u = Velocity(copy.deepcopy(net).eval()), torch.full((6,), 0.5)

    def error(before, mask_seed):  # v itself drops nothing: what is left of chance is the target's
        torch.manual_seed(before)
        objective = objectives.build(SHARES, LossConfig())
        return objective(still, Velocity(net), x0, x1, t, u, None, mask_seed)

    assert torch.equal(error(1, 7), error(2, 7))
    assert not torch.equal(error(1, 7), error(1, 8))


def pairs_of(root, teacher):
    few = ["shards=1", "shard_size=64", "block=16", "compute_batch=32", "solver.steps=2"]
    words = [f"run_dir={root}/pairs", f"teacher={teacher}", *few]
    run(generate_pairs, *words)


def reflow_words(root, name, start, *more):
    place = [f"run_dir={root}/{name}", f"start={start}", f"pairs=[{{path: {root}/pairs}}]"]
    return [*place, *SMALL, *more]


MEANFLOW = "objective.name=meanflow"


@pytest.mark.slow
def test_meanflow_goes_from_pairs_to_a_stock_export(tmp_path):
    net, shape, _ = KINDS["unet"]
    make_teacher(tmp_path / "flow", None, shape, **net)
    pairs_of(tmp_path, tmp_path / "flow")
    words = reflow_words(tmp_path, "meanflow", f"{tmp_path}/flow", MEANFLOW)
    run(reflow, *words)
    student = teachers.load(tmp_path / "meanflow", "student")
    assert student.two_times
    assert not student.one_step

    words = [f"teacher={tmp_path}/flow", f"student={tmp_path}/meanflow", "data={source: digits}"]
    words += ["samples=16", "converged_steps=1", "features=values", "steps=[1,2]"]
    run(evaluate, f"run_dir={tmp_path}/evaluate", *words)
    rows = json.loads((tmp_path / "evaluate/metrics.json").read_text())["student"]["rows"]
    assert [row["evaluations"] for row in rows] == [1, 2, 2]

    words = [f"run_dir={tmp_path}/export", f"student={tmp_path}/meanflow"]
    words += [f"evaluation={tmp_path}/evaluate"]
    with pytest.raises(UserError, match="use steps="):
        run(export, *words, "steps=[1,2]")
    run(export, *words)
    config = json.loads((tmp_path / "export/unet/config.json").read_text())
    assert config["class_embed_type"] is None
    plain = networks.load(tmp_path / "export/unet", "x")
    x0 = torch.randn(4, *shape)
    with torch.no_grad():
        found = x0 + Velocity(plain)(x0, 0.0)
        one = solvers.jumps(
            lambda x, t, r: student.velocity()(x, t, None, r), x0, torch.tensor([0.0, 1.0])
        )
    torch.testing.assert_close(found, one, atol=2e-6, rtol=1e-5)

    # its pairs by Euler end where evaluate's rows do, and not where its velocity at t = 0 points
    few = ["shards=1", "shard_size=16", "block=16", "compute_batch=8", "dtype=float32"]
    few += ["solver={name: euler, steps: 2}", f"run_dir={tmp_path}/again"]
    run(generate_pairs, f"teacher={tmp_path}/meanflow", *few)
    batch = PairData(tmp_path / "again").batch(range(16))
    grid = torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        u = student.velocity()
        ends = solvers.jumps(lambda x, t, r: u(x, t, None, r), batch["x0"], grid)
        slopes = solvers.integrate(u, batch["x0"], grid, "euler")
    torch.testing.assert_close(batch["x1"], ends, atol=2e-6, rtol=1e-5)
    assert (ends - slopes).abs().max() > 1e-3

    words = reflow_words(tmp_path, "no", f"{tmp_path}/meanflow")
    with pytest.raises(UserError, match="takes a second time .MeanFlow., which objective.name=vel"):
        run(reflow, *words)
    bad = ["fit.precision=bf16", "loss={name: feature, features: x}", "objective.end=0.9"]
    bad += ["fit.compile=true", "fit.channels_last=true", "times.zero=1.0", "objective.step=0"]
    with pytest.raises(UserError) as error:
        run(reflow, *words, MEANFLOW, *bad)
    said = str(error.value)
    with pytest.raises(UserError, match=r"for_steps=\[2\]: objective.name=meanflow learns to step"):
        run(reflow, *words, MEANFLOW, "for_steps=2")
    for part in (
        "fit.precision='bf16'",
        "loss.name=feature compares data",
        "a sum of more than 1",
        "compile=",
        "channels_",
        "times.zero=1: objective.name=meanflow needs the slope in t",
    ):
        assert part in said


def test_two_steps_of_an_average_velocity_land_on_the_flow():
    u, x0 = Average(), torch.randn(5, 2, dtype=torch.float64)

    def average(x, t, s):
        ones = torch.ones(len(x), dtype=torch.float64)
        return u(x, t * ones, s * ones)

    found = solvers.jumps(average, x0, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found, u.target.flow(x0))


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 0.05])
def test_two_processes_train_the_network_of_one(tmp_path, step):
    """DDP averages the gradients; the target, which passes it by, needs none."""
    make_teacher(tmp_path / "flow", None, (2,), **MLP)
    pairs_of(tmp_path, tmp_path / "flow")
    many = [MEANFLOW, f"objective.step={step}", "fit.steps=20"]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    words += ["configs/accelerate/cpu_2.yaml", "--main_process_port", "0", "-m", "pipelines.reflow"]
    more = reflow_words(tmp_path, "two", f"{tmp_path}/flow", *many, "device=cpu")
    done = subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    words = reflow_words(tmp_path, "one", f"{tmp_path}/flow", *many)
    run(reflow, *words)
    one, two, start = (
        copy.deepcopy(networks.load(tmp_path / name / "net", "x").state_dict())
        for name in ("one", "two", "flow")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
    assert max((one[k] - start[k]).abs().max() for k in start) > 1e-3
