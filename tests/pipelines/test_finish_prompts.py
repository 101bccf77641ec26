"""The finish of pipelines that read prompts: their velocities, resumed, on two ranks, refused."""

import copy
import gc
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowmatch.config import UserError
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig, PromptsConfig
from flowmatch.flow import dmd, path
from flowmatch.models import adapters, text
from flowmatch.models.config import CallConfig
from flowmatch.models.pipeline import open_pipeline
from flowmatch.pairs import matching
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.training import feature_critic, finishing, rehearsal, score_critic
from flowmatch.training.config import FitConfig
from pipelines import evaluate_prompts, export, finish, reflow
from tests import ranks
from tests.pipelines.test_adapters import make
from tests.pipelines.test_text import PROMPTS, call_of, words
from tests.stages import run

NAMES = ["StableDiffusion3Pipeline"]
NAMES += [pytest.param("StableDiffusionPipeline", marks=pytest.mark.slow)]  # predicts noise
FIT = ["fit.batch_size=4", "fit.log_every=1", "fit.warmup=0", "fit.lr=0.01"]
DMD = ["method={name: dmd, guidance: 2, fake_updates: 2, fake_lr: 0.01, moments: 0.5, window: 16}"]
DMD += ["features=[values,random]", "for_steps=[1,2]"]


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    """A pipeline, its guided pairs, and a reflow of them."""
    name, folder = request.param, make(request.param, tmp_path_factory.mktemp("finish"))
    place = [f"run_dir={folder}/reflow", f"start={folder}/pipe", f"pairs={folder}/pairs"]
    rows = f"conditions={folder}/rows"
    run(reflow, *words(name, folder, *place, rows, *FIT, "fit.steps=2", "for_steps=[1,2]"))
    return name, folder


def finish_words(name, folder, *more):
    place = [f"start={folder}/reflow", f"pairs={folder}/pairs", f"conditions={folder}/rows"]
    dmd_ = any("name: dmd" in word for word in more)
    place += [f"{'teacher' if dmd_ else 'pipeline'}={folder}/pipe", "method.name=moments"]
    return words(name, folder, *place, *FIT, *more)


def opened(name, folder, place="pipe", key="teacher", rows=True):
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    more = {} if place == "pipe" else {"pipeline": f"{folder}/pipe"}
    more |= {"rows": f"{folder}/rows"} if rows else {}
    return text.load(folder / place, key, listed, call, **more)


def by_hand(teacher, net, y, t, ids):
    """The data that a network of the pipeline's class predicts of y, and its own output (v or noise)."""
    arguments = teacher.conditions().rows(ids)
    if teacher.script.kind == "flow":
        v = -net(hidden_states=y, timestep=1000 * (1 - t), **arguments)[0]
        return y + (1 - t[:, None, None, None]) * v, v
    products = teacher.pipe.scheduler.alphas_cumprod
    ratio = (products / (1 - products)).sqrt()  # a / s = t / (1 - t)
    step = (ratio[None] - (t / (1 - t))[:, None]).abs().argmin(1)
    assert torch.allclose(ratio[step], (t / (1 - t)).float(), rtol=1e-5), "a time between timesteps"
    a, s = (p[step].sqrt()[:, None, None, None] for p in (products, 1 - products))
    z = (a + s) * y
    noise = net(sample=z, timestep=step, **arguments)[0]
    return (z - s * noise) / a, noise


def critic_of(networks_):
    """The critic of one process, begun."""
    fit = FitConfig(steps=1, batch_size=4, lr=0.01)
    local = {"device": torch.device("cpu"), "autocast": nullcontext, "reduce": lambda x, kind: x}
    critic = score_critic.Scores(networks_, 1, fit)
    critic.begin(SimpleNamespace(**local), None, [(0.0,)], {})
    return critic


