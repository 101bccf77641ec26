"""Solvers and grids: measured orders, exactness on straight flows, and clear refusals."""

import math

import pytest
import torch

from flowmatch.config import UserError, validate
from flowmatch.flow import grids, solvers, toy
from flowmatch.flow.config import FIXED, GridConfig, SolverConfig
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.velocity import Velocity

SMOOTH = toy.GaussianMixture(  # component standard deviations .5 to 1
    [0.4, 0.6],
    [[1.5, 0.0], [-1.0, 1.0]],
    [[[0.5, 0.1], [0.1, 0.3]], [[0.4, 0.0], [0.0, 0.9]]],
)


def noise(n=400, d=2):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def truth():
    return solvers.integrate(SMOOTH, noise(), grids.uniform_grid(1000), "rk4")


def order(solver, truth, spacing=grids.uniform_grid):
    errors = [
        (solvers.integrate(SMOOTH, noise(), spacing(n), solver) - truth).norm(dim=1).median()
        for n in (64, 256)
    ]
    return math.log(errors[0] / errors[1], 4)


ORDERS = [
    ("euler", 1, 0.1),
    ("midpoint", 2, 0.1),
    ("heun", 2, 0.1),
    ("ab2", 2, 0.1),
    ("rk4", 4, 0.2),
]


@pytest.mark.parametrize(("solver", "expected", "within"), ORDERS)
def test_order_of_convergence(solver, expected, within, truth):
    assert order(solver, truth) == pytest.approx(expected, abs=within)


@pytest.mark.parametrize(("solver", "expected", "within"), ORDERS)
def test_the_order_holds_on_uneven_steps(solver, expected, within, truth):
    def uneven(n):  # ratios of neighbouring steps from 1/3 to 3
        grid = grids.sigmoid_grid(n, 4.0)
        grid[1:-1:2] += 0.5 * (grid[2::2] - grid[1:-1:2])
        return grid

    assert order(solver, truth, uneven) == pytest.approx(expected, abs=within)


# From 1e-5, the default, down: at 1e-4 the median here is 11 tolerances.
@pytest.mark.parametrize("tolerance", [1e-5, 1e-6, 1e-8])
def test_the_adaptive_solver_keeps_its_tolerance(tolerance, truth):
    x = solvers.dopri5(SMOOTH, noise(), rtol=tolerance, atol=tolerance)
    error = (x - truth).norm(dim=1)
    assert x.dtype == torch.float64
    assert error.median() < 10 * tolerance
    assert error.quantile(0.999) < 1000 * tolerance
    back = solvers.dopri5(SMOOTH, x, 1.0, 0.0, rtol=tolerance, atol=tolerance)
    error = (back - noise()).norm(dim=1)
    assert error.median() < 10 * tolerance
    assert error.quantile(0.999) < 1000 * tolerance


def test_the_adaptive_solver_works_for_its_tolerance_and_stays_inside_its_times():
    def count(tolerance, *ends, v=SMOOTH):
        seen = []

        def counting(x, t):
            seen.append(t)
            return v(x, t)

        solvers.dopri5(counting, noise(), *ends, rtol=tolerance, atol=tolerance)
        assert min(ends) <= min(seen)
        assert max(seen) <= max(ends)
        return len(seen)

    count(1e-5, 0.0, 1.0, v=lambda x, t: torch.full_like(x, 1e-4))  # a long first probe
    counts = [count(tolerance, 0.0, 1.0) for tolerance in (1e-3, 1e-5, 1e-7)]
    assert counts == sorted(set(counts))
    assert 10 < counts[0] < counts[-1] < 500
    count(1e-5, 0.9, 0.1)


