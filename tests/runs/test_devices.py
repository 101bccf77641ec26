"""Devices that no machine of the tests has: what `auto` takes, and what is refused there."""

import json

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.runs import process
from flowmatch.runs.command import load
from flowmatch.training import loop
from flowmatch.training.config import FitConfig
from pipelines import evaluate, export, generate_pairs, reflow, train_classifier, train_flow
from tests.pairset import make_teacher
from tests.stages import MODELS

NET = json.dumps({"name": "VelocityMLP", "hidden": 8})
FLOW = ["data.source=ring", "data.samples=50", f"net={NET}", "fit.steps=1", "fit.batch_size=4"]


@pytest.fixture(params=process.OTHERS)
def other(request, monkeypatch):
    """The one device, beside a CPU, that torch sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: request.param == "xpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: request.param == "mps")
    return request.param


def config(stage, *words):
    return load(MODELS[stage], ["run_dir=x", *words])[0]


def test_auto_takes_it_in_the_stages_that_run_there(other, monkeypatch):
    flow = config(train_flow, *FLOW)
    pairs = config(
        generate_pairs, "teacher=x", "shards=1", "shard_size=4", "block=2", "compute_batch=2"
    )
    student = config(reflow, "start=x", "pairs=x", "fit.steps=1", "fit.batch_size=4")
    for each in (flow, pairs, student):
        assert process.device_of(each) == other
        assert process.device_of(each.model_copy(update={"device": "cpu"})) == "cpu"
    scores = config(evaluate, "teacher=x", "student=x", "data.source=ring")
    assert process.device_of(scores) == "cpu"
    with pytest.raises(UserError, match=f"device='{other}': only flow, pairs and reflow run there"):
        process.device_of(scores.model_copy(update={"device": other}))
    assert f"{other}: flowmatch's tests have no such device" in train_flow.plan(flow).lines
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process.device_of(flow) == "cpu"
    with pytest.raises(UserError, match=f"device='{other}': one process alone"):
        process.device_of(flow.model_copy(update={"device": other}))


def test_what_it_does_not_do_is_refused_in_a_line(other, tmp_path):
    fit = {"steps": 1, "batch_size": 4}
    loop.check(FitConfig(**fit, precision="bf16"), other, 1)
    with pytest.raises(UserError) as error:
        loop.check(FitConfig(**fit, precision="fp16", compile=True), other, 1)
    assert error.value.faults == [
        f"{key}: not on device={other}; leave it out"
        for key in ("fit.precision='fp16'", "fit.compile=true")
    ]
    for stage, words in (
        (train_classifier, ["data={source: digits, labels: true}"]),
        (export, ["student=x"]),
    ):
        with pytest.raises(UserError, match=f"device={other}: .* leave device out"):
            stage.plan(config(stage, *words, f"device={other}"))
    if other == "mps":
        make_teacher(tmp_path / "flow")
        few = [f"teacher={tmp_path}/flow", "shards=1", "shard_size=4", "block=2", "compute_batch=2"]
        for solver in ("{name: dopri5}", "{name: euler, steps: 2, state: float64}"):
            with pytest.raises(UserError, match="device='mps' has no float64"):
                generate_pairs.plan(config(generate_pairs, *few, f"solver={solver}"))


@pytest.mark.parametrize("name", process.OTHERS)
def test_one_that_is_not_there_is_told(name):
    flow = config(train_flow, *FLOW, f"device={name}")
    with pytest.raises(UserError, match=f"device='{name}': torch sees no {name} device here"):
        process.device_of(flow)
