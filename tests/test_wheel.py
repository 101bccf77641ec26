"""The wheel: what it holds, and that it works in an empty environment outside the checkout."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a clean export of the tree, where no old build/ lies about."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = subprocess.run(
        ["git", "stash", "create"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    archive = ["git", "archive", "--format=tar", tree or "HEAD"]
    packed = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder / "tree", filter="data")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(folder), str(folder / "tree")], check=True)
    return next(folder.glob("*.whl"))


def tracked(*patterns):
    command = ["git", "ls-files", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_wheel_holds_the_package_the_stages_and_the_experiments(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = tracked("flowmatch/*.py", "flowmatch/py.typed")
    wanted |= {f"flowmatch/{name}" for name in tracked("pipelines/*.py", "configs")}
    assert names == wanted


@pytest.mark.slow
def test_the_wheel_makes_an_experiment_in_an_empty_folder(wheel, tmp_path):
    """In an environment of its own, over the libraries of this one; two processes by accelerate."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    libraries = Path(next(p for p in sys.path if p.endswith("site-packages")))
    site = next(venv.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    subprocess.run([*install, f"--prefix={venv}", "--ignore-installed", str(wheel)], check=True)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    python, empty = venv / "bin/python", tmp_path / "empty"
    empty.mkdir()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*words):
        command = [str(python), "-m", "flowmatch", *words]
        done = subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import flowmatch; print(flowmatch.__file__)"
    command = [str(python), "-c", where]
    found = subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True)
    assert found.stdout.startswith(str(venv)), found.stderr
    assert (venv / "bin/flowmatch").is_file()
    assert "mine.yaml" in call("new", "mine", "--from", "digits")
    plan = call("run", "mine.yaml", "--dry-run", "device=cpu")
    assert "flow: 1198 samples of [1, 8, 8], no labels" in plan
    small = [
        *("flow.fit.steps=4", "flow.fit.warmup=2", "reflow.fit.steps=4", "reflow.fit.warmup=2"),
        *("pairs.shards=1", "pairs.shard_size=128", "pairs.solver.steps=2", "features.steps=20"),
        *("evaluate.samples=64", "evaluate.steps=[1]", "evaluate.converged_steps=2"),
        *("evaluate.training_samples=64", "device=cpu"),
    ]
    done = call("run", "mine.yaml", *small)
    assert "seconds: flow " in done
    assert (empty / "runs/mine/export/model_index.json").is_file()
    assert "wrote 2 images" in call("sample", "runs/mine/export", "--count", "2")
    assert len(list((empty / "samples").glob("*.png"))) == 2
