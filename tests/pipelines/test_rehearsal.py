"""A dry run that measures: three updates or evaluations, FLOPs without a GPU, and what cannot fit."""

import re

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.models import flops
from flowmatch.runs.command import execute, load
from flowmatch.training import meter, rehearsal
from pipelines import generate_pairs, reflow, train_flow
from tests.pipelines.test_adapters import LORA, make
from tests.pipelines.test_text import words
from tests.stages import UNET

NAMES = ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionPipeline"]


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    return request.param, make(request.param, tmp_path_factory.mktemp("rehearsal"))


def reflow_words(name, folder, *more):
    base = [f"start={folder}/pipe", f"pairs={folder}/pairs", f"conditions={folder}/rows"]
    base += ["fit.steps=100", "fit.batch_size=4", f"run_dir={folder}/dry", "device=cpu"]
    return words(name, folder, *base, *more)


def dry(stage, model, given, capsys):
    config, _ = load(model, given)
    execute(stage.STAGE, config, dry_run=True)
    return capsys.readouterr().out


def test_reflow_is_timed_and_leaves_nothing(made, capsys):
    name, folder = made
    out = dry(reflow, reflow.ReflowConfig, reflow_words(name, folder, *LORA), capsys)
    found = re.search(
        r"three updates were timed on 1 process: (\S+) s an update, (\S+) samples", out
    )
    seconds, rate = (float(word.replace(",", "")) for word in found.groups())
    assert seconds * rate == pytest.approx(4, rel=0.1)
    hours = float(re.search(r"100 updates take (\S+) hours", out)[1])
    assert hours == pytest.approx(100 * seconds / 3600, abs=0.006)
    assert re.search(r"EMA a process; a checkpoint has \S+ GB, 3 of them at most", out)
    assert not (folder / "dry").exists()


def test_stage_one_is_timed_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    net = [f"net.{key}={value}" for key, value in UNET.items()]
    given = ["data.source=digits", "net.name=UNet2DModel", *net, "fit.steps=100", "fit.warmup=0"]
    given += ["fit.batch_size=8", f"run_dir={tmp_path}/flow", "device=cpu"]
    out = dry(train_flow, train_flow.FlowConfig, given, capsys)
    found = re.search(
        r"three updates were timed on 1 process: (\S+) s an update, (\S+) samples", out
    )
    seconds, rate = (float(word.replace(",", "")) for word in found.groups())
    assert seconds * rate == pytest.approx(8, rel=0.1)
    assert re.search(r"100 updates take \S+ hours", out)
    assert not (tmp_path / "flow").exists()
    config, _ = load(train_flow.FlowConfig, given)
    plan = train_flow.plan(config)
    monkeypatch.setattr(flops, "PATIENCE", 0.0)
    assert "TFLOP an update, counted; there is no GPU here" in plan.measure()[0]
    monkeypatch.setattr(rehearsal, "room", lambda device: 1)
    with pytest.raises(UserError, match="weights, gradients, optimizer and EMA take"):
        plan.measure()


def test_the_flops_of_a_network_without_weights_are_those_of_the_real_one(made, monkeypatch):
    name, folder = made
    config, _ = load(reflow.ReflowConfig, reflow_words(name, folder, *LORA))
    plan = reflow.plan(config)
    counted = flops.of_network(plan.start, plan.net, config.lora, trained=True)
    one = meter.Meter(torch.device("cpu"), "fp32", 1)
    one.peak = 1.0
    v = plan.start.field(plan.net)(plan.net)
    x, t = torch.zeros(1, *plan.start.shape), torch.full((1,), 0.5)
    with one.counted() as forward_is_done:
        out = v(x, t, {"label": torch.zeros(1, dtype=torch.long)})
        forward_is_done()
        out.sum().backward()
    # fused attention computes its scores again in the backward pass
    assert counted == pytest.approx(one.flops, rel=0.1)
    monkeypatch.setattr(flops, "PATIENCE", 0.0)
    lines = plan.measure()
    assert re.search(
        r"TFLOP an update, counted; there is no GPU here, and nothing is timed", lines[0]
    )


def test_pairs_are_timed(made, capsys):
    name, folder = made
    sizes = ["shards=2", "shard_size=50", "compute_batch=4", "device=cpu"]
    given = words(name, folder, f"teacher={folder}/pipe", f"run_dir={folder}/more", *sizes)
    out = dry(generate_pairs, generate_pairs.PairsConfig, given, capsys)
    rate = float(re.search(r"evaluations of 4 pairs were timed: (\S+) pairs a second", out)[1])
    hour = float(re.search(r"an hour of a worker makes (\S+) pairs", out)[1].replace(",", ""))
    assert hour == pytest.approx(3600 * rate, rel=0.01)


def test_what_cannot_fit_is_refused_with_the_key(made, monkeypatch):
    name, folder = made
    config, _ = load(reflow.ReflowConfig, reflow_words(name, folder))
    plan = reflow.plan(config)
    count = sum(p.numel() for p in plan.net.parameters())
    for has, way in [
        (14.5, "fit.optimizer=adamw_8bit, or lora"),
        (3, "lora={rank: 16} with fit.precision=bf16, or fit.shard=true over 9 processes or more"),
        (1, "use fit.shard=true over 25 processes or more"),
    ]:
        monkeypatch.setattr(rehearsal, "room", lambda device, has=has: int(has * count))
        with pytest.raises(UserError, match=re.escape(way)):
            plan.measure()
    more = ["lora={rank: 1}", "fit.precision=bf16", "fit.checkpointing=true"]
    for key in ("null", "int8"):
        words = reflow_words(name, folder, *more, f"lora.quantize={key}")
        config, _ = load(reflow.ReflowConfig, words)
        net = reflow.plan(config).net
        if key == "null":
            need = rehearsal.sizes(net, config.fit).state
            monkeypatch.setattr(rehearsal, "room", lambda device, has=need - 1: has)
            with pytest.raises(UserError, match="lora.quantize=int8 with fit.checkpointing"):
                rehearsal.check_room(net, config.fit, "cpu")
        else:
            rehearsal.check_room(net, config.fit, "cpu")
    monkeypatch.setattr(rehearsal, "room", lambda device: 10**12)

    def full(*words, **more):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("flowmatch.training.loop.fit", full)
    with pytest.raises(UserError, match=r"do not fit the memory: use fit.micro_batch=2"):
        plan.measure()