def seen_of(teacher):
    """Samples' prompts, and random numbers of an update."""
    torch.manual_seed(0)
    noise = torch.randn(4, 2, *teacher.shape)
    ids, u = torch.tensor([0, 3, 1, 3]), torch.tensor([0.0, 0.3, 0.6, 0.9])
    return finishing.Seen((0.0,), noise, u, {"label": ids})


def test_an_update_by_scores_is_that_of_the_pipelines_own_terms(made):
    """The direction of the samples, guided; then an update of the second velocity, with its own loss."""
    name, folder = made
    teacher = opened(name, folder)
    critic, seen = critic_of(score_critic.Apart(teacher, 3.0)), seen_of(teacher)
    x, noise, ids, u = torch.randn(4, *teacher.shape), seen.noise, seen.cond["label"], seen.u
    found, spread = critic.errors(x, seen, 0), critic.networks.teacher.spread

    net, null = copy.deepcopy(teacher.net), torch.full((4,), len(PROMPTS))
    t = spread(dmd.times(u))
    assert len(set(t.tolist())) == 4
    y = (1 - t.float())[:, None, None, None] * noise[:, 0] + t.float()[:, None, None, None] * x
    with torch.no_grad():
        (plain, _), (without, _) = (by_hand(teacher, net, y, t, each) for each in (ids, null))
    real = without + 3 * (plain - without)
    ascent = (plain - real) / (x - real).abs().flatten(1).mean(1)[:, None, None, None]
    expected = ascent.square().flatten(1).sum(1) / (2 * x[0].numel() ** 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    assert critic.learn((0.0,))
    t = spread(dmd.times((u + score_critic.GOLDEN) % 1))
    y = (1 - t.float())[:, None, None, None] * noise[:, 1] + t.float()[:, None, None, None] * x
    _, out = by_hand(teacher, net, y, t, ids)
    target = x - noise[:, 1] if teacher.script.kind == "flow" else noise[:, 1]
    (out - target).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), critic.config.max_grad_norm)
    torch.optim.AdamW(net.parameters(), 0.01, (0.9, 0.99), weight_decay=0).step()
    for ours, theirs in zip(critic.parameters, net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    moved = max(
        (a - b).abs().max()
        for a, b in zip(critic.parameters, teacher.net.parameters(), strict=True)
    )
    assert moved > 5e-3


def test_a_finish_reads_prompts_and_makes_a_student_of_the_pipeline(made, capsys):
    name, folder = made
    run(finish, *finish_words(name, folder, f"run_dir={folder}/finish", "fit.steps=4", *DMD))
    out = capsys.readouterr().out
    assert "12 pairs of [4, 8, 8] in 1 set, with prompts" in out
    assert "pipe, guided by 2, and a copy that learns; 0.5 times beside stored x1: moments" in out
    sealed, before = (manifest.read(folder / place, "student") for place in ("finish", "reflow"))
    assert set(sealed["inputs"]) == {
        *("start", "teacher", "prompts", "pairs.0", "features.0", "features.1")
    }
    for key in ("script", "call", "prompts", "form", "for_steps", "round"):
        assert sealed["facts"][key] == before["facts"][key]
    student, start = (opened(name, folder, place, "student") for place in ("finish", "reflow"))
    assert student.round == 1
    assert "values" in student.features
    moved = [
        not torch.equal(p, q)
        for p, q in zip(student.net.parameters(), start.net.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) // 2


@pytest.mark.slow
def test_features_of_pictures_are_those_that_the_pipeline_decodes(made, tmp_path, capsys):
    """The targets are moments of decoded x1, or of real pictures; samples have a gradient through it."""
    name, folder = made
    rng = np.random.default_rng(0)
    np.save(tmp_path / "real.npy", rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))
    listed = DataConfig(source="npz", path=f"{tmp_path}/real.npy")
    more = ["method={name: moments, window: 16}", "features=[values,random]", "decode=true"]
    base = [w for w in finish_words(name, folder, *more, "fit.steps=2") if "conditions=" not in w]
    real = f"data={{source: npz, path: {tmp_path}/real.npy}}"
    kept = []

    def begin(self, *parts, inner=feature_critic.Features.begin):
        inner(self, *parts)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_critic.Features, "begin", begin)
        run(finish, *base, f"run_dir={tmp_path}/stored")
        run(finish, *base, f"run_dir={tmp_path}/real", real)
    assert (
        "features see pictures of [3, 16, 16], decoded by AutoencoderKL" in capsys.readouterr().out
    )
    pipe = opened(name, folder, rows=False).pipe
    x1 = PairData(folder / "pairs").batch(np.arange(12))["x1"]
    factors = pipe.vae.config
    z = x1 / factors.scaling_factor + (factors.get("shift_factor") or 0)
    with torch.no_grad():
        decoded = pipe.vae.decode(z).sample
    pictures = {"stored": decoded, "real": dataset.load(listed).batch(np.arange(20))["x1"]}
    for critic, shown in zip(kept, pictures.values(), strict=True):
        (matchers, *_) = critic.matchers.values()
        for key, matcher in matchers.items():
            f = critic.modules[key](shown).flatten(1).double()
            torch.testing.assert_close(matcher.target, f.mean(0), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="decode=true: the samples are no latents, or conditions="):
        run(finish, *base, f"conditions={folder}/rows", f"run_dir={tmp_path}/no")


