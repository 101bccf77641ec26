"""Folders that 0.1.0 sealed (commit e6d316a): found as sealed, and read by later stages.

The pictures and the report of its evaluation are empty here.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from flowmatch import cli
from flowmatch.evaluation import tables
from flowmatch.models import teachers
from flowmatch.pairs.dataset import PairData
from pipelines import reflow
from tests.stages import run

SEALED = Path(__file__).with_name("first_version")
STAGES = {
    "flow": "train_flow",
    "pairs": "generate_pairs",
    "reflow": "reflow",
    "evaluate": "evaluate",
    "export": "export",
}


@pytest.fixture
def root(tmp_path):
    shutil.copytree(SEALED, tmp_path, dirs_exist_ok=True)
    for config in tmp_path.glob("*/config.yaml"):
        config.write_text(config.read_text().replace("ROOT", str(tmp_path)))
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_they_are_found_as_sealed_and_left_alone(root, capsys):
    before = contents(root)
    for folder, stage in STAGES.items():
        cli.main([stage, str(root / folder / "config.yaml")])
        assert f"{stage}: {root / folder} is sealed: nothing to do" in capsys.readouterr().out
    assert contents(root) == before


def test_later_stages_read_them(root):
    teacher = teachers.load(root / "flow", "teacher")
    assert (teacher.round, teacher.shape) == (0, (2,))
    assert teachers.load(root / "export", "teacher").round == 1
    assert len(PairData(root / "pairs").batch(np.arange(80))["x0"]) == 80
    table = tables.read(root / "evaluate", "evaluation")[1]
    assert table == (root / "evaluate/table.md").read_text()
    words = (f"start={root}/reflow", f"pairs=[{root}/pairs]", "fit.steps=1", "fit.batch_size=8")
    run(reflow, f"run_dir={root}/again", *words)
    assert (root / "again/manifest.json").exists()
