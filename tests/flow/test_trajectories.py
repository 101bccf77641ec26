"""Objectives on trajectories: closed forms on the flow of a Gaussian, their ends, their refusals."""

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import objectives, path, solvers, times, toy, trajectories
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig

TIMES = [0.25, 0.5, 0.75]
SEGMENTS, CMT = (ObjectiveConfig(name=name) for name in ("segments", "cmt"))
DOUBLE = torch.float64


class Flow:
    """A Gaussian's flow, X(t) = t mu + P(t) x0, P(t) symmetric, and its polyline through the states."""

    def __init__(self):
        root = torch.tensor([[1.0, 0.3], [0.0, 0.4]], dtype=DOUBLE)
        self.target = toy.Gaussian([0.5, -1.0], root @ root.T)
        self.mean, self.axes = self.target.means[0], self.target.axes[0]
        self.knots = torch.tensor([0.0, *TIMES, 1.0], dtype=DOUBLE)

    def scale(self, t):
        return (t**2 * self.target.variances[0] + (1 - t) ** 2).sqrt()

    def states(self, x0):
        """[B, K + 2, 2]."""
        return torch.stack([t * self.mean + self.turned(x0, self.scale(t)) for t in self.knots], 1)

    def turned(self, x, scale):
        return ((x @ self.axes) * scale) @ self.axes.T

    def window(self, t):
        """Number of the window of t, its ends, and the scale of the polyline at t, all [B, 1]."""
        k = (torch.searchsorted(self.knots, t.contiguous(), right=True) - 1).clamp(max=len(TIMES))
        a, b = self.knots[k][:, None], self.knots[k + 1][:, None]
        share = (t[:, None] - a) / (b - a)
        return a, b, (1 - share) * self.scale(a) + share * self.scale(b)

    def straight(self, x, t):
        """The velocity field of the polyline: what `segments` is to learn."""
        a, b, scale = self.window(t)
        rate = (self.scale(b) - self.scale(a)) / (b - a)
        return self.mean + self.turned(x - t[:, None] * self.mean, rate / scale)

    def to_end(self, x, t):
        """What `cmt` is to learn: (X(1) - x) / (1 - t)."""
        _, _, scale = self.window(t)
        one = torch.ones(1, dtype=DOUBLE)
        end = self.mean + self.turned(x - t[:, None] * self.mean, self.scale(one) / scale)
        return (end - x) / (1 - t[:, None])


def drawn(flow, config, n=400):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(n, 2, generator=generator, dtype=DOUBLE)
    t = torch.rand(n, generator=generator, dtype=DOUBLE)
    t[:8] = torch.tensor([*[0.0, 0.25, 0.5, 0.75], 0.1, 0.3, 0.6, 0.9])
    points = flow.states(x0)
    lines = trajectories.build(config, {"set": TIMES})
    return lines, points, t, lines(x0, points[:, 1:-1], points[:, -1], t)


def test_the_states_of_the_oracle_are_where_its_flow_is():
    flow, x0 = Flow(), torch.randn(5, 2, dtype=DOUBLE)
    assert torch.allclose(flow.states(x0)[:, -1], flow.target.flow(x0))
    grid = torch.tensor([*torch.linspace(0, 0.5, 200).tolist()], dtype=DOUBLE)
    found = solvers.integrate(lambda x, t: flow.target.velocity(x, t), x0, grid, "rk4")
    assert (found - flow.states(x0)[:, 2]).abs().max() < 1e-6


@pytest.mark.parametrize(("config", "field"), [(SEGMENTS, "straight"), (CMT, "to_end")])
def test_what_is_learnt_on_the_paths_of_a_gaussian_has_a_closed_form(config, field):
    """The field in closed form has no error, whatever pair and time is drawn: it is the fixed point."""
    flow = Flow()
    wanted = getattr(flow, field)
    _, _, t, (a, b) = drawn(flow, config)
    torch.testing.assert_close(wanted(path.interpolate(a, b, t), t), b - a)
    objective = objectives.build(config, LossConfig(name="mse"))
    error = objective(lambda x, t, cond: wanted(x, t), None, a, b, t, t, None, 0)
    assert error.max() < 1e-20
    off = objective(lambda x, t, cond: wanted(x, t) + 0.1, None, a, b, t, t, None, 0)
    assert off.min() > 1e-3


