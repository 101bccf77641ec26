"""A stage's folder: what is resumed, what is refused, what is held; exit codes of real processes."""

import errno
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from flowmatch.config import UserError, option
from flowmatch.runs import manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import Plan, RunFolder, begin, finished

ROOT = Path(__file__).parents[2]


class Config(StageConfig):
    lr: float = option(0.1, "rate")
    every: int = option(5, "interval", run=True)


def config(tmp_path, **values):
    return Config(run_dir=str(tmp_path / "stage"), **values)


def work(c, inputs=None):
    """What a stage does."""
    inputs = inputs or {"data": "abc"}
    if not begin("toy", Plan(c, inputs, ["a plan"]), False):
        return False
    with RunFolder("toy", c, inputs) as folder:
        (folder.folder / "w.bin").write_bytes(b"w")
        folder.seal(["w.bin"], round=0)
    return True


def test_a_sealed_folder_is_left_alone_and_says_so(tmp_path, capsys):
    assert work(config(tmp_path))
    assert not work(config(tmp_path, every=7))  # a run field: nothing to refuse
    assert "is sealed: nothing to do" in capsys.readouterr().out


def test_a_stage_without_checkpoints_says_that_it_begins_again(tmp_path, capsys):
    began = "toy: .*stage was not finished: begins again from its start"
    with pytest.raises(RuntimeError), RunFolder("toy", config(tmp_path), {"data": "abc"}):
        raise RuntimeError("stopped")
    assert not re.search(began, capsys.readouterr().out)
    assert work(config(tmp_path))
    assert re.search(began, capsys.readouterr().out)
    with RunFolder("toy", config(tmp_path), {"data": "abc"}):  # sealed: a lost picture is made
        assert not re.search(began, capsys.readouterr().out)


def test_a_folder_sealed_before_a_field_was_there_is_left_alone(tmp_path, capsys):
    work(config(tmp_path))
    path = tmp_path / "stage" / "manifest.json"
    sealed = json.loads(path.read_text())
    del sealed["config"]["lr"]
    path.write_text(json.dumps(sealed))
    assert not work(config(tmp_path))
    assert "is sealed: nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="lr: 0.1 -> 0.2"):
        work(config(tmp_path, lr=0.2))


@pytest.mark.parametrize("seal", [True, False])
def test_another_config_is_refused_with_its_keys(tmp_path, seal):
    work(config(tmp_path))
    if not seal:
        (tmp_path / "stage" / "manifest.json").unlink()
    with pytest.raises(UserError) as error:
        work(config(tmp_path, lr=0.2, seed=3))
    assert [line.strip() for line in error.value.faults[1:]] == ["lr: 0.1 -> 0.2", "seed: 0 -> 3"]
    told = r"from other inputs, .* delete this folder;(.|\n)*\(input\) data: 'abc' -> 'xyz'"
    with pytest.raises(UserError, match=told):
        work(config(tmp_path), {"data": "xyz"})


def test_a_folder_that_holds_nothing_yet_is_taken_over_in_a_line(tmp_path, capsys):
    """As after a first image that could not be read, and was mended: the data are others."""
    for k, dry_run in enumerate((True, False)):
        with RunFolder("toy", config(tmp_path), {"data": "abc"}) as folder:  # ends without a step
            folder.log(10, loss=1.0)
            (folder.folder / "checkpoints/step_00000010.tmp").mkdir(parents=True, exist_ok=True)
        other = Plan(config(tmp_path, lr=0.2 + k), {"data": "xyz"}, ["a plan"])
        assert begin("toy", other, dry_run) is not dry_run
        told = capsys.readouterr().out
        assert "was begun with other settings, and holds nothing yet: lr: 0.1 -> " in told
        assert "(input) data: 'abc' -> 'xyz'" in told
    with RunFolder("toy", config(tmp_path), {"data": "abc"}) as folder:
        folder.checkpoints.save(10, {"net": {"w": torch.zeros(1)}}, keep=2)
    with pytest.raises(UserError, match="was made with other settings"):
        begin("toy", other, False)


@pytest.mark.parametrize(
    "name", ["pairs-000000.tar", "unet/config.json", ".meta/0.lease", "x.json"]
)
def test_a_folder_that_holds_something_is_not_taken_over(tmp_path, name):
    with RunFolder("toy", config(tmp_path), {}) as folder:
        (folder.folder / name).parent.mkdir(exist_ok=True)
        (folder.folder / name).touch()
    with pytest.raises(UserError, match="was made with other settings"):
        begin("toy", Plan(config(tmp_path, lr=0.2), {}, []), True)


