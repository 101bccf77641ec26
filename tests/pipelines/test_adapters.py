"""Adapters through stage three: what is trained, saved and loaded again, killed and resumed."""

import json
import re
import shutil
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig
from flowmatch.export.sample import sample
from flowmatch.models import adapters, networks, text
from flowmatch.models.config import CallConfig, LoraConfig, NetConfig
from flowmatch.models.pipeline import open_pipeline
from flowmatch.models.watch import run as run_pipeline
from flowmatch.runs import manifest
from pipelines import encode_prompts, export, generate_pairs, reflow
from tests import pairset, ranks
from tests.pipelines.test_text import PROMPTS, call_of, words
from tests.stages import UNET, run
from tests.tiny import TINY

NAMES = ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionPipeline"]
LORA = ["lora={rank: 3, alpha: 6}", "fit.batch_size=4", "fit.log_every=1", "fit.lr=0.05"]
LORA += ["fit.warmup=0", "fit.ema_decay=0.5"]


def make(name, folder):
    """Write a tiny pipeline, pairs of its own run, and its prompts, encoded."""
    TINY[name].build().save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    sizes = ["shards=1", "shard_size=12", "block=4", "compute_batch=4", "dtype=float32"]
    base = words(name, folder, f"teacher={folder}/pipe")
    run(generate_pairs, *base, f"run_dir={folder}/pairs", *sizes)
    run(encode_prompts, *base, f"run_dir={folder}/rows", "shard_size=4", "batch_size=2")
    return folder


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    return request.param, make(request.param, tmp_path_factory.mktemp("adapters"))


def reflow_words(name, folder, place, *more):
    base = [f"start={folder}/pipe", f"pairs={folder}/pairs", f"conditions={folder}/rows", *LORA]
    return [*words(name, folder, *base), f"run_dir={folder}/{place}", *more]


def student(name, folder, place, **more):
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    pipeline = str(folder / "pipe")
    return text.load(folder / place, "student", listed, call, pipeline=pipeline, **more)


def sampled(pipe, name):
    """The last state of a run from noise of ours."""
    noise = TINY[name].noise(2)
    seen = run_pipeline(pipe, PROMPTS[:2], call_of(name), noise)
    return seen.steps[-1].after


def test_the_adapter_alone_is_trained_saved_and_loaded_by_the_stock_pipeline(made):
    """Unmerged in the pipeline's class, merged here, and by the keys of ComfyUI: the same samples."""
    name, folder = made
    run(reflow, *reflow_words(name, folder, "reflow", "fit.steps=6", "fit.save_every=3"))
    net = folder / "reflow/net"
    assert sorted(p.name for p in net.iterdir()) == [adapters.COMFYUI, adapters.DIFFUSERS]
    saved = load_file(net / adapters.DIFFUSERS)
    count = sum(t.numel() for t in saved.values())
    checkpoint = folder / "reflow/checkpoints/step_00000006"
    for part in ("net", "diffusion_pytorch_model", "optimizer"):
        tensors = load_file(checkpoint / f"{part}.safetensors")
        assert all(".lora_" in key for key in tensors)
        assert sum(t.numel() for t in tensors.values()) <= (2 * count + len(tensors))
    assert max(float(t.abs().max()) for key, t in saved.items() if "lora_B" in key) > 0.01

    teacher = open_pipeline(folder / "pipe", "teacher")
    before = sampled(teacher, name)
    teacher.load_lora_weights(net)
    unmerged = sampled(teacher, name)
    assert float((unmerged - before).abs().max()) > 1e-3, "the adapter changes nothing"
    loaded = student(name, folder, "reflow")
    merged = sampled(loaded.pipe, name)
    assert torch.allclose(merged, unmerged, atol=2e-5 * float(unmerged.abs().max()))
    assert not any(adapters.is_adapters(key) for key in loaded.net.state_dict())

    sealed = manifest.read(folder / "reflow", "student")
    assert loaded.round == sealed["facts"]["round"] == 1
    assert sealed["facts"]["lora"]["rank"] == 3
    by_comfyui(open_pipeline(folder / "pipe", "teacher"), name, net, merged)