def test_the_steps_of_segments_end_where_the_path_ends():
    flow, grid = Flow(), Flow().knots
    x0 = torch.randn(50, 2, dtype=DOUBLE)

    def field(x, t):
        return flow.straight(x, torch.as_tensor(t, dtype=DOUBLE).expand(len(x)))

    ends = flow.states(x0)[:, -1]
    torch.testing.assert_close(solvers.integrate(field, x0, grid, "euler"), ends)
    twice = torch.linspace(0, 1, 9, dtype=DOUBLE)  # multiples of the windows, too
    torch.testing.assert_close(solvers.integrate(field, x0, twice, "euler"), ends)
    half = solvers.integrate(field, x0, grid[::2], "euler")
    assert (half - ends).abs().max() > 1e-2


def test_one_step_of_cmt_from_any_state_is_the_flow_map():
    flow = Flow()
    points = flow.states(torch.randn(50, 2, dtype=DOUBLE))
    for k, t in enumerate(flow.knots[:-1]):
        v = flow.to_end(points[:, k], t.expand(50))
        torch.testing.assert_close(points[:, k] + (1 - t) * v, points[:, -1])


@pytest.mark.parametrize("config", [SEGMENTS, CMT])
def test_on_straight_paths_it_is_the_velocity_of_the_pair(config):
    x0, x1 = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1))
    t = torch.rand(40, generator=torch.Generator().manual_seed(2))
    t[:5] = torch.tensor([0.0, 0.25, 0.75, 0.9999, 1.0])
    states = torch.stack([path.interpolate(x0, x1, s) for s in TIMES], 1)
    a, b = trajectories.build(config, {"set": TIMES})(x0, states, x1, t)
    torch.testing.assert_close(a, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b, x1, atol=1e-5, rtol=1e-5)


def test_cmt_leads_to_the_data_and_stays_finite_at_its_end():
    flow = Flow()
    points = flow.states(torch.randn(6, 2, dtype=DOUBLE))
    t = torch.tensor([0.0, 0.2, 0.5, 0.76, 1 - 1e-12, 1.0], dtype=DOUBLE)
    lines = trajectories.build(CMT, {"set": TIMES})
    _, b = lines(points[:, 0], points[:, 1:-1], points[:, -1], t)
    torch.testing.assert_close(b, points[:, -1])


def test_the_share_at_zero_falls_on_the_starts_of_the_windows():
    lines = trajectories.build(SEGMENTS, {"set": TIMES})
    u = torch.linspace(0, 1, 80_001, dtype=DOUBLE)[:-1]
    config = TimesConfig(name="u_shape", zero=0.4)
    t = times.sample(u, config, lines.starts)
    for start in (0.0, *TIMES):
        assert (t == start).float().mean().item() == pytest.approx(0.1, abs=1e-3)
    plain = times.sample(u, config)
    assert torch.equal(t[u >= 0.4], plain[u >= 0.4])
    assert trajectories.build(CMT, {"set": TIMES}).starts == (0.0,)


def test_sets_of_other_times_and_unequal_windows_are_refused():
    with pytest.raises(UserError, match=r"b has states at \[0.5\], a at \[0.25, 0.5, 0.75\]"):
        trajectories.build(CMT, {"a": TIMES, "b": [0.5]})
    with pytest.raises(UserError, match=r"3 equal steps .* states=\[0.333, 0.667\]"):
        trajectories.build(SEGMENTS, {"a": [0.25, 0.5]})
    assert trajectories.build(CMT, {"a": [0.25, 0.6]}).windows is None
    assert trajectories.build(SEGMENTS, {"a": [1 / 3, 2 / 3]}).windows == 3
    assert trajectories.build(ObjectiveConfig(), {"a": []}) is None


def test_options_that_contradict_an_objective_on_trajectories_are_refused():
    feature = LossConfig(name="feature", features="eyes")
    with pytest.raises(UserError) as caught:
        objectives.check(SEGMENTS, feature, TimesConfig(zero=1.0), None, prompts=True)
    assert "times.zero=1" in str(caught.value)
    assert "loss.name=feature compares data" in str(caught.value)
    assert "a pipeline that reads prompts has its own grid" in str(caught.value)
    objectives.check(CMT, feature, TimesConfig(zero=0.5), None, prompts=True)
