"""Damaged and hostile inputs of every stage: one line each, exit 2, nothing written, no host told."""

import json
import os
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flowmatch import cli
from flowmatch.config import UserError
from flowmatch.models import teachers
from flowmatch.runs import command
from flowmatch.runs.experiment import STAGES
from pipelines import train_flow
from tests.models.test_diffusion import ddpm, save, unet
from tests.pipelines.test_pipelines import trained
from tests.stages import run
from tests.store import LAYOUT_OF_POINTS, finish

NET = 'net={"name": "VelocityMLP", "hidden": 8}'
FLOW = ("data.source=ring", "data.samples=50", NET, "fit.steps=2", "fit.batch_size=4", "device=cpu")


def refused(capsys, *argv):
    """Run the command; return its one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        cli.main(list(argv))
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") == 1, err
    return err


def folder_in_the_way(run_dir):
    (run_dir / "config.yaml").mkdir(parents=True)


def list_in_the_way(run_dir):
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("- a\n")


def text_in_the_way(text):
    def write(run_dir):
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(text)

    return write


PLACES = {  # what is made of the run folder first, the run folder, what is said
    "a folder as config.yaml": (folder_in_the_way, "run", "Is a directory"),
    "a list as config.yaml": (
        list_in_the_way,
        "run",
        "config.yaml is damaged, or of another stage",
    ),
    "brackets": (text_in_the_way("[" * 10**5), "run", "config.yaml is damaged"),
    "digits": (text_in_the_way("seed: " + "9" * 5000), "run", "config.yaml is damaged"),
    "nothing in it": (text_in_the_way(""), "run", "config.yaml is damaged"),
    "a file": (lambda path: path.write_text(""), "run", "run_dir=run is a file"),
    "below a file": (lambda path: path.write_text(""), "run/below", "lies below the file run"),
    "a name that is too long": (lambda path: None, "x" * 300, "File name too long"),
    "a NUL": (lambda path: None, "a\0b", r"run_dir='a\x00b': "),
    "not UTF-8": (lambda path: None, os.fsdecode(b"\xff"), r"run_dir=\udcff: not readable"),
    "a link in a circle": (lambda path: path.symlink_to(path.name), "run", "symbolic links"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_run_folder_that_cannot_be_one_is_refused_in_a_line(tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, run_dir, said = PLACES[name]
    make(tmp_path / "run")
    quoted = json.dumps(run_dir) if "\0" in run_dir else run_dir
    assert said in refused(capsys, "train_flow", *FLOW, f"run_dir={quoted}")


@pytest.mark.parametrize(
    "key",
    ["act_fn=-0.5", "hidden=-1", "hidden={a: b}", "layers=1e30", "act_fn=[1]", "frequencies=x"],
)
def test_odd_arguments_of_a_network_are_refused_in_a_line(tmp_path, capsys, key):
    unet = "net={name: UNet2DModel}"
    words = [*FLOW, f"net.{key}"]
    if key.startswith("act_fn"):
        words = ["data.source=digits", *FLOW[3:], unet, f"net.{key}"]
    assert "net" in refused(capsys, "train_flow", *words, f"run_dir={tmp_path}/run")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


PIPELINES = {  # what is done to a pipeline -> what is said
    "digits": (
        lambda p: (p / "model_index.json").write_text('{"a": ' + "9" * 5000 + "}"),
        "no diffusers pipeline",
    ),
    "brackets": (
        lambda p: (p / "model_index.json").write_text("[" * 10**5),
        "no diffusers pipeline",
    ),
    "a list": (lambda p: (p / "model_index.json").write_text("[1]"), "is not a mapping"),
    "an empty list in it": (lambda p: edit(p / "model_index.json", unet=[]), "unet=[]; expected"),
    "three words in it": (lambda p: edit(p / "model_index.json", vae=[1, 2, 3]), "vae=[1, 2, 3]"),
    "no scheduler": (lambda p: edit(p / "model_index.json", scheduler=["diffusers", "DDPMPipeline"]),
                     "scheduler DDPMPipeline is not a class"),
    **{
        f"{key} of a wrong kind": (
            lambda p, key=key, value=value: edit(p / "scheduler/scheduler_config.json", **{key: value}),
            said,
        )
        for key, value, said in (
            ("num_train_timesteps", "x", "scheduler cannot be read"),
            ("beta_start", [], "scheduler cannot be read"),
            ("beta_schedule", 7, "scheduler cannot be read"),
            ("prediction_type", 7, "its network predicts 7"),
            ("trained_betas", {}, "scheduler cannot be read"),
            ("num_train_timesteps", -3, "teacher="),
        )
    },
    "a network of no class": (
        lambda p: edit(p / "unet/config.json", _class_name=["x"]),
        "its class=['x']",
    ),
    "a network of wrong sizes": (
        lambda p: edit(p / "unet/config.json", block_out_channels="x"),
        "no diffusers model could be read",
    ),
    "weights cut": (
        lambda p: os.truncate(p / "unet/diffusion_pytorch_model.safetensors", 100),
        "no diffusers model could be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_a_damaged_pipeline_is_refused_in_a_line(tmp_path, name):
    damage, said = PIPELINES[name]
    save(tmp_path / "ddpm", unet(), ddpm())
    damage(tmp_path / "ddpm")
    with pytest.raises(UserError) as error:
        teachers.load(tmp_path / "ddpm", "teacher")
    assert said in str(error.value)
    assert len(error.value.faults) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts.pop("round"), "its facts have no round"),
        (lambda facts: facts.update(round="x"), "round='x'"),
        (lambda facts: facts.update(round=True), "round=True"),
        (lambda facts: facts.update(round=-1), "round=-1"),
        (lambda facts: facts.update(features=[1]), "features=[1]"),
        (lambda facts: facts.update(one_step=0), "one_step=0"),
        (lambda facts: facts.update(for_steps=["1"]), "for_steps=['1']"),
    ],
)
def test_a_manifest_of_odd_facts_is_refused_in_a_line(tmp_path, change, said):
    trained(tmp_path / "flow", "VelocityMLP", {"hidden": 8}, (2,), None)
    path = tmp_path / "flow/manifest.json"
    sealed = json.loads(path.read_text())
    change(sealed["facts"])
    path.write_text(json.dumps(sealed))
    with pytest.raises(UserError, match="manifest.json is damaged") as error:
        teachers.load(tmp_path / "flow", "teacher")
    assert said in str(error.value)


class Listener(BaseHTTPRequestHandler):
    """A host that writes down what it is told."""

    heard: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.heard.append(self.path)
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def host():
    Listener.heard.clear()
    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_dry_run_of_a_foreign_config_tells_no_host_anything(tmp_path, capsys, host, monkeypatch):
    """Each URL that a config can name, in each stage and in the chain; and no variable is ever read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hush")
    trained(tmp_path / "flow", "VelocityMLP", {"hidden": 8}, (2,), None)
    flow, fit = str(tmp_path / "flow"), {"steps": 2, "batch_size": 4}
    data = {"source": "ring", "samples": 50}
    place = f"{host}/x"
    configs = {
        "train_flow": {"data": data, "net": {"name": "VelocityMLP"}, "fit": fit},
        "generate_pairs": {"teacher": flow, "shards": 1},
        "reflow": {"start": flow, "pairs": [{"path": place}], "fit": fit, "run_dir": "r"},
        "finish": {"start": flow, "pairs": [{"path": place}], "fit": fit, "features": [place]},
        "train_classifier": {"data": data},
        "evaluate": {"teacher": flow, "student": flow, "data": data, "classifier": place},
        "export": {"student": flow, "evaluation": place, "run_dir": "e"},
    }
    prompts = {"path": "prompts.txt"}
    configs |= {
        "encode_prompts": {"teacher": place, "prompts": prompts},
        "evaluate_prompts": {"teacher": place, "prompts": prompts, "classifier": place},
        "tiny_pipeline": {"data": data},
        "encode": {"data": data, "vae": place},
    }
    assert configs.keys() == set(STAGES)
    for stage, values in configs.items():
        for key in ("run_dir", "teacher", "start", "student", "vae"):
            if key == "run_dir" or key in values:
                text = json.dumps({"run_dir": "r"} | values | {key: place})
                Path("foreign.yaml").write_text(text)
                capsys.readouterr()
                with suppress(SystemExit):
                    cli.main([stage, "foreign.yaml", "device=cpu", "--dry-run"])
                assert "Traceback" not in capsys.readouterr().err
        Path("foreign.yaml").write_text(
            json.dumps(values | {"run_dir": host + "/${oc.env:SECRET}"})
        )
        for flags in (["--dry-run"], []):
            assert "'${...}' is not replaced" in refused(capsys, stage, "foreign.yaml", *flags)
    chain = {"name": "foreign", "data": data, "net": {"name": "VelocityMLP"}}
    chain |= {
        "flow": {"fit": fit},
        "pairs": {"shards": 1, "run_dir": place},
        "reflow": {"fit": fit},
    }
    Path("foreign.yaml").write_text(json.dumps(chain))
    cli.main(["run", "foreign.yaml", "--dry-run", "flow.device=cpu", "--processes", "1"])
    assert f"later: {place} is read when the stage runs: a dry run" in capsys.readouterr().out
    assert Listener.heard == []
    assert sorted(os.listdir()) == ["flow", "foreign.yaml"]


