"""Pairs of real data: carried back along the teacher's flow to the noise that it makes them from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowmatch.config import UserError
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.flow import solvers, toy
from flowmatch.flow.config import SolverConfig
from flowmatch.models import teachers
from flowmatch.models.velocity import Velocity
from flowmatch.pairs import shards
from flowmatch.pairs.dataset import PairData
from flowmatch.runs.command import execute, load
from pipelines import inspect_pairs, reflow, verify_pairs
from tests import pairset, stock
from tests.models.test_diffusion import Config
from tests.pairs.test_faults import commands, mend, rehash, verify
from tests.pairset import contents, copy, generate

RING = ["data.source=ring", "data.samples=33", "data.seed=5", "data.labels=true", "dtype=float32"]
FINE = ["solver.name=rk4", "solver.steps=40"]  # 33 items, of which 30 make 3 shards of 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    pairset.make_teacher(root / "flow", toy.RING_MODES)
    generate(*pairset.words(root, *RING, *FINE))
    return root


def ring():
    config = DataConfig(source="ring", samples=33, seed=5, labels=True)
    return dataset.load(config).batch(np.arange(33))


class Exact(torch.nn.Module):
    """A network without error for a Gaussian, in the terms of diffusers."""

    def __init__(self, target):
        super().__init__()
        self.target, self.config = target, Config(in_channels=3, out_channels=3)
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, sample, timestep):
        return SimpleNamespace(sample=-self.target.velocity(sample, 1 - timestep.double() / 1000))


@pytest.mark.parametrize(("name", "close"), [("dopri5", 2e-4), ("rk4", 2e-4), ("heun", 2e-2)])
def test_the_noise_of_gaussian_data_is_that_of_its_closed_form(name, close):
    covariance = [[2.0, 0.6, 0.0], [0.6, 0.5, 0.1], [0.0, 0.1, 1.0]]
    target = toy.Gaussian([1.0, -2.0, 0.5], covariance)
    x0 = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, config = Velocity(Exact(target)), SolverConfig(name=name, state="float64")

    def solve(field, x, span):
        return solvers.solve(field, x, config, span, backward=True)

    assert (v.invert(target.flow(x0), solve) - x0).abs().max() < close  # times are float32


def test_pairs_are_items_in_order_and_the_flow_leads_from_their_noise_to_them(whole):
    truth, pairs = ring(), PairData(whole / "pairs")
    assert len(pairs) == 30
    batch = pairs.batch(range(30))
    assert torch.equal(batch["x1"], truth["x1"][:30])
    assert torch.equal(batch["label"], truth["label"][:30])
    v = teachers.load(whole / "flow", "teacher").velocity()
    config = SolverConfig(name="rk4", steps=40)
    with torch.inference_mode():
        again = v.carry(
            batch["x0"],
            lambda f, x, span: solvers.solve(f, x, config, span),
            {"label": batch["label"]},
        )
    assert (batch["x0"] - batch["x1"]).abs().mean() > 0.05
    torch.testing.assert_close(again, batch["x1"], atol=2e-5, rtol=0)


def test_the_bytes_do_not_depend_on_who_makes_which_shard(whole, tmp_path, monkeypatch):
    """Padding goes past the end of the data in the last shard; growing gives what is made at once."""
    copy(whole, tmp_path)
    more = [*RING, *FINE, "data.samples=30", "compute_batch=7"]
    generate(*pairset.words(tmp_path, *more, folder="one"))
    for rank in ("2", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        generate(*pairset.words(tmp_path, *more, "shards=1", folder="two"))
    generate(*pairset.words(tmp_path, *more, folder="two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_it_is_verified_inspected_and_read_by_others(whole, tmp_path, capsys):
    folder = whole / "pairs"
    assert verify(capsys, folder, "--full")[0] == 0
    out = str(tmp_path / "look")
    assert inspect_pairs.main([str(folder), "--out", out]) == 0
    told = capsys.readouterr().out
    assert "inverted by rk4, 160 evaluations a pair" in told
    assert "  data " in told
    assert ": ring" in told.split("made from")[1]
    seal = json.loads((folder / "manifest.json").read_text())
    assert seal["facts"]["kind"] == "inverted"
    config = DataConfig(source="ring", samples=33, seed=5, labels=True)
    assert seal["inputs"]["data"] == dataset.load(config).digest
    card = (folder / "README.md").read_text()
    assert "followed backward" in card
    assert seal["inputs"]["data"] in card
    assert "`.i.npy`" in card
    batch = PairData(folder).batch(range(30))
    for who, found in stock.read(folder, tmp_path).items():
        assert set(found) == {"x0.npy", "x1.npy", "y.npy", "i.npy"}, who
        assert np.array_equal(found["i.npy"], np.arange(30)), who
        assert np.array_equal(found["x0.npy"], batch["x0"].numpy()), who


def test_a_wrong_number_is_found_and_mended(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    layout = PairData(folder).layout
    with open(folder / "pairs-000001.tar", "r+b") as file:
        file.seek(layout.offsets(5)["i"])
        file.write(np.int64([16]).tobytes())
    rehash(folder)
    status, _, err = verify(capsys, folder, "--full")
    assert status == 2
    assert "000001-000004.i.npy holds other numbers than those of its pairs" in err
    assert commands(err)
    mend(err)
    assert verify_pairs.main([str(folder), "--full"]) == 0
    assert contents(folder) == contents(whole / "pairs")


def test_reflow_mixes_it_with_generated_pairs(whole, tmp_path):
    copy(whole, tmp_path)
    generate(*pairset.words(tmp_path, folder="generated"))
    entries = [
        {"path": f"{tmp_path}/generated", "weight": 0.9},
        {"path": f"{tmp_path}/pairs", "weight": 0.1},
    ]
    words = [f"pairs={json.dumps(entries)}", f"start={tmp_path}/flow", f"run_dir={tmp_path}/r"]
    fit = ["fit.steps=2", "fit.batch_size=20", "device=cpu"]
    execute(reflow.STAGE, load(reflow.ReflowConfig, [*words, *fit])[0], False)
    seal = json.loads((tmp_path / "r/manifest.json").read_text())
    assert seal["facts"]["round"] == 1
    assert {"pairs.0", "pairs.1"} <= seal["inputs"].keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dtype=float16"], r"dtype='float16': the noise of inverted data cannot be drawn again"),
        (["shards=4"], r"40 pairs; the data has 33 items: use at most shards=3, or .*shards=11 sh"),
        (["data.labels=false"], r"no classes \(data.labels=False\); the teacher has 8"),
        (
            ["data={source: digits, labels: true, samples: 50000, seed: 0}"],
            r"samples are \[1, 8, 8\]; the teacher's are \[2",
        ),
    ],
)
def test_what_cannot_be_inverted_is_refused_before_any_work(whole, tmp_path, words, said):
    argv = pairset.words(tmp_path, *RING, *FINE, f"teacher={whole}/flow", *words)
    with pytest.raises(UserError, match=said):
        generate(*argv)
    assert not (tmp_path / "pairs").exists()


def test_other_data_is_another_set(whole, tmp_path):
    copy(whole, tmp_path)
    with pytest.raises(UserError, match=r"\(input\) data: "):
        generate(*pairset.words(tmp_path, *RING, *FINE, "data.seed=6"))
    assert shards.committed(tmp_path / "pairs") == {0, 1, 2}