def test_what_a_finish_with_prompts_cannot_do_is_refused(made, tmp_path):
    name, folder = made
    base = [*finish_words(name, folder, f"run_dir={tmp_path}/no", "fit.steps=1")]
    shared, own = [w for w in base if not w.startswith("pipeline=")], "method.name=dmd"
    for words_, fault in [
        (
            [w for w in base if not w.startswith("prompts=")],
            "has prompts; set prompts= to their list",
        ),
        (
            [*shared, own, f"teacher={folder}/pipe"],
            "method.guidance: .* are the guided run of a",
        ),
        (
            [*base, own, "method.guidance=2", f"teacher={folder}/reflow"],
            "is of round 1: after a reflow noise and data belong together",
        ),
        (
            [*base, own, "method.guidance=2", f"teacher={folder}/pipe", f"pipeline={tmp_path}"],
            "with method.name=dmd it is that of teacher=",
        ),
        ([*shared, f"start={folder}/reflow"], "is a run folder; set pipeline="),
        ([*base, "method.guidance=2"], "guidance belongs to name=dmd"),
        ([*base, "for_steps=[4]"], "is for 1 and 2 steps only"),
    ]:
        with pytest.raises(UserError, match=fault):
            run(finish, *words_)
    if name == "StableDiffusionPipeline":
        with pytest.raises(UserError, match="is a diffusion model; reflow it first"):
            run(finish, *shared, f"start={folder}/pipe")


def test_guidance_is_that_of_the_solver_of_the_pairs():
    def set_of(name, guidance, **facts):
        made = {"config": {"solver": {"name": name}, "guidance": guidance}, "facts": facts}
        told = {"key": f"pairs.{name}", "folder": "pairs", "has_prompts": "script" in facts}
        return SimpleNamespace(sealed=made, **told)

    def guidance_of(*sets, asked=None):
        teacher = SimpleNamespace(net=None, own_velocity=lambda net, w: None)
        return matching.guidance_of([*sets], teacher, asked)

    assert guidance_of(set_of("ab2", 3.0), set_of("rk4", 3.0)) == 3
    script = {"steps": 4}
    single = set_of("own", 1.0, script=script, evaluations=4, round=0)
    guided = set_of("own", 1.0, script=script, evaluations=8, round=0)
    assert guidance_of(single, set_of("ab2", 1.0, script=script, round=0)) == 1
    assert guidance_of(guided, asked=5.0) == 5
    with pytest.raises(UserError, match="with 3, pairs.rk4=pairs with 2; set it"):
        guidance_of(set_of("ab2", 3.0), set_of("rk4", 2.0))
    with pytest.raises(UserError, match="are of a student, or of another"):
        guidance_of(set_of("ab2", 1.0, script=script, round=1))


