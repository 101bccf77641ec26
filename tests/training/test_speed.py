"""Keys for precision and speed: what they may not change, and where they are refused."""

import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from flowmatch.config import UserError
from flowmatch.flow import grids, solvers
from flowmatch.models import networks
from flowmatch.models.precision import arithmetic
from flowmatch.models.velocity import Velocity
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest, process
from flowmatch.training import compilation
from flowmatch.training.config import FitConfig
from flowmatch.training.loop import check, check_net
from pipelines import evaluate, inspect_pairs
from tests import pairset, stages
from tests.training.test_loop import IMAGES, images, net, stream, train, unet, weights

SHORT = {"steps": 6, "batch_size": 8, "save_every": 3, "log_every": 1, "warmup": 2}
COMPILE = torch.compile


class Stopped(Exception):
    pass


def curve(folder, dropout=0.0, stream=images, **values):
    _, lines = train(folder, stream, unet(dropout), **(SHORT | values))
    return [line["loss"] for line in lines]


def test_checkpointing_gives_the_same_gradients_dropout_included(tmp_path):
    assert curve(tmp_path / "a", 0.3) == curve(tmp_path / "b", 0.3, checkpointing=True)
    for name, tensor in weights(tmp_path / "a").items():
        assert torch.equal(tensor, weights(tmp_path / "b")[name])


def test_checkpointing_computes_again(tmp_path, monkeypatch):
    calls = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    counts = []
    for again in (False, True):
        calls.clear()
        curve(tmp_path / str(again), checkpointing=again)
        counts.append(len(calls))
    assert counts[1] > 1.3 * counts[0]


def test_channels_last_changes_no_more_than_rounding_and_resumes(tmp_path):
    network = unet()
    train(tmp_path / "a", images, network, channels_last=True, **SHORT)
    kernel = network.down_blocks[0].resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    whole = curve(tmp_path / "b", channels_last=True)
    assert whole == pytest.approx(curve(tmp_path / "c"), rel=1e-5)

    def stopping(counters):
        if counters[0] // 8 >= 5:
            raise Stopped
        return images(counters)

    with pytest.raises(Stopped):
        curve(tmp_path / "d", stream=stopping, channels_last=True)
    assert curve(tmp_path / "d", channels_last=True) == whole
    for name, tensor in weights(tmp_path / "b").items():
        assert torch.equal(tensor, weights(tmp_path / "d")[name])


def compiler(monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))
    torch._dynamo.reset()


def losing(graph, inputs):
    """Compile a backward pass that loses the last weight's gradient."""

    def run(*words):
        *found, last = graph(*words)
        return [*found, torch.zeros_like(last)]

    return make_boxed_func(run)