def test_a_changed_output_is_found(tmp_path):
    work(config(tmp_path))
    (tmp_path / "stage" / "w.bin").write_bytes(b"v")
    with pytest.raises(UserError, match="w.bin is not the file that was sealed"):
        work(config(tmp_path))


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert not begin("toy", Plan(config(tmp_path), {}, ["a plan"]), True)
    assert not (tmp_path / "stage").exists()
    assert "toy: a plan" in capsys.readouterr().out


def test_a_run_dir_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    places = {
        tmp_path / "file": "is a file; expected a folder",
        tmp_path
        / "file"
        / "a"
        / "b": f"lies below the file {tmp_path / 'file'}; expected a folder",
    }
    for place, fault in places.items():
        for dry_run in (True, False):
            with pytest.raises(UserError) as error:
                begin("toy", Plan(Config(run_dir=str(place)), {}, []), dry_run)
            assert error.value.faults == [f"run_dir={place} {fault}, or a path for a new one"]
    with pytest.raises(UserError, match="the folder /proc/none/x cannot be made: No such file"):
        work(Config(run_dir="/proc/none/x"))


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with RunFolder("toy", config(tmp_path), {}):
        with pytest.raises(UserError, match=f"held by process {os.getpid()} on "):
            RunFolder("toy", config(tmp_path), {}).__enter__()
    with RunFolder("toy", config(tmp_path), {}):  # given back
        pass


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    with RunFolder("toy", config(tmp_path), {}) as folder:
        for step in (10, 20, 30):
            folder.log(step, loss=1.0 / step)
        with open(folder.folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 40, "lo')  # a kill in the middle of a line
        folder.cut_metrics(20)
        lines = (folder.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_a_file_system_without_locks_is_told_from_a_folder_that_is_held(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    config = StageConfig(run_dir=str(tmp_path))
    with pytest.raises(UserError, match="its file system takes no locks .No locks available"):
        RunFolder("toy", config, {}).__enter__()


@pytest.mark.slow
def test_a_checkpoint_that_finds_no_room_is_named_and_made_again(tmp_path):
    """A limit of 10 KB on files; safetensors' error is its own, no OSError."""
    words = [sys.executable, "-m", "pipelines.train_flow", "configs/ring.yaml", "device=cpu"]
    words += [f"run_dir={tmp_path}", "fit.steps=4", "fit.save_every=2"]
    limited = ["sh", "-c", 'ulimit -f 20; exec "$@"', "sh"]
    done = subprocess.run([*limited, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "train_flow: the disk refuses: " in done.stderr
    assert "(os error 27); free space there" in done.stderr
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_number_of_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(process, "world_size", lambda: 3)
    with pytest.raises(UserError, match="the launcher started 3 processes, Accelerate sees 1"):
        process.start_accelerator("cpu")


def test_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no GPU here"):
        process.pick_device("cuda")
    assert process.pick_device("auto") == "cpu"


def test_seals_do_not_depend_on_the_folder(tmp_path):
    work(Config(run_dir=str(tmp_path / "a")))
    work(Config(run_dir=str(tmp_path / "b"), every=9))
    assert manifest.digest(tmp_path / "a") == manifest.digest(tmp_path / "b")


class Reader(StageConfig):
    teacher: str = option("", "input", run=True)
    every: int = option(5, "interval", run=True)


def test_a_finished_folder_is_known_without_opening_its_inputs(tmp_path):
    """As long as config, inputs and files are those of then; otherwise the plan says what differs."""
    (tmp_path / "flow").mkdir()
    seal = partial(manifest.seal, tmp_path / "flow", config={}, inputs={}, outputs={})
    seal(stage="train_flow", net="n", round=0)
    values = {"run_dir": str(tmp_path / "stage"), "teacher": str(tmp_path / "flow")}
    reader = Reader(**values)
    assert not finished("toy", reader)
    with RunFolder("toy", reader, {"teacher": "n", "data": "of any digest"}) as folder:
        (folder.folder / "w.bin").write_bytes(b"w")
        assert not finished("toy", reader)
        folder.seal(["w.bin"])
    assert finished("toy", reader)
    assert finished("toy", Reader(**values, device="cpu"))
    assert not finished("other", reader)
    for changed in ({"seed": 1}, {"every": 6}, {"teacher": str(tmp_path)}):
        assert not finished("toy", Reader(**(values | changed)))
    assert not finished("toy", reader, lambda config, sealed: False)
    (tmp_path / "stage" / "w.bin").write_bytes(b"v")
    assert not finished("toy", reader)
    (tmp_path / "stage" / "w.bin").write_bytes(b"w")
    seal(stage="train_flow", net="m", round=0)
    assert not finished("toy", reader)  # another teacher lies there by now
    seal(stage="evaluate")
    digest = manifest.digest(tmp_path / "flow")  # an input of no facts is known by its manifest
    with RunFolder("toy", reader, {"teacher": digest}) as folder:
        folder.seal(["w.bin"])
    assert finished("toy", reader)