@pytest.fixture(scope="module")
def adapted_run(made):
    """An adapter that reflow has trained."""
    name, folder = made
    more = ["fit.steps=4", "for_steps=[1,2]", f"run_dir={folder}/adapter", "lora.dropout=0.3"]
    place = [f"start={folder}/pipe", f"pairs={folder}/pairs", f"conditions={folder}/rows"]
    run(reflow, *words(name, folder, *place, *FIT, "lora={rank: 3, alpha: 6}", *more))
    return name, folder


def gradients(critic, student, field, seen):
    """Errors of samples; gradients of the student, and of the second velocity after it, by name."""
    x = torch.randn(4, *seen.noise.shape[2:], generator=torch.Generator().manual_seed(1))
    t = torch.zeros(4, dtype=torch.float64)
    student.train()
    with adapters.exchanged(student, {}):  # without dropout
        found = critic.errors(path.data_prediction(x, field(x, t, seen.cond), t), seen, 0)
    assert student.training
    found.mean().backward()
    own = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    later = {}

    def step(finite):
        later.update((n, p.grad) for n, p in critic.named.items() if p.grad is not None)
        return finite

    critic._step = step
    critic.learn((0.0,))
    return found.detach(), own, later


def test_the_update_of_an_adapter_is_that_of_three_networks_with_one_in_memory(adapted_run):
    """Errors are equal; gradients are those of whole weights W, times the factors: dB = c dW A'."""
    name, folder = adapted_run
    more = ["fit.steps=1", "features=[values]"]
    config, _ = ranks.command.load(finish.FinishConfig, adapter_words(name, folder, "no", *more))
    before = {id(p) for p in gc.get_objects() if isinstance(p, torch.nn.Parameter)}
    plan = finish.plan(config)
    net = plan.start.net
    critic = critic_of(score_critic.Shared(plan.teacher, 3.0, 1))
    seen = seen_of(plan.teacher)
    ours = gradients(critic, net, plan.start.field(net)(net), seen)
    kinds = [
        p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter) and id(p) not in before
    ]
    sizes = [sum(p.numel() for p in ps) for ps in (kinds, net.parameters(), critic.parameters)]
    assert sizes[1] <= sizes[0] <= sizes[1] + 2 * sizes[2], "one copy of the frozen weights"
    assert plan.start.net is plan.teacher.net

    teacher = opened(name, folder)
    whole = opened(name, folder, "adapter", "start")
    apart = critic_of(score_critic.Apart(teacher, 3.0))
    theirs = gradients(apart, whole.net, whole.field(whole.net)(whole.net), seen)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    tensors = dict(net.named_parameters()), critic.named
    for small, large, found in zip(ours[1:], theirs[1:], tensors, strict=True):
        assert small
        assert all(".lora_" in key for key in small)
        for key, grad in small.items():
            layer, down = key.partition(".lora_")[0], ".lora_A." in key
            other = found[
                key.replace(".lora_A.", ".lora_B.") if down else key.replace(".lora_B.", ".lora_A.")
            ]
            dw = large[f"{layer}.weight"]
            expected = 2 * (other.T @ dw if down else dw @ other.T)
            torch.testing.assert_close(grad, expected.detach(), rtol=1e-3, atol=1e-5)
    assert any(float(g.abs().max()) > 1e-3 for g in ours[1].values())


def adapter_words(name, folder, place, *more):
    base = finish_words(name, folder, *DMD, f"run_dir={folder}/{place}", *more)
    return [w for w in base if not w.startswith("start=")] + [f"start={folder}/adapter"]


