"""Inspection of a set of pairs: the figures are right, the chain is followed, the pictures are drawn."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from flowmatch.evaluation import figures
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from flowmatch.runs import manifest
from pipelines import inspect_pairs, verify_pairs
from tests import pairset, store
from tests.pairset import copy, generate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    pairset.make_teacher(root / "flow")
    (root / "flow" / "config.yaml").write_text("data: {source: idx, path: /data/fashion}\n")
    generate(*pairset.words(root))
    return root


def inspect(capsys, folder, *flags):
    capsys.readouterr()
    status = inspect_pairs.main([str(folder), *flags])
    return status, *capsys.readouterr()


def test_the_figures_are_those_of_the_pairs(whole, tmp_path, capsys):
    before = sorted(path.name for path in (whole / "pairs").iterdir())
    status, out, _ = inspect(capsys, whole / "pairs", "--out", str(tmp_path / "look"))
    assert status == 0
    assert sorted(path.name for path in (whole / "pairs").iterdir()) == before
    batch = PairData(whole / "pairs").batch(range(30))
    x0, x1, label = (batch[name].double().numpy() for name in ("x0", "x1", "label"))
    cost = ((x1 - x0) ** 2).sum(1)
    found = json.loads((tmp_path / "look" / "summary.json").read_text())
    assert found["samples"] == 30
    assert found["cost"]["mean"] == pytest.approx(cost.mean())
    assert found["cost"]["quantiles"]["0.95"] == pytest.approx(np.quantile(cost, 0.95))
    assert found["x1"]["deviation"] == pytest.approx(x1.std())
    assert found["x0"]["min"] == x0.min()
    assert found["labels"] == {str(k): (label == k).sum() for k in range(3)}
    assert found["environments"][0][1] == 3
    assert f"mean {cost.mean():.4g}; paired at random" in out
    assert "3 shards made with" in out
    for name in ("pairs.png", "cost.png"):
        assert (tmp_path / "look" / name).read_bytes()[:4] == b"\x89PNG"


def test_at_random_is_what_a_random_pairing_costs(tmp_path, capsys):
    """x0 ~ N(0, I) and x1 = tanh(x0) + 0.5 on 48 values: closed form of the independent coupling."""
    layout = Layout((3, 4, 4), "float32", False, 4000, 500)
    x0, x1, _ = store.finish(tmp_path / "pairs", layout, 1)
    status, _, _ = inspect(capsys, tmp_path / "pairs", "--samples", "4000")
    assert status == 0
    found = json.loads((tmp_path / "pairs_inspect" / "summary.json").read_text())["cost"]
    gap = (x1.mean(0) - x0.mean(0)).astype(float)
    independent = 48 * (float(x0.var()) + float(x1.var())) + (gap**2).sum()
    assert found["mean_at_random"] == pytest.approx(independent, rel=0.01)
    assert found["mean"] == pytest.approx(((x1 - x0).astype(float) ** 2).sum((1, 2, 3)).mean())
    assert found["mean"] < 0.5 * independent


def test_the_chain_is_followed_to_the_data(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    look = ("--out", str(tmp_path / "look"))
    digest = manifest.read(folder, "DIR")["inputs"]["teacher"]
    _, out, _ = inspect(capsys, folder, *look)
    assert f"  teacher {digest[:12]} {tmp_path}/flow: train_flow, round 0\n" in out
    assert "    data dddddddddddd: idx /data/fashion\n" in out
    (folder / "config.yaml").write_text("teacher: gone/flow\n")  # a sibling of that name is there
    assert f"{tmp_path}/flow: train_flow" in inspect(capsys, folder, *look)[1]
    shutil.move(tmp_path / "flow", tmp_path / "moved")
    _, out, _ = inspect(capsys, folder, *look)
    assert f"  teacher {digest[:12]} gone/flow: not here\n" in out
    assert "data" not in out.split("made from")[1].split("transport")[0]
    out = inspect(capsys, folder, *look, "--teacher", str(tmp_path / "moved"))[1]
    assert f"{tmp_path}/moved: train_flow, round 0\n    data" in out
    (tmp_path / "stock").mkdir()
    for file, what in (("config.json", "model"), ("model_index.json", "pipeline")):
        (tmp_path / "stock" / file).write_text("{}")
        out = inspect(capsys, folder, *look, "--teacher", str(tmp_path / "stock"))[1]
        assert f"{tmp_path}/stock: a diffusers {what}\n" in out
    pairset.make_teacher(tmp_path / "moved", classes=2)
    out = inspect(capsys, folder, *look, "--teacher", str(tmp_path / "moved"))[1]
    assert "train_flow, round 0; ANOTHER by now" in out
    assert "data" not in out.split("made from")[1].split("transport")[0]
    (tmp_path / "moved" / "manifest.json").write_text("{")
    out = inspect(capsys, folder, *look, "--teacher", str(tmp_path / "moved"))[1]
    assert "manifest.json is damaged" in out


def test_a_chain_of_rounds_is_followed_through_its_pairs(whole, tmp_path, capsys):
    """Pairs of a student of pairs of a teacher: reflow's inputs are start and pairs.0."""
    first = copy(whole, tmp_path)
    teacher = manifest.read(first, "DIR")["inputs"]["teacher"]
    seal = json.loads((tmp_path / "flow" / "manifest.json").read_text())
    shutil.copytree(tmp_path / "flow", tmp_path / "reflow")
    inputs = {"start": teacher, "pairs.0": manifest.digest(first)}
    text = f"start: {tmp_path}/flow\npairs: [{{path: {first}, weight: 1.0}}]\n"
    (tmp_path / "reflow" / "config.yaml").write_text(text)
    facts = seal["facts"] | {"round": 1}
    outputs = seal["outputs"]
    manifest.seal(
        tmp_path / "reflow", stage="reflow", config={}, inputs=inputs, outputs=outputs, **facts
    )
    more = [word for word in pairset.words(tmp_path, folder="pairs_2") if "teacher=" not in word]
    generate(*more, f"teacher={tmp_path}/reflow")
    _, out, _ = inspect(capsys, tmp_path / "pairs_2")
    told = [line.split(":")[0].split()[0] for line in out.split("made from\n")[1].splitlines()]
    assert told[:7] == ["teacher", "pairs.0", "teacher", "data", "start", "data", "transport"]
    assert "reflow, round 1" in out


