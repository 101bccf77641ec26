"""The finish of pipelines that read prompts: their velocities, resumed, on two ranks, refused."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig
from flowmatch.flow import dmd
from flowmatch.models import networks, text
from flowmatch.models.config import CallConfig
from flowmatch.pairs import matching
from flowmatch.runs import manifest
from flowmatch.training import finishing, score_critic
from flowmatch.training.config import FitConfig
from pipelines import evaluate_prompts, export, finish, reflow
from tests import ranks
from tests.pipelines.test_adapters import make
from tests.pipelines.test_text import PROMPTS, call_of, words
from tests.stages import run

NAMES = ["StableDiffusion3Pipeline", "StableDiffusionPipeline"]
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
    return words(
        name, folder, *place, f"{'teacher' if dmd_ else 'pipeline'}={folder}/pipe", *FIT, *more
    )


def opened(name, folder, place="pipe", key="teacher"):
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    more = {} if place == "pipe" else {"pipeline": f"{folder}/pipe"}
    return text.load(folder / place, key, listed, call, rows=f"{folder}/rows", **more)


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


def test_an_update_by_scores_is_that_of_the_pipelines_own_terms(made):
    """The direction of the samples, guided; then an update of the second velocity, with its own loss."""
    name, folder = made
    teacher = opened(name, folder)
    networks_ = score_critic.Apart(teacher, 3.0)
    fit = FitConfig(steps=1, batch_size=4, lr=0.01)
    critic = score_critic.Scores(networks_, 1, fit)
    local = SimpleNamespace(
        device=torch.device("cpu"), autocast=nullcontext, reduce=lambda x, kind: x
    )
    critic.begin(local, None, [(0.0,)], {})
    torch.manual_seed(0)
    x, noise = torch.randn(4, *teacher.shape), torch.randn(4, 2, *teacher.shape)
    ids, u = torch.tensor([0, 3, 1, 3]), torch.tensor([0.0, 0.3, 0.6, 0.9])
    seen = finishing.Seen((0.0,), noise, u, {"label": ids})
    found = critic.errors(x, seen, 0)

    net, null = copy.deepcopy(teacher.net), torch.full((4,), len(PROMPTS))
    t = networks_.teacher.spread(dmd.times(u))
    assert len(set(t.tolist())) == 4
    y = (1 - t.float())[:, None, None, None] * noise[:, 0] + t.float()[:, None, None, None] * x
    with torch.no_grad():
        (plain, _), (without, _) = (by_hand(teacher, net, y, t, each) for each in (ids, null))
    real = without + 3 * (plain - without)
    ascent = (plain - real) / (x - real).abs().flatten(1).mean(1)[:, None, None, None]
    expected = ascent.square().flatten(1).sum(1) / (2 * x[0].numel() ** 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    assert critic.learn((0.0,))
    t = networks_.teacher.spread(dmd.times((u + score_critic.GOLDEN) % 1))
    y = (1 - t.float())[:, None, None, None] * noise[:, 1] + t.float()[:, None, None, None] * x
    _, out = by_hand(teacher, net, y, t, ids)
    target = x - noise[:, 1] if teacher.script.kind == "flow" else noise[:, 1]
    (out - target).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), fit.max_grad_norm)
    torch.optim.AdamW(net.parameters(), 0.01, (fit.beta1, fit.beta2), weight_decay=0).step()
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


def train(name, folder, place, world, *more, codes=None, **environment):
    """Run the stage on some ranks, to its end."""
    argv = [*finish_words(name, folder, f"run_dir={place}", "fit.steps=4", *DMD), *more]
    log = Path(f"{place}.log")
    started = ranks.start(world, [*argv, "device=cpu"], log, "finish", **environment)
    for rank in started:
        rank.join(120)
    assert [rank.exitcode for rank in started] == (codes or [0] * world), log.read_text()
    return None if codes else networks.load(place / "net", "net").state_dict()


@pytest.mark.slow
def test_killed_on_two_ranks_and_in_bf16_it_is_the_same_student(made, tmp_path):
    name, folder = made
    saved = ["fit.save_every=2", "fit.micro_batch=2", "fit.lr=0.001"]
    one = train(name, folder, tmp_path / "one", 1, *saved)
    train(name, folder, tmp_path / "cut", 1, *saved, codes=[-9], FAULT="kill:0:3")
    train(name, folder, tmp_path / "cut", 1, *saved)
    for file in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    two = train(name, folder, tmp_path / "two", 2, *saved)
    half = train(name, folder, tmp_path / "half", 1, *saved, "fit.precision=bf16")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(half[key], value, atol=1e-2, rtol=0)


@pytest.mark.slow
def test_its_result_is_evaluated_and_exported(made):
    name, folder = made
    more = [f"run_dir={folder}/kernel", "fit.steps=2", "method={name: kernel, window: 16}"]
    run(finish, *finish_words(name, folder, *more, "features=[values]", "for_steps=[1,2]"))
    (folder / "others.txt").write_text("a dog\na red car\n")
    held = [f"prompts={{path: {folder}/prompts.txt, held_out: {folder}/others.txt}}"]
    base = [*words(name, folder)[1:], f"student={folder}/kernel", "steps=[1,2]"]
    scored = [*held, f"teacher={folder}/pipe", "samples=4", "per_prompt=2", "compute_batch=4"]
    run(evaluate_prompts, *base, *scored, f"run_dir={folder}/scores")
    assert json.loads((folder / "scores/metrics.json").read_text())
    listed = [f"prompts={folder}/prompts.txt", f"pipeline={folder}/pipe"]
    run(export, *base, *listed, f"run_dir={folder}/export")
    assert (folder / "export/model_index.json").is_file()