def test_a_compiler_that_loses_a_gradient_is_refused_at_every_start(tmp_path, monkeypatch):
    wrong = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=losing)
    what = r"gradient of last.bias differs from the eager one by 100.0%, .* in fp32 .*; use fit.compile="
    values = {"steps": 6, "save_every": 3, "log_every": 1, "compile": True}

    def stopping(counters):
        if counters[0] // 32 >= 5:
            raise Stopped
        return stream(counters)

    compiler(monkeypatch, "aot_eager")
    with pytest.raises(Stopped):
        train(tmp_path, stopping, **values)
    for folder in (tmp_path, tmp_path / "new"):
        compiler(monkeypatch, wrong)
        with pytest.raises(UserError, match=what):
            train(folder, **values)
    compiler(monkeypatch, "aot_eager")
    done = train(tmp_path, **values)
    compiler(monkeypatch, wrong)
    assert train(tmp_path, **values) == done  # nothing is left to compile


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_network_is_one_graph_compiled_once(tmp_path, monkeypatch, checkpointing):
    """By the backend that generates no code; `inductor` takes minutes for it on a CPU.

    The check of its gradients changes no bit, and the network trains like the eager one.
    """
    values = {"micro_batch": 4, "checkpointing": checkpointing} | SHORT
    checked, words = [], []
    check = compilation.check
    for look in (check, lambda *given: words.append(given))[: 1 if checkpointing else 2]:
        compiler(monkeypatch, "aot_eager")
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(compilation, "check", look)
        with torch._dynamo.config.patch(error_on_recompile=True):
            folder = tmp_path / str(len(checked))
            files, lines = train(folder, images, unet(0.3), compile=True, **values)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        checked.append((files, [line["loss"] for line in lines]))
    eager = curve(tmp_path / "eager", 0.3, **values)
    assert checked[0][1] == pytest.approx(eager, rel=1e-6)
    if not checkpointing:
        assert checked[0] == checked[1]
        errors, *_ = words[0]
        assert torch.equal(errors(), errors())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_compiled_training_agrees_with_eager(tmp_path, kind):
    """The U-Net with dropout and two levels: the compiler once lost the gradient of its upsampling."""
    values = {"batch_size": 32, "steps": 20, "save_every": 10, "log_every": 5}
    words = (stream, net) if kind == "mlp" else (images, partial(unet, 0.3, levels=2))
    torch._dynamo.reset()
    _, found = train(tmp_path / "a", words[0], words[1](), compile=True, **values)
    _, eager = train(tmp_path / "b", words[0], words[1](), **values)
    for one, other in zip(found, eager, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], atol=1e-6, rtol=1e-5)