def test_an_adapter_of_layers_in_int8_is_nearly_that_of_the_network(made, capsys):
    name, folder = made
    more = ["fit.steps=6", "fit.save_every=3", "fit.checkpointing=true", "fit.lr=0.003"]
    for place, key in (("floats", "null"), ("int8", "int8")):
        run(reflow, *reflow_words(name, folder, place, *more, f"lora.quantize={key}"))
    losses, tensors = zip(*(result_of(folder / place) for place in ("floats", "int8")), strict=True)
    assert losses[0] != losses[1]
    assert np.allclose(*losses, rtol=0.05)
    ups = [
        torch.cat([t.flatten() for n, t in sorted(one.items()) if "lora_B" in n]) for one in tensors
    ]
    assert float((ups[0] - ups[1]).norm() / ups[0].norm()) < 0.3  # they begin at 0
    place = folder / "int8"
    part = load_file(place / "checkpoints/step_00000006/net.safetensors")
    assert all(".lora_" in key and t.dtype == torch.float32 for key, t in part.items())
    opened = open_pipeline(folder / "pipe", "teacher")
    opened.load_lora_weights(place / "net")
    merged = sampled(student(name, folder, "int8").pipe, name)  # into the weights of the files
    assert torch.allclose(merged, sampled(opened, name), atol=2e-5 * float(merged.abs().max()))
    whole = (place / "net" / adapters.DIFFUSERS).read_bytes()
    for gone in (place / "manifest.json", place / "net" / adapters.DIFFUSERS):
        gone.unlink()
    shutil.rmtree(place / "checkpoints/step_00000006")
    run(reflow, *reflow_words(name, folder, "int8", *more, "lora.quantize=int8"))
    assert (place / "net" / adapters.DIFFUSERS).read_bytes() == whole