def test_a_name_that_would_break_a_line_is_written_out(tmp_path, capsys):
    odd = tmp_path / "a\nb\x1b[31m"
    finish(odd, LAYOUT_OF_POINTS, 1)
    (odd / "x\ny.tar").write_bytes(b"")
    (odd / "pairs-000000.tar").unlink()
    with pytest.raises(SystemExit) as error:
        cli.main(["verify", str(odd)])
    assert error.value.code == 2
    said = capsys.readouterr()
    assert r"a\nb\x1b[31m" in said.err
    assert r"x\ny.tar is not a shard" in said.err
    assert "\x1b" not in said.out + said.err
    assert all(line.startswith("verify_pairs: ") for line in said.err.splitlines())


def test_errors_that_are_not_of_files_keep_their_traceback():
    assert command.refusal(ValueError("ours")) is None
    for error in (ConnectionResetError(104, "reset"), TimeoutError("slow")):
        assert "the network refuses" in str(command.refusal(error))
    assert "the disk refuses: [Errno 5]" in str(command.refusal(OSError(5, "Input/output error")))


def test_a_foreign_stage_still_runs_after_a_dry_run(tmp_path):
    """What a dry run switches off is on again."""
    words = [*FLOW, f"run_dir={tmp_path}/run"]
    cli.main(["train_flow", *words, "--dry-run"])
    run(train_flow, *words)
    assert (tmp_path / "run/manifest.json").exists()