def test_a_mixture_of_environments_is_warned_of(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    path = folder / ".meta/pairs-000001.json"
    side = json.loads(path.read_text())
    side["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(side))
    (folder / ".meta/pairs-000002.json").unlink()
    _, out, _ = inspect(capsys, folder)
    assert "1 shards made with" in out
    assert "torch 1.0" in out
    assert "WARNING: a mixture" in out
    assert "WARNING: 1 shards without sidecar" in out


@pytest.mark.parametrize(("module", "name"), [(inspect_pairs, "inspect"), (verify_pairs, "verify")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_it_in_a_line(whole, tmp_path, capsys, monkeypatch, module, name, number):
    """As a module, too, without the command around it."""
    monkeypatch.setattr(module.storage, "at", lambda place: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as left:
        module.main([str(whole / "pairs")])
    assert left.value.code == 75
    told = f"{name}: stopped by {number.name}; repeat the command to go on"
    assert told in capsys.readouterr().out


def test_what_is_no_sealed_set_is_refused(whole, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert inspect_pairs.main([str(whole), "--out", str(tmp_path / "file")]) == 2
    assert f"--out={tmp_path}/file is a file; expected a folder" in capsys.readouterr().err
    folder = copy(whole, tmp_path)
    before = sorted(path.name for path in folder.rglob("*"))
    for same in (folder, tmp_path / "x" / ".." / folder.name):
        status, _, err = inspect(capsys, folder, "--out", str(same))
        assert (status, before) == (2, sorted(path.name for path in folder.rglob("*")))
        assert f"--out={same} is the set itself; name another folder" in err
    for argv in (["--pairs", "0"], ["--samples", "x"], ["--nonsense"]):
        with pytest.raises(SystemExit) as left:
            inspect_pairs.main([str(folder), *argv])
        assert left.value.code == 2
    (folder / "manifest.json").unlink()
    status, _, err = inspect(capsys, folder)
    assert status == 2
    assert "has not finished" in err
    assert not (tmp_path / "pairs_inspect").exists()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (16, 4, 4), (1,), (48,)])
@pytest.mark.parametrize("n", [1, 9])
def test_pairs_of_every_shape_are_drawn(tmp_path, shape, n):
    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, n, *shape), dtype=np.float32)
    figures.pairs(tmp_path / "a.png", x0, x1, np.arange(n))
    figures.pairs(tmp_path / "b.png", x0, x0 * 0)
    figures.costs(tmp_path / "c.png", np.ones(n), np.ones(n))
    for name in "abc":
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
