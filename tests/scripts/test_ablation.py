"""The ablation table: every recipe through the stages, by one command that may be repeated."""

import json
import re
import runpy
import statistics
import subprocess
import sys
import textwrap
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from flowmatch.config import UserError
from flowmatch.runs import manifest
from scripts.ablation import MODULES, Ablation, line, main, panel_table, spread

ROOT = Path(__file__).parents[2]
RECIPES = """
inverted:
  - data.source=ring
  - data.samples=40
  - shards=1
  - shard_size=40
  - block=40
  - compute_batch=40
  - solver.steps=2
recipes:
  - name: plain
    says: uniform times
    parts:
      - words: [times.name=uniform, times.zero=0.0, loss.name=mse, loss.c=0.5]
  - name: distil
    says: then t = 0
    parts:
      - share: 0.5
      - share: 0.5
        words: [times.zero=1.0]
  - name: inverted
    says: with data
    parts:
      - words: ["pairs=[{path: {root}/../pairs}, {path: {root}/inverted, weight: 0.1}]"]
"""
TINY = [
    *("flow.data.samples=200", "flow.net.hidden=8", "flow.fit.steps=4", "flow.fit.batch_size=16"),
    *("pairs.shards=1", "pairs.shard_size=40", "pairs.compute_batch=40", "pairs.block=40"),
    *(
        "pairs.solver.steps=2",
        "pairs.solver.name=midpoint",
        "reflow.fit.steps=8",
        "reflow.fit.batch_size=16",
    ),
    *("reflow.fit.log_every=2", "reflow.fit.warmup=2", "evaluate.samples=60"),
    *("evaluate.data.samples=60", "evaluate.compute_batch=60", "evaluate.converged_steps=2"),
    *("evaluate.steps=[1,2]", "flow.fit.log_every=2"),
]


def write(recipes):
    """Write the ring's experiment with other recipes into the working directory."""
    shipped = (ROOT / "configs/ring.yaml").read_text().split("\nablation:\n")[0]
    Path("ring.yaml").write_text(f"{shipped}\nablation:\n{textwrap.indent(recipes, '  ')}")


@pytest.fixture
def ring(tmp_path, monkeypatch):
    """Configs of the ring with two recipes, in a folder of their own; stages run in this process."""

    monkeypatch.chdir(tmp_path)
    write(RECIPES)
    launched = []

    def call(command, stdout, stderr):
        launched.append(command[2])
        monkeypatch.setattr(sys, "argv", [command[2], *command[3:], "device=cpu"])
        runpy.run_module(command[2], run_name="__main__")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("scripts.ablation.subprocess.run", call)
    return launched


def test_each_recipe_is_trained_and_scored_and_the_table_is_the_mean_of_its_seeds(ring, tmp_path):
    ablation = Ablation("ring.yaml", tmp_path / "runs", 2, TINY)
    ablation.prepare()
    for recipe in ablation.config.recipes:
        for seed in (0, 1):
            ablation.run(recipe, seed)
    assert ring.count("pipelines.reflow") == 2 + 2 * 2 + 2
    root = tmp_path / "runs/ring/ablation"
    seals = {
        p.parent.relative_to(root): manifest.read(p.parent, "x")
        for p in root.rglob("manifest.json")
    }
    steps = {str(p): s["config"]["fit"]["steps"] for p, s in seals.items() if "reflow" in str(p)}
    assert steps["plain/seed_0/reflow_1"] == 8  # equal updates for every recipe
    assert steps["distil/seed_1/reflow_1"] == steps["distil/seed_1/reflow_2"] == 4
    pairs = {s["inputs"]["pairs.0"] for p, s in seals.items() if "reflow" in str(p)}
    assert len(pairs) == 1
    mixed = manifest.read(root / "inverted/seed_0/reflow_1", "x")["inputs"]
    assert mixed["pairs.0"] in pairs
    assert mixed["pairs.1"] == manifest.digest(root / "inverted")
    assert manifest.read(root / "inverted", "x")["config"]["solver"]["name"] == "midpoint"
    assert manifest.read(root / "distil/seed_1/reflow_2", "x")["facts"]["for_steps"] == [1]
    assert manifest.read(root / "plain/seed_1/reflow_1", "x")["config"]["seed"] == 1

    table = (root / "table.md").read_text()
    rows = {
        line.split("|")[1].strip(): line.split("|")[1:-1]
        for line in table.splitlines()
        if "|" in line
    }
    assert list(rows) == ["recipe", "---", "teacher", "uniform times", "then t = 0", "with data"]
    found = [
        json.loads((root / f"plain/seed_{seed}/evaluate/metrics.json").read_text())["student"]
        for seed in (0, 1)
    ]
    ones = [model["rows"][0]["distance"] for model in found]
    assert rows["uniform times"][2].strip() == spread(ones)
    assert spread(ones) == f"{statistics.mean(ones):.3g} +- {statistics.stdev(ones):.2g}"
    rmse = [model["rows"][0]["rmse"] for model in found]
    assert rows["uniform times"][-3].strip() == spread(rmse)
    assert rows["uniform times"][-2].strip() == ""  # points have no recall
    assert rows["uniform times"][4].strip() == ""  # four steps were not asked for
    assert "same noise. 8 updates a recipe" in table
    later = Ablation(
        "ring.yaml", tmp_path / "runs", 2, []
    ).table()  # the runs say it, not reflow.yaml
    assert later == table
    before = (root / "table.md").read_bytes()
    ablation.run(ablation.config.recipes[0], 0)  # repeated: all is sealed
    assert (root / "table.md").read_bytes() == before