def test_an_adapter_goes_on_as_an_adapter(adapted_run, capsys):
    """What is saved, and that the stock class reads it; two updates change both factors."""
    name, folder = adapted_run
    run(finish, *adapter_words(name, folder, "on", "fit.steps=4"))
    assert "and a second adapter of its network that learns" in capsys.readouterr().out
    net, checkpoint = folder / "on/net", folder / "on/checkpoints/step_00000004"
    assert sorted(p.name for p in net.iterdir()) == [adapters.COMFYUI, adapters.DIFFUSERS]
    for part in ("net", "diffusion_pytorch_model", "optimizer"):
        assert all(".lora_" in key for key in load_file(checkpoint / f"{part}.safetensors"))
    learnt = load_file(checkpoint / "learner.safetensors")
    fake = {key: t for key, t in learnt.items() if "/fake/" in key}
    assert fake
    assert all(".lora_" in key for key in fake)
    assert min(float(t.abs().max()) for key, t in fake.items() if "lora_B" in key) > 1e-3
    sealed, before = (manifest.read(folder / place, "start") for place in ("on", "adapter"))
    for key in ("base", "lora", "script", "round", "form"):
        assert sealed["facts"][key] == before["facts"][key]
    assert sealed["facts"]["net"] != before["facts"]["net"]
    one, other = (load_file(folder / run / "net" / adapters.DIFFUSERS) for run in ("on", "adapter"))
    assert all(not torch.equal(tensor, other[key]) for key, tensor in one.items())

    merged = opened(name, folder, "on", "student").net
    pipe = open_pipeline(folder / "pipe", "teacher")
    pipe.load_lora_weights(net)
    component = getattr(pipe, "unet", None) or pipe.transformer
    arguments = opened(name, folder).conditions().rows(torch.tensor([0, 1]))
    x, t = torch.randn(2, *opened(name, folder).shape), torch.tensor([500, 20])
    with torch.no_grad():
        both = [each(x, timestep=t, **arguments)[0] for each in (merged, component)]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)


def test_the_memory_of_other_networks_is_counted(adapted_run, monkeypatch):
    """Whole: a teacher, and a copy with gradients and averages; of an adapter one more adapter."""
    name, folder = adapted_run
    for words_, others in [
        (finish_words(name, folder, *DMD), lambda count, trained: 20 * count),
        (adapter_words(name, folder, "no"), lambda count, trained: 16 * trained),
    ]:
        more = ["fit.steps=1", f"run_dir={folder}/no"]
        config, _ = ranks.command.load(finish.FinishConfig, [*words_, *more])
        plan = finish.plan(config)
        net = plan.start.net
        counts = [
            sum(p.numel() for p in ps) for ps in (net.parameters(), adapters.trained(net).values())
        ]
        need = rehearsal.sizes(net, config.fit).state + others(*counts)
        monkeypatch.setattr(rehearsal, "room", lambda device, has=need - 1: has)
        with pytest.raises(
            UserError, match="of other networks.*: finish an adapter, which reflow.lora"
        ):
            plan.measure()
        monkeypatch.setattr(rehearsal, "room", lambda device, has=need: has)
        monkeypatch.setattr(rehearsal, "rehearse", lambda run, fit: rehearsal.Rehearsal(1.0, 1e9))
        kept = rehearsal.sizes(net, config.fit).checkpoint + 12 * counts[bool(plan.writer)]
        assert f"a checkpoint has {kept / 1e9:,.3g} GB" in plan.measure()[-1]


