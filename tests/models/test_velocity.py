"""How a velocity is integrated by a config: with Euler a two-time network jumps, all else is solved."""

import pytest
import torch

from flowmatch.flow import grids, samplers, solvers
from flowmatch.flow.config import SamplerConfig, SolverConfig
from flowmatch.models import networks, two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.velocity import Velocity

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
COND = {"label": torch.arange(6) % 3}
IDS = range(6)


@pytest.fixture(scope="module", params=[False, True], ids=["one time", "two times"])
def velocity(request):
    net = networks.build(NetConfig(name="VelocityMLP", hidden=16), (2,), 3, 0)
    if request.param:
        net = two_time.add(net, 0)
        torch.nn.init.normal_(net.target.weight, generator=torch.Generator().manual_seed(0))
    return Velocity(net.requires_grad_(False))


def field(velocity):
    return lambda x, t, r=None: velocity(x, t, COND, r)


def test_euler_is_the_rule_of_the_network(velocity):
    config = SolverConfig(name="euler", steps=3, grid="shift")
    grid = grids.make(config, 3)
    jumped = velocity.second and solvers.jumps(field(velocity), X, grid)
    solved = solvers.integrate(field(velocity), X, grid, "euler")
    expected = solved if jumped is None else jumped
    assert torch.equal(velocity.integrate(X, config, COND), expected)
    sampler = SamplerConfig(name="euler", grid="shift")
    assert torch.equal(velocity.sample(X, sampler, 3, COND, seed=0, ids=IDS), expected)
    if jumped is not None:
        assert (jumped - solved).abs().max() > 1e-3


def test_all_else_is_solved_and_sampled(velocity):
    v = field(velocity)
    heun = SolverConfig(name="heun", steps=3)
    assert torch.equal(velocity.integrate(X, heun, COND), solvers.solve(v, X, heun))
    ddpm = SamplerConfig(name="ddpm")
    expected = samplers.sample(v, X, ddpm, 3, seed=1, ids=IDS)
    assert torch.equal(velocity.sample(X, ddpm, 3, COND, seed=1, ids=IDS), expected)
    for name in ("heun", "euler"):  # backward there is no average velocity to go by
        config = SolverConfig(name=name, steps=3)
        back = solvers.solve(v, X, config, backward=True)
        assert torch.equal(velocity.integrate(X, config, COND, backward=True), back)


def test_the_caller_may_look_before_each_evaluation_and_stop_it(velocity):
    seen = []
    for name, evaluations in (("euler", 3), ("heun", 6)):
        seen.clear()
        velocity.integrate(X, SolverConfig(name=name, steps=3), COND, before=lambda: seen.append(1))
        assert len(seen) == evaluations

    def stop():
        raise InterruptedError

    count = velocity.evaluations
    with pytest.raises(InterruptedError):
        velocity.integrate(X, SolverConfig(steps=3), COND, before=stop)
    assert velocity.evaluations == count


def test_a_wrapper_of_ddp_hides_no_config():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    net = networks.build(NetConfig(name="VelocityMLP", hidden=16), (2,), 3, 0)
    wrapped, plain = Velocity(Wrapper(net), 2.0), Velocity(net, 2.0)
    assert wrapped.classes == plain.classes == 3
    torch.testing.assert_close(wrapped(X, 0.5, COND), plain(X, 0.5, COND))


def test_what_compiles_a_network_in_place_leaves_no_wrapper():
    """Velocity unwraps DDP alone; torch.compile(net) would make a wrapper, which nothing here calls."""
    net = networks.build(NetConfig(name="VelocityMLP", hidden=16), (2,), None, 0)
    kind = type(net)
    net.compile(backend="eager")  # pairs
    net.forward = torch.compile(net.forward, backend="eager")  # training
    assert type(net) is kind
    assert Velocity(net).classes is None