def test_float32_is_float32_wherever_a_network_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    process.start_accelerator("cpu")
    assert not torch.backends.cudnn.allow_tf32

    seen = []
    forward = Velocity.__call__

    def looking(*words):
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(*words)

    pairset.make_teacher(tmp_path / "flow")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(Velocity, "__call__", looking)
    pairset.generate(*pairset.words(tmp_path))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32  # of whoever called
    with arithmetic("tf32", "cpu"):
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_machine_or_network_lacks_is_refused(monkeypatch):
    def config(**values):
        return FitConfig(steps=1, batch_size=2, **values)

    with pytest.raises(UserError, match="'tf32' needs a GPU"):
        check(config(precision="tf32"), "cpu", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    for capability in ((7, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            lacking = capability == (7, 0) and precision in ("tf32", "bf16")
            with pytest.raises(UserError, match="V100 is older") if lacking else nullcontext():
                check(config(precision=precision), "cuda", 1)
    with pytest.raises(UserError, match="cannot be combined with fit.compile=true"):
        check(config(shard=True, compile=True), "cpu", 2)
    with pytest.raises(UserError, match="cannot be combined with fit.channels_last=true"):
        check(config(shard=True, channels_last=True), "cpu", 2)
    with pytest.raises(UserError, match="VelocityMLP does not support it"):
        check_net(config(checkpointing=True), net(), None)
    with pytest.raises(UserError, match="VelocityMLP has no convolutions"):
        check_net(config(channels_last=True), net(), None)
    check_net(config(channels_last=True, checkpointing=True), unet(), None)


def test_a_bf16_teacher_carries_a_state_of_float32(tmp_path, capsys):
    """What is stored is what autocast's network and the solver's float32 give, and no bf16 number."""
    pairset.make_teacher(tmp_path / "flow", None, (1, 4, 4), **stages.UNET, name="UNet2DModel")
    words = ["dtype=float32", "solver.name=heun", "solver.steps=3", "compute_batch=10"]
    made = {}
    for precision in ("fp32", "bf16"):
        more = [*words, f"precision={precision}"]
        pairset.generate(*pairset.words(tmp_path, *more, folder=precision))
        made[precision] = PairData(tmp_path / precision).batch(range(10))
    x0, x1 = made["bf16"]["x0"], made["bf16"]["x1"]
    assert torch.equal(x0, made["fp32"]["x0"])
    assert 1e-4 < (x1 - made["fp32"]["x1"]).abs().max() < 0.1
    assert (x1 != x1.bfloat16()).float().mean() > 0.9
    v = Velocity(networks.load(tmp_path / "flow" / "net", "net").eval())

    def rounded(x, t):
        with torch.autocast("cpu", torch.bfloat16):
            return v(x, t)

    with torch.no_grad():
        expected = solvers.integrate(rounded, x0, grids.uniform_grid(3), "heun")
    assert torch.equal(x1, expected)
    with pytest.raises(UserError, match="precision='tf32' needs a GPU"):
        pairset.generate(*pairset.words(tmp_path, "precision=tf32", folder="tf32"))
    cards = [(tmp_path / name / "README.md").read_text() for name in ("bf16", "fp32")]
    assert ["the network in bf16, guidance" in card for card in cards] == [True, False]
    for precision in made:
        inspect_pairs.main([str(tmp_path / precision)])
        assert f" evaluations a pair, {precision}, guidance" in capsys.readouterr().out


def test_pairs_from_before_there_was_a_precision_are_repeated_and_grow(tmp_path, capsys):
    pairset.make_teacher(tmp_path / "flow")
    words = pairset.words(tmp_path)
    pairset.generate(*words)
    folder = tmp_path / "pairs"
    seal = json.loads((folder / "manifest.json").read_text())
    for key, value in manifest.ADDED.items():  # keys that came later, at their default
        assert seal["config"].pop(key) == value
    given = (seal["config"], seal["inputs"], seal["facts"]["round"])
    assert manifest.pair_fingerprint(*given) == seal["facts"]["fingerprint"]
    names = (
        "format",
        "config",
        "inputs",
        "round",
    )  # what was hashed before, keys without a value too
    plain = dict(zip(names, (manifest.PAIR_FORMAT, *given), strict=True))
    assert None in seal["config"].values()
    assert manifest.fingerprint(plain) == seal["facts"]["fingerprint"]
    other = manifest.pair_fingerprint(given[0] | {"precision": "bf16"}, *given[1:])
    assert other != seal["facts"]["fingerprint"]
    (folder / "manifest.json").write_text(json.dumps(seal))
    text = (folder / "config.yaml").read_text()
    assert "precision: fp32\n" in text
    kept = {"precision: fp32", "prompts: null", "call: {}", "x0: stored"}
    old = "".join(line for line in text.splitlines(True) if line.strip() not in kept)
    (folder / "config.yaml").write_text(old)
    tars = {path: path.read_bytes() for path in folder.glob("*.tar")}
    pairset.generate(*words)
    assert "is sealed: nothing to do" in capsys.readouterr().out
    pairset.generate(*words, "shards=4")
    assert {path: path.read_bytes() for path in tars} == tars
    assert len(PairData(folder)) == 40


def test_an_evaluation_says_what_its_networks_multiply_in(tmp_path):
    pairset.make_teacher(tmp_path / "flow", None, (1, 4, 4), **stages.UNET, name="UNet2DModel")
    np.savez(tmp_path / "data.npz", x=IMAGES.clamp(-1, 1).movedim(1, -1).numpy())
    places = [f"teacher={tmp_path}/flow", f"student={tmp_path}/flow", "features=values"]
    data = ["data.source=npz", f"data.path={tmp_path}/data.npz", "steps=[1]", "converged_steps=2"]
    found = {}
    for precision in ("fp32", "bf16"):
        where = [f"run_dir={tmp_path}/{precision}", f"precision={precision}"]
        stages.run(evaluate, *places, *data, *where)
        result = json.loads((tmp_path / precision / "metrics.json").read_text())
        assert result["protocol"]["arithmetic"] == precision
        table = (tmp_path / precision / "table.md").read_text()
        assert ("EMA weights in bf16" in table) == (precision == "bf16")
        found[precision] = (
            result["student"]["rows"][0]["distance"],
            result["student"]["straightness"],
        )
    for rounded, exact in zip(found["bf16"], found["fp32"], strict=True):
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.05)