def test_adapters_that_share_no_network_are_refused(adapted_run, tmp_path):
    name, folder = adapted_run
    base, new = adapter_words(name, folder, "no", "fit.steps=1"), "lora={rank: 2}"
    other = opened(name, folder).pipe.__class__.from_pretrained(folder / "pipe")
    with torch.no_grad():
        next((getattr(other, "unet", None) or other.transformer).parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    for more, fault in [
        ([new], "adapter is trained on; leave lora out|is an adapter, which is trained on"),
        ([new, f"start={folder}/reflow"], "student and teacher share one network, and start="),
        (
            [f"teacher={tmp_path}/other", f"conditions={folder}/rows"],
            "is an adapter of another network",
        ),
        (["fit.precision=fp16"], "fit.precision='fp16'"),
    ]:
        with pytest.raises(UserError, match=fault):
            run(finish, *base, *more)
    config, _ = ranks.command.load(finish.FinishConfig, [*base, new, f"start={folder}/pipe"])
    if name == "StableDiffusion3Pipeline":  # of a noise predictor it is no student
        plan = finish.plan(config)
        assert plan.start.net is plan.teacher.net
        assert not plan.writer.whole
    else:
        with pytest.raises(UserError, match="is a diffusion model; reflow it first"):
            finish.plan(config)


def train(argv, place, world, *more, codes=None, **environment):
    """Run the stage on some ranks, to its end; return the weights or the adapter."""
    log = Path(f"{place}.log")
    words_ = [*argv, f"run_dir={place}", "fit.steps=4", "fit.save_every=2", "fit.lr=0.001", *more]
    started = ranks.start(world, [*words_, "device=cpu"], log, "finish", **environment)
    for rank in started:
        rank.join(120)
    assert [rank.exitcode for rank in started] == (codes or [0] * world), log.read_text()
    return None if codes else load_file(next((place / "net").glob("[dp]*.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize("of", ["reflow", "adapter"])
def test_killed_on_two_ranks_and_in_bf16_it_is_the_same_student(adapted_run, tmp_path, of):
    """An adapter with dropout, too; activations computed again, and a base in bfloat16."""
    name, folder = adapted_run
    base = finish_words(name, folder, *DMD, "fit.micro_batch=2")
    argv = [*base, f"start={folder}/{of}"]
    one = train(argv, tmp_path / "one", 1)
    train(argv, tmp_path / "cut", 1, codes=[-9], FAULT="kill:0:3")
    train(argv, tmp_path / "cut", 1)
    for file in [
        Path("manifest.json"),
        *(p.relative_to(tmp_path / "one") for p in tmp_path.glob("one/net/*")),
    ]:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    two = train(argv, tmp_path / "two", 2)
    half = train(argv, tmp_path / "half", 1, "fit.precision=bf16")
    again = train(argv, tmp_path / "again", 1, "fit.checkpointing=true")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(again[key], value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(half[key], value, atol=1e-2, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["reflow", "adapter"])
def test_its_result_is_evaluated_and_exported(adapted_run, of):
    name, folder = adapted_run
    more = [f"run_dir={folder}/kernel_{of}", "fit.steps=2", "method={name: kernel, window: 16}"]
    more += [f"start={folder}/{of}", "features=[values]", "for_steps=[1,2]"]
    run(finish, *finish_words(name, folder, *more))
    (folder / "others.txt").write_text("a dog\na red car\n")
    held = [f"prompts={{path: {folder}/prompts.txt, held_out: {folder}/others.txt}}"]
    base = [*words(name, folder)[1:], f"student={folder}/kernel_{of}", "steps=[1,2]"]
    scored = [*held, f"teacher={folder}/pipe", "samples=4", "per_prompt=2", "compute_batch=4"]
    run(evaluate_prompts, *base, *scored, f"run_dir={folder}/scores_{of}")
    assert json.loads((folder / f"scores_{of}/metrics.json").read_text())
    listed = [f"prompts={folder}/prompts.txt", f"pipeline={folder}/pipe"]
    run(export, *base, *listed, f"run_dir={folder}/export_{of}")
    assert (folder / f"export_{of}/model_index.json").is_file()
    if of == "adapter":
        run(export, *base, *listed, f"run_dir={folder}/export_alone", "adapter=true")
        alone = (folder / "export_alone" / adapters.DIFFUSERS).read_bytes()
        assert alone == (folder / "kernel_adapter/net" / adapters.DIFFUSERS).read_bytes()