def result_of(place):
    """The losses of a run, and its adapter."""
    lines = (place / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return losses, load_file(place / "net" / adapters.DIFFUSERS)


def test_a_frozen_layer_in_int8_takes_a_byte_a_weight_and_is_refused_where_it_is_no_gain(made):
    name, folder = made
    net = networks.build(
        NetConfig(name="UNet2DModel", **UNET | {"add_attention": True}), (1, 8, 8), None, 0
    )
    adapters.add(net, LoraConfig(rank=2), 0)
    layers = {
        n: m for n, m in net.named_modules() if type(m) is torch.nn.Linear and ".lora_" not in n
    }
    weights = {n: m.weight.detach().clone() for n, m in layers.items()}
    adapters.quantise(net)
    for layer, w in weights.items():
        rounded = net.get_submodule(layer).weight
        assert adapters.bytes_of(rounded) == w.numel() + 4 * len(w)
        step = w.abs().amax(1, keepdim=True) / 127.5
        assert (
            float(((rounded.dequantize() - w).abs() / step).max()) < 1.01
        )  # the largest is cut off
    assert all(type(p.data) is torch.Tensor for p in adapters.trained(net).values())
    for words_, fault in [
        ([], "needs fit.checkpointing=true"),
        (["fit.checkpointing=true", "fit.compile=true"], "cannot be combined with fit.compile"),
        (["fit.checkpointing=true", "lora.merge=true"], "net/ would be the whole network"),
    ]:
        with pytest.raises(UserError, match=fault):
            run(
                reflow,
                *reflow_words(name, folder, "no", "fit.steps=1", "lora.quantize=int8", *words_),
            )


def by_comfyui(pipe, name, net, merged):
    """Do what ComfyUI does with a file: W + alpha / rank up down, by layer."""
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    network, tensors = getattr(pipe, component), load_file(net / adapters.COMFYUI)
    used = set()
    for layer, module in network.named_modules():
        down, up = f"{component}.{layer}.lora_A.weight", f"{component}.{layer}.lora_B.weight"
        alpha = f"{component}.{layer}.alpha"
        if component == "unet":  # the names of kohya's scripts
            layer = "lora_unet_" + layer.replace(".", "_")
            down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
            alpha = f"{layer}.alpha"
        if down in tensors:
            used |= {down, up, alpha}
            scale = tensors[alpha] / tensors[down].shape[0]
            module.weight.data += scale * tensors[up] @ tensors[down]
    assert used == set(tensors)
    assert torch.allclose(sampled(pipe, name), merged, atol=1e-4 * float(merged.abs().max()))


def test_a_merged_network_is_written_on_request(made):
    name, folder = made
    run(reflow, *reflow_words(name, folder, "alone", "fit.steps=2"))
    run(reflow, *reflow_words(name, folder, "whole", "fit.steps=2", "lora.merge=true"))
    assert (folder / "whole/net/config.json").is_file()
    one, two = (student(name, folder, place).net.state_dict() for place in ("alone", "whole"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_a_base_in_half_precision_stays_as_it_is(made):
    """The base is held in bfloat16, adapter and its averages in float32."""
    name, folder = made
    words = reflow_words(name, folder, "half", "fit.steps=2", "fit.precision=bf16", "device=cpu")
    config, _ = ranks.command.load(reflow.ReflowConfig, words)
    plan = reflow.plan(config)
    frozen = {p.dtype for p in plan.net.parameters() if not p.requires_grad}
    trained = {p.dtype for p in adapters.trained(plan.net).values()}
    assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})
    base = {k: v.clone() for k, v in plan.net.state_dict().items() if not adapters.is_adapters(k)}
    accelerate.state.AcceleratorState._reset_state(True)  # it holds one precision a process
    try:
        reflow.run(plan)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    now = plan.net.state_dict()
    assert all(torch.equal(now[key], value) for key, value in base.items())
    lines = (folder / "half/metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return make(NAMES[0], tmp_path_factory.mktemp("sd3"))


LONG = ["fit.steps=12", "fit.save_every=3", "fit.keep=9", "lora.dropout=0.3", "device=cpu"]


def train(world, words, codes=None, **environment):
    """Run the watched stage on some ranks, to its end."""
    log = f"{words[-1].removeprefix('run_dir=')}.log"
    started = ranks.start(world, words, log, "reflow", **environment)
    for rank in started:
        rank.join(120)
    said = Path(log).read_text()
    assert [rank.exitcode for rank in started] == (codes or [0] * world), said


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_killed_at_random_moments_and_repeated_it_writes_the_same_bytes(sd3, world):
    """Dropout included; once in an update, once while a checkpoint is written."""
    rng = np.random.default_rng(world)
    base = reflow_words(NAMES[0], sd3, "", *LONG)

    def at(place):
        return [w for w in base if not w.startswith("run_dir=")] + [f"run_dir={sd3}/{place}"]

    train(world, at(f"whole{world}"))
    step, save = int(rng.integers(3, 6)), 3 * int(rng.integers(2, 4))
    dead = [-9, 1][:world]
    train(world, at(f"cut{world}"), dead, FAULT=f"kill:0:{step}")
    train(world, at(f"cut{world}"), dead, FAULT=f"save:0:{save}")
    train(world, at(f"cut{world}"))
    for name in ("manifest.json", f"net/{adapters.DIFFUSERS}", f"net/{adapters.COMFYUI}"):
        whole, cut = (sd3 / f"{place}{world}" / name for place in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name


def test_the_adapter_of_a_network_without_prompts_is_merged(tmp_path):
    net = UNET | {"name": "UNet2DModel", "add_attention": True, "attention_head_dim": 4}
    net |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
    pairset.make_teacher(tmp_path / "flow", shape=(1, 8, 8), classes=None, **net)
    pairset.generate(*pairset.words(tmp_path, "dtype=float32"))
    base = [f"start={tmp_path}/flow", f"pairs={tmp_path}/pairs", "fit.steps=4", *LORA]
    run(reflow, *base, f"run_dir={tmp_path}/reflow")
    before, after = (networks.load(tmp_path / p / "net", "net") for p in ("flow", "reflow"))
    changed = {
        key
        for key, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[key])
    }
    assert changed == {f"{layer}.weight" for layer in adapters.layers(before, LoraConfig().targets)}
    with pytest.raises(UserError, match="lora.targets: UNet2DModel has no layer to_z"):
        run(reflow, *base, f"run_dir={tmp_path}/no", "lora.targets=[to_q,to_z]")
    with pytest.raises(UserError, match="an adapter leaves untrained; leave one of them out"):
        run(reflow, *base, f"run_dir={tmp_path}/no", "objective.name=meanflow")


def test_a_student_of_another_pipeline_is_refused(made, tmp_path):
    name, folder = made
    run(reflow, *reflow_words(name, folder, "small", "fit.steps=1"))
    pipe = TINY[name].build()
    with torch.no_grad():
        next(getattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer").parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "other")
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    other = str(tmp_path / "other")
    with pytest.raises(UserError, match="is an adapter of another network than that of the given"):
        text.load(folder / "small", "student", listed, call, pipeline=other)


def test_stage_three_loads_no_text_encoder(made, monkeypatch):
    """With encoded prompts; a run that encodes on the fly shows that the test would see one."""
    import transformers

    def refuse(*words, **more):
        raise RuntimeError("a model of transformers is loaded")

    name, folder = made
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    run(reflow, *reflow_words(name, folder, "no_encoder", "fit.steps=1"))
    live = [w for w in reflow_words(name, folder, "live") if not w.startswith("conditions=")]
    with pytest.raises((RuntimeError, UserError), match="a model of transformers is loaded"):
        run(reflow, *live, "fit.steps=1")


@pytest.mark.slow
def test_a_sharded_adapter_is_killed_and_goes_on_sharded_or_not(sd3):
    """Frozen base in bfloat16, activations computed again, parts of two processes; then one process."""
    short = [*LONG, "fit.shard=true", "fit.checkpointing=true", "fit.precision=bf16"]
    base = [w for w in reflow_words(NAMES[0], sd3, "", *short) if not w.startswith("run_dir=")]
    train(2, [*base, f"run_dir={sd3}/sharded"])
    place = sd3 / "sharded/checkpoints/step_00000012"
    assert {p.name for p in place.glob("optimizer*")} == {
        f"optimizer.part-0000{rank}.safetensors" for rank in (0, 1)
    }
    cut = [*base, f"run_dir={sd3}/cut"]
    train(2, cut, [1, -9], FAULT="kill:1:5")
    train(2, cut, [-9, 1], FAULT="save:0:9")
    names = sorted(p.name for p in (sd3 / "cut/checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006"]
    train(2, cut)
    for name in ("manifest.json", f"net/{adapters.DIFFUSERS}"):
        assert (sd3 / "sharded" / name).read_bytes() == (sd3 / "cut" / name).read_bytes(), name
    train(2, [*base, f"run_dir={sd3}/mixed"], [1, -9], FAULT="kill:1:7")
    alone = [word for word in base if word != "fit.shard=true"]
    train(1, [*alone, f"run_dir={sd3}/mixed"])
    one, two = (load_file(sd3 / run / "net" / adapters.DIFFUSERS) for run in ("sharded", "mixed"))
    assert one.keys() == two.keys()


@pytest.mark.slow
def test_an_export_has_the_adapter_in_its_weights(sd3):
    """The pipeline's own weights with the update, checked in a fresh process by the stage itself."""
    import diffusers

    name = NAMES[0]
    run(reflow, *reflow_words(name, sd3, "student", "fit.steps=4"))
    base = words(name, sd3, f"student={sd3}/student", f"pipeline={sd3}/pipe")
    run(export, *base, f"run_dir={sd3}/export", "steps=[1,2]")
    exported = diffusers.DiffusionPipeline.from_pretrained(sd3 / "export").transformer
    loaded = student(name, sd3, "student").net.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in exported.state_dict().items())


@pytest.mark.slow
def test_an_export_of_the_adapter_alone_is_sampled_by_the_code_of_its_card(sd3, tmp_path):
    name, place = NAMES[0], sd3 / "adapter"
    run(reflow, *reflow_words(name, sd3, "small", "fit.steps=4"))
    base = words(name, sd3, f"pipeline={sd3}/pipe", "steps=[1,2]", "adapter=true")
    run(export, *base, f"student={sd3}/small", f"run_dir={place}")
    kept = {"config.yaml", "manifest.json", "README.md", adapters.COMFYUI, adapters.DIFFUSERS}
    found = {p.name for p in place.iterdir() if not p.name.startswith(".")}
    assert found == {*kept, "scheduler", "scheduler_1", "scheduler_2"}
    for file in (adapters.COMFYUI, adapters.DIFFUSERS):
        assert (place / file).read_bytes() == (sd3 / "small/net" / file).read_bytes()
    assert set(manifest.read(place, "export")["outputs"]) >= {adapters.DIFFUSERS, adapters.COMFYUI}

    card = (place / "README.md").read_text()
    front, code = re.search(r"^---\n(.*?)---.*?```python\n(.*?)```", card, re.S).groups()
    assert "tags: [lora, flow-matching" in front
    assert str(sd3) not in card
    assert "{" not in card
    code = code.replace("path/to/this/folder", str(place))
    space = {}
    exec(code.replace("path/to/the/pipeline", str(sd3 / "pipe")), space)
    assert space["sample"].size == (16, 16)
    loaded = student(name, sd3, "small")
    loaded.pipe.scheduler = space["pipe"].scheduler
    one, two = (sampled(pipe, name) for pipe in (space["pipe"], loaded.pipe))
    assert torch.allclose(one, two, atol=2e-5 * float(two.abs().max()))
    plain = open_pipeline(sd3 / "pipe", "teacher")
    plain.scheduler = space["pipe"].scheduler
    assert float((sampled(plain, name) - two).abs().max()) > 1e-3, "the adapter changes nothing"

    with pytest.raises(
        UserError, match="is an adapter alone: sample it with the code of its README"
    ):
        sample(str(place), 1, tmp_path, 1, 0)
    run(reflow, *reflow_words(name, sd3, "merged", "fit.steps=1", "lora.merge=true"))
    with pytest.raises(UserError, match="adapter=true: student=.*merged has the whole network"):
        run(export, *base, f"student={sd3}/merged", f"run_dir={tmp_path}/no")
    with pytest.raises(UserError, match="adapter: for a student that reads prompts; set prompts"):
        run(export, f"student={sd3}/small", "adapter=true", f"run_dir={tmp_path}/no")
