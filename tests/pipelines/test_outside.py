"""Networks from outside, trusted by the command line alone; signals, volumes and video."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flowmatch.config import UserError, validate
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.models import networks, teachers
from flowmatch.models.config import NetConfig
from flowmatch.runs import agreement, manifest, trusted
from flowmatch.runs.command import load
from pipelines import evaluate, export, generate_pairs, inspect_pairs, reflow, train_flow
from tests import forked, stages

CODE = '''
"""A network for samples of any number of axes."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor


class AnyNet(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels=1, sample_size=None, width=8):
        super().__init__()
        self.time, self.first = torch.nn.Linear(1, width), torch.nn.Linear(in_channels, width)
        self.last = torch.nn.Linear(width, in_channels)

    def forward(self, sample, timestep, return_dict=True):
        x = self.first(sample.movedim(1, -1))
        t = self.time(timestep[:, None].to(x.dtype) / 1000)
        x = torch.relu(x + t.reshape(len(x), *[1] * (x.ndim - 2), -1))
        x = self.last(x).movedim(-1, 1)
        return Output(sample=x) if return_dict else (x,)


class Plain(torch.nn.Module):
    pass
'''
FIT = ["fit.batch_size=8", "fit.steps=2", "fit.log_every=1", "fit.warmup=0"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with a package, in a process that trusts nothing."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trusted, "_modules", [])
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mine", "mine.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("mine", "mine.nets"):
        sys.modules.pop(name, None)


def array_of(path, *shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(path, x)
    return x


def test_a_class_from_outside_is_imported_only_when_it_is_trusted(home):
    (home / "mine" / "nets.py").write_text("raise SystemExit('code was run')")
    config = NetConfig(name="mine.nets:AnyNet")
    with pytest.raises(UserError, match=r"runs the code of mine.nets; .* add trust=mine.nets"):
        networks.build(config, (1, 4), None, 0)
    with pytest.raises(UserError, match=r"trust=mine/nets: expected a module"):
        load(train_flow.FlowConfig, ["a=1", "trust=mine/nets"])
    (home / "own.yaml").write_text("run_dir: a\ntrust: mine.nets\n")
    with pytest.raises(UserError, match="trust: unknown key"):  # never in a file
        load(train_flow.FlowConfig, ["own.yaml", "fit.steps=1", "fit.batch_size=1"])
    (home / "mine" / "nets.py").write_text("1 / 0")
    trusted.take(["trust=mine.nets"])
    with pytest.raises(UserError, match="cannot be imported: ZeroDivisionError"):
        networks.build(config, (1, 4), None, 0)


def test_what_is_no_network_is_refused(home):
    trusted.trust("mine.nets")
    for name, fault in [
        ("mine.nets:Plain", "a class of your own that is a diffusers.ModelMixin and ConfigMixin"),
        ("mine.nets:None", "expected VelocityMLP or a diffusers model class"),
        ("AnyNets", "or trust=MODULE and net.name=MODULE:CLASS"),
    ]:
        with pytest.raises(UserError, match=fault):
            networks.build(NetConfig(name=name), (1, 4), None, 0)


@pytest.mark.parametrize("shape", [(2, 12), (1, 6, 4), (3, 4, 6, 4), (2, 3, 3, 3)])
def test_any_number_of_axes(home, shape):
    trusted.trust("mine.nets")
    net = networks.build(NetConfig(name="mine.nets:AnyNet"), shape, None, 0)
    assert net.config.sample_size == list(shape[1:])
    array_of("x.npy", 5, *shape)
    data = dataset.load(validate(DataConfig, {"source": "arrays", "path": "x.npy"}))
    assert (data.shape, data.images, data.latents) == (shape, False, True)
    # five lines: an own state dict becomes a folder that teacher= and start= take
    other = type(net)(**{k: v for k, v in net.config.items() if k[0] != "_"})
    other.load_state_dict(net.state_dict())
    other.save_pretrained("folder")
    teacher = teachers.load("folder", "teacher")
    assert teacher.shape == shape
    trusted._modules.clear()
    with pytest.raises(UserError, match="'AnyNet': expected .* trust=MODULE for MODULE:CLASS"):
        teachers.load("folder", "teacher")


def test_a_signal_network_of_diffusers(home):
    array_of("x.npy", 16, 2, 32)
    words = ["net.name=UNet1DModel", "net.extra_in_channels=64", "net.block_out_channels=[32,32]"]
    words += ["net.down_block_types=[DownBlock1DNoSkip,DownBlock1D]"]
    words += ["net.up_block_types=[UpBlock1D,UpBlock1DNoSkip]", "net.norm_num_groups=4"]
    data = "data={source: arrays, path: x.npy}"
    stages.run(train_flow, "run_dir=flow", data, *words, *FIT)
    assert teachers.load("flow", "teacher").shape == (2, 32)


def test_video_by_an_own_network_through_every_stage(home):
    array_of("x.npy", 24, 3, 4, 6, 4)
    (home / "mine.yaml").write_text(
        json.dumps(
            {
                "name": "film",
                "data": {"source": "arrays", "path": "x.npy"},
                "net": {"name": "mine.nets:AnyNet", "width": 16},
            }
        )
    )
    trust = "trust=mine.nets"
    data = "data={source: arrays, path: x.npy}"
    stages.run(train_flow, "run_dir=flow", data, "net.name=mine.nets:AnyNet", *FIT, trust)
    facts = manifest.read("flow", "run")["facts"]
    assert facts["latents"] == {}
    assert facts["code"] == manifest.sha256_file("mine/nets.py")
    solver = "solver={name: euler, steps: 2}"
    pairs = ["run_dir=pairs", "teacher=flow", "shards=1", "shard_size=16", solver]
    stages.run(generate_pairs, *pairs, trust)
    stages.run(reflow, "run_dir=reflow", "start=flow", "pairs=pairs", *FIT, trust)
    rows = ["teacher=flow", "student=reflow", "steps=[1]", "converged_steps=2", "samples=20"]
    stages.run(evaluate, "run_dir=evaluate", data, *rows, trust)
    assert Path("evaluate/report.html").is_file()
    assert inspect_pairs.main(["pairs", "--out", "seen"]) == 0
    stages.run(
        export, "run_dir=export", "student=reflow", "steps=[1,2]", trust
    )  # in a fresh process
    assert json.loads(Path("export/model_index.json").read_text())["unet"] == ["nets", "AnyNet"]
    from flowmatch.export.sample import sample

    assert sample("export", 1, Path("out"), 2, 0) == "wrote out/samples.npy: [2, 3, 4, 6, 4]"


def test_ranks_agree_on_the_code_that_is_trusted(home):
    """Two machines with two versions of a network would train neither."""
    words = ["run_dir=x", "device=cpu", "data.source=ring", "net.name=VelocityMLP"]
    config, _ = load(train_flow.FlowConfig, [*words, *FIT])
    plan = SimpleNamespace(config=config, inputs={})
    assert not [key for key in agreement.facts(plan, True) if "mine" in key]
    trusted.trust("mine.nets")
    assert "(code) mine.nets" not in agreement.facts(plan, True)  # not in use
    trusted.find("mine.nets", "net.name")
    before = agreement.facts(plan, True)
    (home / "mine" / "nets.py").write_text(CODE.replace("torch.relu", "torch.tanh"))
    after = agreement.facts(plan, True)
    assert [key for key in after if after[key] != before[key]] == ["(code) mine.nets"]
    assert {"(version) peft", "(version) torchao", "(version) pillow"} <= after.keys()


def test_a_run_goes_on_with_the_code_that_it_was_begun_with(home, capsys):
    array_of("x.npy", 16, 2, 8)
    words = ["run_dir=flow", "data={source: arrays, path: x.npy}", "net.name=mine.nets:AnyNet"]
    words += [*FIT, "trust=mine.nets"]
    stages.run(train_flow, *words)
    whole, code = Path("flow/manifest.json").read_bytes(), home / "mine" / "nets.py"
    code.write_text(CODE.replace("torch.relu", "torch.tanh"))
    capsys.readouterr()
    stages.run(train_flow, *words)  # finished, by the code of then
    assert "is sealed: nothing to do" in capsys.readouterr().out
    Path("flow/manifest.json").unlink()
    with pytest.raises(UserError, match=r"(?s)set them back.*\(code\) mine.nets: its files have"):
        stages.run(train_flow, *words)
    code.write_text(CODE)
    stages.run(train_flow, "flow/config.yaml", "trust=mine.nets")
    assert Path("flow/manifest.json").read_bytes() == whole


def test_the_chain_passes_trust_to_its_processes(home):
    array_of("x.npy", 16, 2, 8)
    values = {
        "name": "film",
        "data": {"source": "arrays", "path": "x.npy"},
        "flow": {"net": {"name": "mine.nets:AnyNet"}, "fit": {"steps": 1, "batch_size": 8}},
    }
    (home / "film.yaml").write_text(json.dumps(values))
    known = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def call(*more):
        words = ["flowmatch", "run", "film.yaml", "device=cpu", *more]
        return forked.run(words, cwd=home, env=known)

    assert "add trust=mine.nets to the command line" in call().stderr
    done = call("trust=mine.nets")
    assert done.returncode == 0, done.stderr
    assert (home / "runs/film/flow/manifest.json").is_file()


@pytest.mark.parametrize(
    ("shape", "fault"),
    [((5, 4), "expected floats [N, C, ...]"), ((5, 0, 4), "expected floats [N, C, ...]")],
)
def test_arrays_that_are_no_samples(home, shape, fault):
    np.save("x.npy", np.zeros(shape))
    with pytest.raises(UserError) as caught:
        dataset.load(validate(DataConfig, {"source": "arrays", "path": "x.npy"}))
    assert fault in str(caught.value)
    with pytest.raises(UserError, match="arrays are taken as they are, not images; remove flip"):
        validate(DataConfig, {"source": "arrays", "path": "x.npy", "flip": True})
