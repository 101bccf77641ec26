"""Sealed evaluations and exports: what is lost is made again, what was changed goes nowhere."""

import json
import os
import stat

import pytest

from flowmatch.config import UserError
from flowmatch.evaluation.sampling import Sampler
from flowmatch.export import model_card
from flowmatch.runs.files import Scratch
from pipelines import evaluate, export
from tests.pipelines.test_pipelines import trained
from tests.runs.test_checkpoints import tiny
from tests.stages import UNET, run

DATA = ("data.source=ring", "data.samples=60")
SMALL = ("samples=40", "steps=[1,2]", "converged_steps=2", "compute_batch=40")
UNHASHED = ("table.md", "curve.png", "grid.png", "report.html")


def score(root):
    inputs = (f"teacher={root}/flow", f"student={root}/reflow")
    run(evaluate, f"run_dir={root}/evaluate", *inputs, *DATA, *SMALL)


def ship(root, *words):
    inputs = (f"student={root}/reflow", f"evaluation={root}/evaluate", "steps=[1,2]")
    run(export, f"run_dir={root}/export", *inputs, *words)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A teacher, its student of random weights, their evaluation, and the export."""
    root = tmp_path_factory.mktemp("sealed")
    before = os.umask(0o027)
    tiny(root / "flow")
    trained(root / "reflow", "VelocityMLP", {"hidden": 8, "layers": 1}, (2,), None)
    score(root)
    ship(root)
    os.umask(before)
    return root


def contents(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "config.yaml")
    }


def test_everything_is_whole_and_readable_by_the_umask(root):
    for name in ("evaluate", "export"):
        found = list((root / name).rglob("*"))
        assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {0o640}
        assert not [p for p in found if "tmp" in p.name or p.name == ".scratch"]


@pytest.mark.parametrize("lost", [[name] for name in UNHASHED] + [list(UNHASHED)], ids=str)
def test_a_lost_file_of_an_evaluation_is_made_again(root, capsys, monkeypatch, lost):
    before = contents(root / "evaluate")
    for name in lost:
        (root / "evaluate" / name).unlink()
    if {"table.md", "curve.png"} >= set(lost):  # they follow from metrics.json
        monkeypatch.setattr(Sampler, "rows", lambda *words: pytest.fail("sampled"))
    score(root)
    assert f"evaluate is sealed, and made again are {', '.join(lost)}" in capsys.readouterr().out
    after = contents(root / "evaluate")
    assert after.keys() == before.keys()
    assert after["manifest.json"] == before["manifest.json"]
    for name in before.keys() - {"report.html"}:  # which names the machine
        assert after[name][0] == before[name][0]
    score(root)
    assert "is sealed: nothing to do" in capsys.readouterr().out


def test_a_changed_table_is_made_again_and_never_goes_into_a_card(root, tmp_path, capsys):
    table = root / "evaluate/table.md"
    whole = table.read_text()
    table.write_text(whole.replace("| 1 | 1 |", "| 1 | 1 | best ever"))
    ship(root, f"run_dir={tmp_path}/export")
    card = (tmp_path / "export/README.md").read_text()
    assert whole in card
    assert "best ever" not in card
    capsys.readouterr()
    score(root)
    assert "made again are table.md" in capsys.readouterr().out
    assert table.read_text() == whole


def test_changed_figures_are_refused(root, tmp_path):
    path = root / "evaluate/metrics.json"
    whole = path.read_text()
    try:
        for text in (whole.replace('"rmse"', '"RMSE"'), "[]"):
            path.write_text(text)
            with pytest.raises(
                UserError, match="evaluation=.*metrics.json is not the file that was"
            ):
                ship(root, f"run_dir={tmp_path}/export")
    finally:
        path.write_text(whole)


def test_a_lost_card_is_made_again(root, capsys):
    before = contents(root / "export")
    (root / "export/README.md").unlink()
    ship(root)
    assert "export is sealed, and made again are README.md" in capsys.readouterr().out
    after = contents(root / "export")
    assert after.pop("README.md")[0] == before.pop("README.md")[0]
    assert after == before


def test_an_export_that_was_killed_leaves_nothing_in_the_next(root, tmp_path, monkeypatch):
    """Between safetensors' temporary file and its rename; and half way through what is brought out."""
    left = tmp_path / "export/.scratch/export/unet"
    left.mkdir(parents=True)
    (left / ".tmpAbCdEf").write_text("half")
    place, placed = Scratch.place, []

    def killed(self, built, target):
        placed.append(built)
        if len(placed) == 4:
            raise KeyboardInterrupt
        place(self, built, target)

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            ship(root, f"run_dir={tmp_path}/export")
    ship(root, f"run_dir={tmp_path}/export")
    mine, whole = (contents(folder / "export") for folder in (tmp_path, root))
    assert {name: file[0] for name, file in mine.items()} == {
        n: file[0] for n, file in whole.items()
    }


def test_damaged_lines_of_the_models_are_counted_in_the_report(root, capsys):
    log, config = root / "flow/metrics.jsonl", root / "flow/config.yaml"
    for path in (log, config):
        path.write_bytes(b"\0\0\0\n" + path.read_bytes() + b"\xff\n")
    (root / "evaluate/report.html").unlink()
    score(root)
    out = capsys.readouterr().out
    assert out.count("damaged lines left out") == 2
    for path in (log, config):
        assert f"evaluate: {path}: 2 damaged lines left out" in out
    page = (root / "evaluate/report.html").read_text()
    assert "\0" not in page
    assert "40 steps" in page


@pytest.mark.parametrize("classes", [None, 4])
def test_the_card_says_how_to_sample_in_bfloat16(tmp_path, classes):
    """Each of its three ways, and the one that fails, as a user would do it."""
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    trained(tmp_path / "reflow", "UNet2DModel", UNET, (3, 8, 8), classes)
    run(export, f"run_dir={tmp_path}/export", f"student={tmp_path}/reflow", "steps=[1]")
    card = (tmp_path / "export/README.md").read_text()
    assert "`dtype=torch.bfloat16`" in card
    assert "torch_dtype" not in card
    ours = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    assert model_card.REMOTE in card

    def sample(kind, output, **more):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "export", dtype=kind, **more)
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=1, output_type=output, generator=seed).images[0]

    for output in ("pil", "np"):
        with pytest.raises(TypeError, match="BFloat16"):
            sample(torch.bfloat16, output)
        half = np.asarray(sample(torch.float16, output)).astype(float)
        assert np.isfinite(half).all()
        assert np.isfinite(np.asarray(sample(torch.bfloat16, output, **ours)).astype(float)).all()
    assert sample(torch.bfloat16, "pt").dtype == torch.bfloat16
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["_class_name"] in ("DDPMPipeline", "ConsistencyModelPipeline")
