"""Checkpoints: whole, hashed, of this run alone; what is damaged is named and the one before it used."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.runs import checkpoints, parts
from flowmatch.runs.checkpoints import INDEX
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.manifest import fingerprint, sha256_file
from pipelines import train_flow
from tests.runs.test_folder import config
from tests.stages import run

NEWEST, BEFORE = "step_00000040", "step_00000020"


def test_checkpoints_appear_whole_newest_first_and_are_pruned(tmp_path):
    with RunFolder("toy", config(tmp_path), {}) as folder:
        saved = folder.checkpoints
        assert saved.restore(50) == (0, {})
        for step in (10, 20, 30):
            saved.save(step, {"net": {"w": torch.full((2,), float(step))}}, keep=2)
        folder.scratch.build("step_00000040")  # what a kill leaves
        step, tensors = saved.restore(50)
        assert step == 30
        assert tensors["net"]["w"].tolist() == [30, 30]
        names = {path.name for path in (folder.folder / "checkpoints").iterdir()}
        assert names == {"step_00000020", "step_00000030"}


@pytest.mark.parametrize("damaged", [None, 0, 1, 2])
def test_each_process_hashes_its_own_parts_and_all_learn_what_is_damaged(
    tmp_path, monkeypatch, damaged
):
    files = {}
    for k in range(3):
        piece = parts.Piece(torch.full((1,), float(k)), k, 3)
        name = parts.write(tmp_path, "net", k, {"w": piece})
        files[name] = sha256_file(tmp_path / name)
    if damaged is not None:
        flip(tmp_path / f"net.part-{damaged:05d}.safetensors")
    hashed, place, told = [set(), set()], threading.local(), Meet(2)

    def sha256(path):
        hashed[place.rank].add(path.name)
        return sha256_file(path)

    monkeypatch.setattr(checkpoints, "world_size", lambda: 2)
    monkeypatch.setattr(checkpoints, "rank", lambda: place.rank)
    monkeypatch.setattr(checkpoints, "sha256_file", sha256)
    monkeypatch.setattr("torch.distributed.all_gather_object", told.gather)

    def verify(rank):
        place.rank = rank
        try:
            checkpoints.verify_together(tmp_path, {"files": files})
        except checkpoints.Unsound as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(verify, range(2)))
    name = "net.part-{:05d}.safetensors".format
    assert hashed[0] <= {name(0), name(2)}
    assert damaged == 0 or len(hashed[0]) == 2  # it stops at the first
    assert hashed[1] == {name(1)}
    bad = None if damaged is None else f"{name(damaged)} is damaged (sha256 differs)"
    assert said == [bad, bad]


class Meet:
    """Processes that tell each other something, as threads."""

    def __init__(self, world):
        self.told, self.barrier = [], threading.Barrier(world)

    def gather(self, found, mine):
        self.told.append(mine)
        self.barrier.wait(10)
        found[:] = self.told


def tiny(folder, *words):
    """Train a tiny flow: checkpoints at steps 20 and 40, the last."""
    net = json.dumps({"name": "VelocityMLP", "hidden": 8, "layers": 1})
    data = ("data.source=ring", "data.samples=50", f"net={net}")
    fit = ("fit.steps=40", "fit.batch_size=8", "fit.save_every=20", "fit.log_every=10")
    run(train_flow, f"run_dir={folder}", *data, *fit, *words)


def weights(folder):
    return (folder / "net/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "flow"
    tiny(folder)
    return folder


@pytest.fixture
def killed(sealed, tmp_path):
    """The same run, killed after its last checkpoint."""
    folder = tmp_path / "flow"
    shutil.copytree(sealed, folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "net")
    return folder


def flip(path, place=-1):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def empty(checkpoint):
    for path in checkpoint.iterdir():
        path.unlink()


def edit(checkpoint, **values):
    """Change the index as whoever wrote it would."""
    index = json.loads((checkpoint / INDEX).read_text()) | values
    del index["fingerprint"]
    text = json.dumps(index | {"fingerprint": fingerprint(index)})
    (checkpoint / INDEX).write_text(text)


def beyond(checkpoint):
    """Put a checkpoint of a longer run there."""
    longer = checkpoint.with_name("step_00000099")
    shutil.copytree(checkpoint, longer)
    edit(longer, step=99)


DAMAGE = {  # what is done to the newest checkpoint -> what is said of it
    **{
        f"a bit of {name}": (
            lambda c, name=name: flip(c / f"{name}.safetensors"),
            f"{name}.safetensors is damaged (sha256 differs)",
        )
        for name in ("net", "diffusion_pytorch_model", "optimizer", "progress")
    },
    "a file cut": (lambda c: os.truncate(c / "net.safetensors", 200), "net.safetensors is damaged"),
    "a file of 0 bytes": (
        lambda c: os.truncate(c / "diffusion_pytorch_model.safetensors", 0),
        "diffusion_pytorch_model.safetensors is dam",
    ),
    "a file lost": (
        lambda c: (c / "diffusion_pytorch_model.safetensors").unlink(),
        "diffusion_pytorch_model.safetensors is missing",
    ),
    "emptied": (empty, "it is empty"),
    "no index": (lambda c: (c / INDEX).unlink(), f"{INDEX} is missing"),
    "a bit of the index": (lambda c: flip(c / INDEX, 40), f"{INDEX} is damaged"),
    "an index of brackets": (lambda c: (c / INDEX).write_text("[" * 10**5), f"{INDEX} is damaged"),
    "an index of a list": (lambda c: (c / INDEX).write_text("[]"), f"{INDEX} is damaged"),
    "another step": (lambda c: edit(c, step=39), "it is of step 39"),
    "beyond the end": (beyond, "step_00000099 is not used: it is beyond the last step, 40"),
    "an empty folder beyond the end": (
        lambda c: c.with_name("step_00000099").mkdir(),
        "step_00000099 is not used: it is empty",
    ),
    "of another run": (
        lambda c: edit(c, inputs={"data": "x"}),
        "other settings ((input) data: 'x'",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_set_aside(sealed, killed, capsys, name):
    damage, said = DAMAGE[name]
    damage(killed / "checkpoints" / NEWEST)
    tiny(killed)
    out = capsys.readouterr().out
    assert out.count(said) == 1
    assert "set aside as step_000000" in out
    assert f"resumes at {40 if 'beyond' in name else 20} of 40" in out
    assert weights(killed) == weights(sealed)
    assert (killed / "manifest.json").read_bytes() == (sealed / "manifest.json").read_bytes()
    aside = [path.name for path in (killed / "checkpoints").glob("*.bad")]
    assert len(aside) == 1


def test_a_run_of_damaged_checkpoints_stops_and_never_starts_again_by_itself(
    sealed, killed, capsys
):
    for name in (BEFORE, NEWEST):
        flip(killed / "checkpoints" / name / "net.safetensors")
    for _ in range(2):
        with pytest.raises(
            UserError, match="no checkpoint is sound; delete .*checkpoints"
        ) as error:
            tiny(killed)
        assert len(error.value.faults) == 3
    shutil.rmtree(killed / "checkpoints")
    (killed / "metrics.jsonl").unlink()
    tiny(killed)
    assert "has no checkpoint: starts at 0 of 40" in capsys.readouterr().out
    assert weights(killed) == weights(sealed)


def test_another_config_never_goes_on_from_a_checkpoint(sealed, killed):
    (killed / "config.yaml").unlink()
    for _ in range(2):
        with pytest.raises(UserError) as error:
            tiny(killed, "fit.lr=0.1")
        assert "made with other settings" in error.value.faults[0]
        assert error.value.faults[1:] == ["  fit.lr: 0.001 -> 0.1"]
    assert not (killed / "config.yaml").exists()
    tiny(killed)
    assert weights(killed) == weights(sealed)


def test_an_unfinished_run_of_the_first_version_is_refused_in_a_line(killed):
    for path in killed.glob(f"checkpoints/*/{INDEX}"):
        path.unlink()
    before = sorted(path.name for path in killed.rglob("*"))
    with pytest.raises(
        UserError, match="0.1.0 has not finished.*; finish it with 0.1.0, or"
    ) as error:
        tiny(killed)
    assert len(error.value.faults) == 1
    assert sorted(path.name for path in killed.rglob("*")) == before


def test_damaged_lines_are_left_out_and_counted(sealed, killed, capsys):
    log = killed / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = [b"\0\0\0\n", b'{"step": "x"}\n', b"[1]\n", b"\xff\n", b"[" * 10**5 + b"\n"]
    log.write_bytes(b"".join([*damaged, *lines, b'{"step": 40, "lo']))
    (killed / "config.yaml").write_bytes(b"\0\0\n" + (killed / "config.yaml").read_bytes())
    tiny(killed)
    out = capsys.readouterr().out
    assert out.count(f"{log}: 6 damaged lines left out") == 1
    assert out.count(f"{killed / 'config.yaml'}: 1 damaged line left out") == 1
    assert log.read_bytes() == b"".join(lines)
    assert (killed / "config.yaml").read_bytes() == (sealed / "config.yaml").read_bytes().replace(
        str(sealed).encode(), str(killed).encode()
    )


def test_what_is_written_has_the_mode_of_the_umask_and_is_durable_before_the_seal(
    tmp_path, monkeypatch
):
    """Files that a power cut would empty: all that was not synced after its last change."""
    synced, sync, write = {}, os.fsync, os.replace

    def fsync(descriptor):
        facts = os.fstat(descriptor)
        synced[facts.st_ino] = (facts.st_size, facts.st_mtime_ns)
        sync(descriptor)

    def replace(source, target):
        if str(target).endswith("manifest.json"):
            for path in (tmp_path / "flow").rglob("*"):
                facts = path.stat()
                if path.name not in ("manifest.json", ".lock") and path.is_file():
                    safe = synced.get(facts.st_ino) == (facts.st_size, facts.st_mtime_ns)
                    assert safe or path == source, path
        write(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    before = os.umask(0o027)
    try:
        tiny(tmp_path / "flow", "fit.trackers=[tensorboard]")
    finally:
        os.umask(before)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "flow").rglob("*") if p.is_file()}
    assert modes == {"0o640"}
    assert not list((tmp_path / "flow").rglob(".scratch"))


def test_what_killed_processes_left_is_swept(killed):
    left = [
        "config.yaml.tmp.elsewhere-12345678.77",
        ".scratch/net/.tmpAbCdEf",
        ".scratch/step.old/x",
    ]
    for name in left:
        (killed / name).parent.mkdir(parents=True, exist_ok=True)
        (killed / name).write_text("half")
    (killed / "notes.tmp.txt").write_text("mine")
    tiny(killed)
    assert not any((killed / name).exists() for name in left)
    assert (killed / "notes.tmp.txt").exists()
