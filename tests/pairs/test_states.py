"""States of the paths beside the pairs: what they are, their bytes, faults, readers, and refusals."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from flowmatch.config import UserError, validate
from flowmatch.flow import grids, solvers
from flowmatch.flow.config import SolverConfig
from flowmatch.models import teachers
from flowmatch.pairs import path_times
from flowmatch.pairs.config import PairsConfig
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from flowmatch.runs import manifest
from pipelines import inspect_pairs, verify_pairs
from tests import pairset, stock
from tests.pairset import generate

SOLVER = ["solver.name=heun", "solver.steps=8", "dtype=float32"]
TIMES = [0.125, 0.5, 0.75]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Pairs with states, and the same without."""
    root = tmp_path_factory.mktemp("states")
    pairset.make_teacher(root / "flow")
    generate(*pairset.words(root, *SOLVER, f"states={TIMES}"))
    generate(*pairset.words(root, *SOLVER, folder="plain"))
    return root


def velocity(x, t):
    return torch.sin(3 * x) + t


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "ab2"])
def test_a_state_is_where_the_same_steps_lead(solver):
    x, config = torch.randn(4, 3), SolverConfig(name=solver, steps=6, grid="shift", shift=3.0)
    grid = grids.make(config, 6)
    times = solvers.times_of(config)
    assert times == grid.tolist()[1:-1]
    keep = dict.fromkeys(times[1::2])
    end = solvers.solve(velocity, x, config, keep=keep)
    assert torch.equal(end, solvers.solve(velocity, x, config))
    for i in (2, 4):
        assert torch.equal(
            keep[times[i - 1]], solvers.integrate(velocity, x, grid[: i + 1], solver)
        )


@pytest.mark.parametrize("backward", [False, True])
def test_the_adaptive_solver_keeps_its_steps_and_states_of_any_time(backward):
    x, config = torch.randn(4, 3, dtype=torch.float64), SolverConfig(name="dopri5", state="float64")
    keep = dict.fromkeys((0.2, 0.61))
    end = solvers.solve(velocity, x, config, backward=backward, keep=keep)
    assert torch.equal(end, solvers.solve(velocity, x, config, backward=backward))
    for (a, y), (b, z) in pairwise([(0.2, keep[0.2]), (0.61, keep[0.61])]):
        there = solvers.dopri5(velocity, y, a, b, rtol=1e-9, atol=1e-9)
        assert (there - z).abs().max() < 1e-3  # interpolated between steps


def test_states_of_a_path_from_data_to_noise_are_at_the_times_asked_for():
    config = SolverConfig(name="heun", steps=64)
    x, keep = torch.randn(4, 3), dict.fromkeys((0.25, 0.75))
    forward = dict.fromkeys((0.25, 0.75))
    end = solvers.solve(velocity, x, config, keep=forward)
    solvers.solve(velocity, end, config, backward=True, keep=keep)
    for t in keep:
        assert (keep[t] - forward[t]).abs().max() < 1e-2


def test_they_stand_beside_the_same_pairs(whole):
    data, plain = PairData(whole / "pairs", states=True), PairData(whole / "plain")
    batch, before = data.batch(range(30)), plain.batch(range(30))
    assert batch["xt"].shape == (30, 3, 2)
    for name in ("x0", "x1", "label"):
        assert torch.equal(batch[name], before[name])
    assert data.times == data.sealed["facts"]["times"] == TIMES
    assert data.sealed["facts"]["evaluations"] == plain.sealed["facts"]["evaluations"] == 16
    v = teachers.load(whole / "flow", "teacher").velocity()
    config, some = SolverConfig(name="heun", steps=8), slice(0, 5)
    keep = dict.fromkeys(TIMES)
    v.integrate(before["x0"][some], config, {"label": before["label"][some]}, keep=keep)
    assert torch.equal(torch.stack([keep[t] for t in TIMES], 1), batch["xt"][some])


def test_a_batch_holds_them_only_where_they_are_asked_for(whole):
    assert set(PairData(whole / "pairs").batch([3])) == {"x0", "x1", "label"}
    with pytest.raises(UserError, match=r"states=\[\.\.\.\]"):
        PairData(whole / "plain", states=True)


def test_the_bytes_do_not_depend_on_who_makes_which_shard(whole, tmp_path):
    shutil.copytree(whole / "flow", tmp_path / "flow")
    generate(*pairset.words(tmp_path, *SOLVER, f"states={TIMES}", "compute_batch=5"))
    made = tmp_path / "pairs"
    (made / ".meta/pairs-000001.json").unlink()  # as after a kill before the commit
    (made / "manifest.json").unlink()
    generate(*pairset.words(tmp_path, *SOLVER, f"states={TIMES}"))
    assert pairset.contents(made) == pairset.contents(whole / "pairs")