def test_a_row_shows_distance_rmse_and_recall_at_one_step():
    one = [{"steps": 1, "distance": 2.0, "rmse": 0.1, "recall": 0.9}]
    two = [{"steps": 1, "distance": 4.0, "rmse": 0.3, "recall": 0.9}]
    cells = [cell.strip() for cell in line("x", [one, two], "7").split("|")[1:-1]]
    assert cells == ["x", "2", "3 +- 1.4", "", "", "", "", "0.2 +- 0.14", "0.9 +- 0", "7"]


def test_a_panel_has_distance_precision_and_recall_of_each_space():
    def row(steps, *values):
        names = ("frechet", "precision", "recall")
        return {"steps": steps} | {
            name: {"value": v} for name, v in zip(names, values, strict=True)
        }

    def seed(student):
        real = row(0, 0.5, 0.97, 0.96) | {"samples": 60}
        space = {
            "teacher": [row(None, 1.5, 0.9, 0.8)],
            "student": [row(1, *student)],
            "floor": real,
        }
        return {"panel": {"spaces": {"encoder": space}}}

    text = panel_table("encoder", [("ours", [seed((2.0, 0.8, 0.7)), seed((4.0, 0.9, 0.7))])])
    assert "## encoder" in text
    assert "| teacher | 1 |  |  |  |  | 1.5 (0.900, 0.800) |" in text
    assert "| ours | 2 | 3 +- 1.4 (0.850, 0.700) |  |  |  |  |" in text
    assert "real against real, 60 each: 0.5 (0.970, 0.960)." in text


def test_mistakes_are_named_before_any_work(ring, tmp_path):
    with pytest.raises(UserError, match="flw.fit.steps=3 is not STAGE.key=value"):
        Ablation("ring.yaml", tmp_path, 1, ["flw.fit.steps=3"])
    for word in (
        *("flow.run_dir=x", "pairs.teacher=x", "reflow.seed=7", "reflow.pairs=[{path: mine}]"),
        *("reflow.start=x", "reflow.run_dir=x", "evaluate.student=x", "evaluate.teacher=x"),
    ):
        with pytest.raises(UserError, match=f"{re.escape(word)} would be lost: .* is set for each"):
            Ablation("ring.yaml", tmp_path, 1, [word])
    write(RECIPES.replace("share: 0.5", "share: 0.4"))
    with pytest.raises(UserError, match="distil: its parts share 0.8 of the updates"):
        Ablation("ring.yaml", tmp_path, 1, [])
    write(RECIPES.replace("times.zero=1.0", "times.zer=1.0"))
    with pytest.raises(UserError, match="times.zer: unknown key"):
        Ablation("ring.yaml", tmp_path, 1, [])
    assert not ring
    assert set(MODULES) == {"flow", "pairs", "reflow", "finish", "classifier", "evaluate"}


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "ring"])
def test_the_recipes_of_an_experiment_are_valid(name):
    names = [recipe.name for recipe in Ablation(name, Path("runs"), 1, []).config.recipes]
    assert len(set(names)) == len(names) >= 3


def test_a_stage_that_fails_ends_the_run_with_its_log(tmp_path, monkeypatch):

    monkeypatch.chdir(ROOT)
    ablation = Ablation("digits", tmp_path, 1, ["flow.fit.steps=0"])
    with pytest.raises(UserError, match="exits 2; see .*flow.log"):
        ablation.prepare()
    assert "fit.steps=0" in (tmp_path / "digits/flow.log").read_text()


class Inline(ThreadPoolExecutor):
    """Runs in the caller's thread, as stages in this process must."""

    def submit(self, work, *words):
        done = Future()
        try:
            done.set_result(work(*words))
        except UserError as error:
            done.set_exception(error)
        return done


@pytest.mark.slow
def test_a_recipe_that_fails_leaves_the_others_their_rows(ring, tmp_path, monkeypatch, capsys):
    honest, fails = subprocess.run, ["plain/seed_0/evaluate"]

    def call(command, stdout, stderr):
        if any(command[-1].endswith(name) for name in fails):
            stdout.write("the cause\n")
            return type("Done", (), {"returncode": 2})
        return honest(command, stdout, stderr)

    monkeypatch.setattr("scripts.ablation.subprocess.run", call)
    monkeypatch.setattr("scripts.ablation.ThreadPoolExecutor", Inline)
    argv = ["ablation", "ring.yaml", "--seeds", "1", "--runs", str(tmp_path / "runs"), *TINY]

    def repeat():
        monkeypatch.setattr(sys, "argv", argv)
        status = main()
        return status, *capsys.readouterr()

    status, out, err = repeat()
    assert status == 2
    assert "plain/seed_0/evaluate: evaluate exits 2" in err
    assert "| then t = 0 | 1 |" in out
    assert "uniform times" not in out
    argv[1:2] = ["ring.yaml", "--table"]
    assert repeat()[0] == 0
    argv[argv.index("--runs") + 1] = str(tmp_path / "nothing")
    status, out, err = repeat()
    assert (status, out) == (2, "")
    assert "nothing/ring/ablation holds no evaluation yet" in err
    for word in ("--jobs=0", "--seeds=0"):
        argv.append(word)
        with pytest.raises(SystemExit, match="2"):
            repeat()
        assert "0: expected 1 or more" in capsys.readouterr().err
        argv.pop()
    argv[1:3] = ["ring.yaml"]
    argv[argv.index("--runs") + 1] = str(tmp_path / "runs")

    fails.clear()
    status, out, _ = repeat()
    assert status == 0
    assert "| uniform times | 1 |" in out
    log = tmp_path / "runs/ring/ablation/plain/seed_0/evaluate.log"
    assert log.read_text().startswith("the cause\n")  # still there