def test_a_gaussian_arrives_where_its_closed_form_says():
    gaussian = toy.Gaussian([0.5, -1.0], [[1.5, 0.6], [0.6, 0.8]])
    expected = gaussian.flow(noise())
    for solver, tolerance in (("rk4", 1e-6), ("heun", 1e-3), ("midpoint", 1e-3), ("ab2", 1e-2)):
        x = solvers.integrate(gaussian, noise(), grids.uniform_grid(64), solver)
        torch.testing.assert_close(x, expected, atol=tolerance, rtol=0)
    x = solvers.dopri5(gaussian, noise(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("solver", FIXED)
def test_backward_undoes_forward(solver):
    grid = grids.uniform_grid(256)
    there = solvers.integrate(SMOOTH, noise(), grid, solver)
    back = solvers.integrate(SMOOTH, there, grid.flip(0), solver)
    limit = {"euler": 0.1, "rk4": 1e-7}.get(solver, 1e-3)
    assert (back - noise()).norm(dim=1).median() < limit


GRIDS = [
    {"grid": "uniform"},
    {"grid": "shift", "shift": 3.0},
    {"grid": "sigmoid", "kappa": 5.0},
    {"grid": "edm", "rho": 7.0},
    {"grid": "list", "points": [0.0, 0.1, 0.15, 0.7, 1.0]},
]


@pytest.mark.parametrize("solver", [*solvers.FIXED, "dopri5"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_straight_flow_is_exact_for_every_n_and_solver(solver, steps):
    x0, x1 = noise(5), noise(10)[5:]
    seen = []

    def straight(x, t):
        seen.append(t)
        return x1 - x0

    for spacing in GRIDS[: 1 if solver == "dopri5" else 3]:
        config = validate(
            SolverConfig, {"name": solver, "steps": steps, "state": "float64"} | spacing
        )
        seen.clear()
        torch.testing.assert_close(solvers.solve(straight, x0, config), x1, atol=1e-12, rtol=0)
        assert seen[0] == 0
        assert config.evaluations in (len(seen), None)
        torch.testing.assert_close(
            solvers.solve(straight, x1, config, backward=True), x0, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("spacing", GRIDS, ids=lambda g: g["grid"])
@pytest.mark.parametrize("steps", [1, 2, 4, 33])
def test_grids_run_from_noise_to_data(spacing, steps):
    if spacing["grid"] == "list":
        steps = 4
    grid = grids.make(validate(GridConfig, spacing), steps)
    assert grid.dtype == torch.float64
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (0, 1)
    assert (grid.diff() > 0).all()


def test_grids_follow_their_formulas():
    sigmas = [80.0, 2.515218, 0.002]  # EDM's own: rho 7, N = 3
    assert grids.edm_grid(3)[1:3].tolist() == pytest.approx([1 / (1 + s) for s in sigmas[1:]])
    assert grids.edm_grid(1).tolist() == [0, 1]
    grid = grids.sigmoid_grid(10, 6.0)
    ends = math.tanh(6.0 / 4)  # S(x) - 1/2 = tanh(x / 2) / 2
    for i in range(11):
        assert grid[i] == pytest.approx((1 + math.tanh(3.0 * (i / 10 - 0.5)) / ends) / 2)
    torch.testing.assert_close(grid, 1 - grid.flip(0))  # symmetric
    assert grid[1] < 0.05  # short steps at the ends
    torch.testing.assert_close(
        grids.sigmoid_grid(10, 1e-3), grids.uniform_grid(10), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_steps_are_those_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=(1 - grids.uniform_grid(4)[:-1]).tolist())
    found = grids.make(GridConfig(grid="shift", shift=shift), 4)
    torch.testing.assert_close(1 - found, scheduler.sigmas.double(), atol=1e-6, rtol=0)
    assert found[0] == 0
    assert found[-1] == 1
    assert grids.make(GridConfig(grid="shift"), 4)[1] == pytest.approx(0.1)


@pytest.mark.parametrize("shift", [3.0, 9.0])
def test_two_evaluations_by_ab2_are_one_step_and_a_correction(shift):
    """x0 + v(x0, 0) + (1 - t^2) / (2 t) (v(x_t, t) - v(x0, 0)), as the README says."""
    x0, t = torch.randn(50, 2, dtype=torch.float64), 1 / (1 + shift)
    v = toy.ring()
    first = v(x0, 0.0)
    second = v(x0 + t * first, t)
    expected = x0 + first + (1 - t * t) / (2 * t) * (second - first)
    found = solvers.integrate(v, x0, grids.shift_grid(2, shift), "ab2")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_state_keeps_float32_or_float64_and_the_network_its_own_dtype():
    net = networks.build(NetConfig(name="VelocityMLP", hidden=16), (2,), None, 0)
    v = Velocity(net)
    config = SolverConfig(name="heun", steps=4)
    with torch.no_grad():
        single = solvers.solve(v, noise(20).float(), config)
        double = solvers.solve(v, noise(20).float(), SolverConfig(steps=4, state="float64"))
        with torch.autocast("cpu", torch.bfloat16):
            seen = []

            def watched(x, t):
                seen.append(x.dtype)
                return v(x, t)

            half = solvers.solve(watched, noise(20).float(), config)
    assert (single.dtype, double.dtype, half.dtype) == (
        torch.float32,
        torch.float64,
        torch.float32,
    )
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(single, half, atol=2e-2, rtol=2e-2)
    assert not torch.equal(single, half)


@pytest.mark.parametrize(
    ("grid", "solver", "message"),
    [
        ([0.0], "euler", "at least two strictly monotone"),
        ([0.0, 0.5, 0.5, 1.0], "euler", "strictly monotone"),
        ([0.0, 0.7, 0.5], "rk4", "strictly monotone"),
        ([0.0, float("nan"), 1.0], "rk4", "strictly monotone"),
        ([0.0, 1.5], "ab2", "times in"),
        ([-0.1, 1.0], "ab2", "times in"),
        ([0.0, 1.0], "rk45", "expected one of euler, midpoint, heun, rk4, ab2"),
    ],
)
def test_bad_grids_and_names_are_refused(grid, solver, message):
    with pytest.raises(UserError, match=message):
        solvers.integrate(SMOOTH, noise(2), torch.tensor(grid), solver)


@pytest.mark.parametrize(
    "grid",
    [
        grids.uniform_grid,
        grids.edm_grid,
        lambda n: grids.sigmoid_grid(n, 1.0),
        lambda n: grids.shift_grid(n, 2.0),
    ],
)
def test_a_grid_of_no_steps_is_refused(grid):
    with pytest.raises(UserError, match="steps=0: a sampler needs at least 1 step"):
        grid(0)


@pytest.mark.parametrize("spacing", GRIDS[:4], ids=lambda g: g["grid"])
def test_a_grid_of_too_many_steps_is_refused(spacing):
    for steps in (10**6, 2**40):
        with pytest.raises(UserError, match="a sampler takes at most 100,000"):
            grids.make(validate(SolverConfig, spacing), steps)


def test_half_precision_states_and_other_shapes_are_refused():
    with pytest.raises(UserError, match="solvers keep it in float32 or float64"):
        solvers.integrate(SMOOTH, noise(2).half(), grids.uniform_grid(2))
    with pytest.raises(UserError, match=r"the velocity of x \[2, 2\] is \[2, 1\]"):
        solvers.integrate(lambda x, t: x[:, :1], noise(2), grids.uniform_grid(2))
    with pytest.raises(UserError, match=r"the velocity of x \[2, 2\] is \[2, 1\]"):
        solvers.dopri5(lambda x, t: x[:, :1], noise(2))
    with pytest.raises(UserError, match="times in"):
        solvers.dopri5(SMOOTH, noise(2), 0.0, 1.2)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (lambda x, t: x * (float("nan") if t > 0.5 else 1), "velocity is not finite at t = 0"),
        (lambda x, t: x / (x - x), "velocity is not finite at t = 0"),
        (lambda x, t: 10 * x**2 + 10, "shrank to nothing"),
    ],
)
def test_what_the_adaptive_solver_cannot_integrate_is_named(v, message):
    with pytest.raises(UserError, match=message):
        solvers.dopri5(v, noise(3))
    with pytest.raises(UserError, match="not finite at t = 0"):
        solvers.dopri5(SMOOTH, noise(3) / 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "dopri5", "grid": "edm"}, "dopri5 chooses its own steps; leave out grid=edm"),
        ({"grid": "list", "steps": 2}, "at least two strictly monotone"),
        (
            {"grid": "list", "points": [0.0, 0.5, 1.0]},
            "steps=32: points has 3 times, which make 2 steps; use steps=2",
        ),
        ({"grid": "list", "points": [0.1, 0.5, 1.0], "steps": 2}, "expected times from 0 to 1"),
        ({"points": [0.0, 1.0]}, "points belongs to grid=list"),
        ({"grid": "edm", "sigma_min": 3.0, "sigma_max": 2.0}, "more than sigma_min=3.0"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"name": "rk45"}, "'euler', 'midpoint'"),
    ],
)
def test_refused_configs_name_the_reason(values, message):
    with pytest.raises(UserError, match=message):
        validate(SolverConfig, values)