def test_a_damaged_state_is_found_and_made_again(whole, tmp_path, capsys):
    folder = pairset.copy(whole, tmp_path)
    data, sound = PairData(folder), pairset.contents(folder)
    place = int(data.layout.offsets(4)["xt"]) + 1
    with open(folder / "pairs-000001.tar", "r+b") as file:
        file.seek(place)
        file.write(b"\x55")
    assert verify_pairs.main([str(folder), "--full", "--repair"]) == 2
    assert "pairs-000001.tar is damaged" in capsys.readouterr().err
    generate(*pairset.words(tmp_path, *SOLVER, f"states={TIMES}"))
    assert pairset.contents(folder) == sound
    assert verify_pairs.main([str(folder), "--full"]) == 0


def test_times_that_do_not_fit_the_layout_are_damage(whole, tmp_path, capsys):
    folder = pairset.copy(whole, tmp_path)
    sealed = json.loads((folder / "manifest.json").read_text())
    sealed["facts"]["times"] = TIMES[1:]
    (folder / "manifest.json").write_text(json.dumps(sealed))
    assert verify_pairs.main([str(folder)]) == 2
    assert "times=[0.5, 0.75], but states=3" in capsys.readouterr().err


def test_others_read_them_too(whole, tmp_path):
    (tmp_path / "pairs").mkdir()
    for path in [*(whole / "pairs").glob("*.tar"), whole / "pairs/README.md"]:
        shutil.copy(path, tmp_path / "pairs")
    told = PairData(whole / "pairs", states=True).batch(range(30))["xt"].numpy()
    for arrays in stock.read(tmp_path / "pairs", tmp_path).values():
        name = next(name for name in arrays if name.startswith("xt"))
        assert np.array_equal(arrays[name], told)


def test_a_set_in_a_store_gives_the_same(whole, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in (whole / "pairs").iterdir():
        if path.is_file():
            memory.pipe_file(f"/states/set/{path.name}", path.read_bytes())
    there = PairData("memory://states/set", states=True, cache=tmp_path / "cache")
    here = PairData(whole / "pairs", states=True)
    assert torch.equal(there.batch([29, 3])["xt"], here.batch([29, 3])["xt"])


def test_inspect_tells_how_far_paths_are_from_their_lines(whole, tmp_path, capsys):
    assert inspect_pairs.main([str(whole / "pairs"), "--out", str(tmp_path / "look")]) == 0
    batch = PairData(whole / "pairs", states=True).batch(range(30))
    x0, x1, xt = (batch[name].double() for name in ("x0", "x1", "xt"))
    apart = (xt[:, 1] - (x0 + x1) / 2).square().sum(1).mean()
    told = f"t = 0.5: {float((apart / (x1 - x0).square().sum(1).mean()).sqrt()):.3g}"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([0.3], "0.3 is no time of solver.name=heun; its times: 0.125, 0.25"),
        ([0.5, 0.5002], "two of them are one time"),
    ],
)
def test_a_time_that_no_step_ends_at_is_refused_with_those_that_are(states, said):
    times = solvers.times_of(SolverConfig(name="heun", steps=8))
    with pytest.raises(UserError) as caught:
        path_times.exact(states, times, (0.0, 1.0), "heun")
    assert said in str(caught.value)


def test_times_are_matched_to_three_decimals_and_kept_in_the_span():
    third = solvers.times_of(SolverConfig(name="heun", steps=3))
    assert path_times.exact([0.333], third, (0.0, 1.0), "heun") == third[:1]
    with pytest.raises(UserError, match="expected times inside 0.01 to 0.99"):
        path_times.exact([0.001], None, (0.01, 0.99), "dopri5")


@pytest.mark.parametrize("states", [[0.5, 0.25], [0.0], [1.0], [0.5, 0.5]])
def test_times_rise_between_noise_and_data(states):
    given = {"run_dir": "a", "teacher": "b", "shards": 1, "states": states}
    with pytest.raises(UserError, match="each larger than the one before"):
        validate(PairsConfig, given)


def test_sets_without_states_are_what_they_were():
    layout = Layout((2,), "float16", True, 10, 4)
    assert "states" not in layout.entries()
    config, inputs = {"seed": 0}, {"teacher": "a"}
    assert manifest.pair_fingerprint(
        config | {"states": []}, inputs, 0
    ) == manifest.pair_fingerprint(config, inputs, 0)
