"""Pipelines that read prompts through stages two and three: pairs, their bytes, and reflow on them."""

import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig
from flowmatch.export import text_export
from flowmatch.flow import noise
from flowmatch.models import own_run, text
from flowmatch.models.config import CallConfig
from flowmatch.models.pipeline import open_pipeline
from flowmatch.models.watch import run as run_pipeline
from flowmatch.pairs import matching
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.training import loop
from pipelines import encode_prompts, generate_pairs, reflow
from tests import forked
from tests.stages import run
from tests.tiny import TINY

PROMPTS = ["a cat", "a red fox in snow", "two houses", "rain at night", "an old man"]


def call_of(name):
    return {key: value for key, value in TINY[name].call.items() if key != "output_type"}


def words(name, folder, *more):
    """Words that all stages share: the pipeline's call, and its prompts."""
    listed = [f"call.{key}={json.dumps(value)}" for key, value in call_of(name).items()]
    return [f"prompts={folder}/prompts.txt", *listed, *more]


@pytest.fixture(scope="module", params=["StableDiffusion3Pipeline", "StableDiffusionPipeline"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    TINY[request.param].build().save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run(generate_pairs, *pair_words(request.param, folder))
    return request.param, folder


def pair_words(name, folder, place="pairs", *more):
    sizes = ["shards=2", "shard_size=6", "block=4", "compute_batch=4", "dtype=float32"]
    return words(name, folder, f"teacher={folder}/pipe", f"run_dir={folder}/{place}", *sizes, *more)


def test_pairs_are_the_pipelines_own_run(made):
    """The samples of a stock call with our noise and prompts, batch by batch; guidance included."""
    name, folder = made
    data = PairData(folder / "pairs")
    batch = data.batch(np.arange(12))
    numbers = noise.labels(0, range(12), len(PROMPTS))
    assert batch["label"].tolist() == numbers.tolist()
    assert batch["prompt"] == [PROMPTS[i] for i in numbers]
    x0 = noise.normal(0, range(12), data.shape, noise.PAIR_NOISE)
    assert np.array_equal(batch["x0"].numpy(), x0)
    pipe = open_pipeline(folder / "pipe", "teacher")
    for begin in (0, 6):  # the first batch of each shard
        ids = range(begin, begin + 4)
        seen = run_pipeline(
            pipe, [PROMPTS[numbers[i]] for i in ids], call_of(name), torch.from_numpy(x0[list(ids)])
        )
        assert torch.equal(seen.steps[-1].after, batch["x1"][list(ids)])
    facts = data.sealed["facts"]
    assert facts["script"]["pipeline"] == name
    assert facts["call"] == call_of(name)
    assert facts["evaluations"] == 2 * call_of(name)["num_inference_steps"]
    with tarfile.open(folder / "pairs" / "pairs-000000.tar") as tar:
        first = json.load(tar.extractfile("000000-000000.prompt.json"))
    assert first == [PROMPTS[i] for i in numbers[:4]]


@pytest.mark.slow
def test_one_and_two_workers_write_the_same_bytes(made):
    name, folder = made
    module = "pipelines.generate_pairs"
    forked.run_ranks(2, [module, *pair_words(name, folder, "two", "device=cpu")], check=True)
    for file in ("pairs-000000.tar", "pairs-000001.tar"):
        assert (folder / "two" / file).read_bytes() == (folder / "pairs" / file).read_bytes()


def test_noise_that_is_not_stored_is_drawn_again(made):
    name, folder = made
    run(generate_pairs, *pair_words(name, folder, "drawn", "x0=drawn"))
    whole, drawn = PairData(folder / "pairs"), PairData(folder / "drawn")
    ids = np.random.default_rng(0).permutation(12)
    one, other = whole.batch(ids), drawn.batch(ids)
    assert all(torch.equal(one[key], other[key]) for key in ("x0", "x1", "label"))
    assert other["prompt"] == one["prompt"]
    assert drawn.layout.tar_bytes <= whole.layout.tar_bytes


def test_reflow_trains_in_the_pipelines_own_terms(made, monkeypatch, capsys):
    """The student's velocity at the start, by hand in the terms of its class; then five updates.

    They are at the times of one and two steps: t = 0 and 1/2, or the trailing timesteps of DDIM. The
    loss sees the pictures that the pipeline's VAE decodes.
    """
    name, folder = made
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    teacher = text.load(folder / "pipe", "start", listed, call)
    v = teacher.field(teacher.net)(teacher.net)
    x, ids = torch.randn(2, *teacher.shape), torch.tensor([1, 3])
    t = torch.tensor([0.25, 0.5])
    arguments = teacher.conditions().rows(ids)
    with torch.no_grad():
        ours = v(x, t, {"label": ids})
        if teacher.script.kind == "flow":
            out = teacher.net(hidden_states=x, timestep=1000 * (1 - t), **arguments)[0]
            assert torch.equal(ours, -out)
        else:
            size = (t**2 + (1 - t) ** 2).sqrt()
            a, s = (t / size)[:, None, None, None], ((1 - t) / size)[:, None, None, None]
            y = (a + s) * x
            steps = teacher.student_schedule().timestep(t)
            out = teacher.net(sample=y, timestep=steps, **arguments)[0]
            data, fresh = a * y - s * out, s * y + a * out
            assert torch.allclose(ours, data - fresh, atol=1e-5)
    fit, seen = ["fit.steps=5", "fit.batch_size=4", "fit.log_every=1", "for_steps=[1,2]"], []

    def watched(*values, inner=loop.draw, **more):
        seen.append(inner(*values, **more))
        return seen[-1]

    monkeypatch.setattr(loop, "draw", watched)
    run(
        reflow,
        *words(name, folder, f"start={folder}/pipe", f"pairs={folder}/pairs"),
        f"run_dir={folder}/reflow",
        *fit,
        "loss={name: feature, features: random, power: 1.0}",
    )
    assert "decoded by AutoencoderKL in float32" in capsys.readouterr().out
    t = torch.cat([drawn.t for drawn in seen]).double()
    if teacher.script.kind == "flow":
        assert set(t.tolist()) == {0.0, 0.5}
    else:
        T = len(teacher.student_schedule().times)
        steps = teacher.student_schedule().timestep(t)
        assert {round(float(step), 3) for step in steps} == set(text_export.trailing(T, 2))
    sealed = manifest.read(folder / "reflow", "reflow")
    assert sealed["facts"]["for_steps"] == [1, 2]
    assert sealed["config"]["fit"]["label_drop"] == 0
    assert sealed["facts"]["form"] == ("velocity" if teacher.script.kind == "flow" else "v")
    student = text.load(folder / "reflow", "start", listed, call, pipeline=str(folder / "pipe"))
    assert student.round == 1
    changed = [
        not torch.equal(p, q)
        for p, q in zip(student.net.parameters(), teacher.net.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) // 2


def test_what_does_not_fit_is_refused(made, tmp_path):
    name, folder = made
    other = tmp_path / "prompts.txt"
    other.write_text("\n".join(["a dog", *PROMPTS]) + "\n")
    base = [f"start={folder}/pipe", f"pairs={folder}/pairs", f"run_dir={tmp_path}/reflow"]
    base += ["fit.steps=1", "fit.batch_size=4"]
    calls = words(name, folder)[1:]
    for more, message in [
        (
            [f"prompts={other}", *calls],
            "made with 5 prompts, which are not the first ones of prompts=",
        ),
        (
            [],
            "has prompts; set prompts= to their list and start= to a pipeline|pipeline of",
        ),
        ([f"prompts={folder}/prompts.txt", "call.hight=3"], "call.hight: unknown argument"),
        (
            [f"prompts={folder}/prompts.txt", f"start={tmp_path}"],
            "is no pipeline with a text encoder; leave prompts out",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            run(reflow, *base, *more)
    for more, message in [
        (["guidance=2"], "guidance: not with prompts and solver.name=own"),
        (["solver=own"], None),
    ]:
        if message:
            with pytest.raises(UserError, match=message):
                run(generate_pairs, *pair_words(name, folder, "wrong", *more))
    with pytest.raises(UserError, match="call: for a pipeline that reads text; set prompts"):
        run(generate_pairs, *pair_words(name, folder, "wrong")[1:])
    longer = tmp_path / "longer.txt"
    longer.write_text("fox " * 400 + "\n")
    with pytest.raises(UserError, match="prompt 1 has .* tokens, of which .* are kept"):
        run(generate_pairs, *pair_words(name, folder, "wrong"), f"prompts={longer}")


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_pipeline_whose_files_lack_weights_is_refused(made, tmp_path, part):
    """Their libraries draw them at random, or leave them out."""
    _, folder = made
    shutil.copytree(folder / "pipe", tmp_path / "pipe")
    (file,) = (tmp_path / "pipe" / part).glob("*.safetensors")
    weights = load_file(file)
    lost = max(name for name in weights if name.endswith("weight"))
    save_file({n: w for n, w in weights.items() if n != lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"its files lack weights: {part}: .*{lost[-20:]}$"):
        open_pipeline(tmp_path / "pipe", "teacher")


def test_a_list_that_grew_at_its_end_serves_the_pairs_of_before(made, tmp_path):
    name, folder = made
    longer = tmp_path / "prompts.txt"
    longer.write_text("\n".join([*PROMPTS, "a dog"]) + "\n")
    listed, call = PromptsConfig(path=str(longer)), CallConfig(**call_of(name))
    start = text.load(folder / "pipe", "start", listed, call)
    matching.check_match(start, [PairData(folder / "pairs")])


def encode_words(name, folder, place, *more):
    sizes = ["shard_size=4", "batch_size=2"]
    return words(name, folder, f"teacher={folder}/pipe", f"run_dir={folder}/{place}", *sizes, *more)


def test_stored_conditions_are_the_encoded_ones(made):
    """Row by row, in any order and for the null prompt; and two workers write the same bytes."""
    name, folder = made
    run(encode_prompts, *encode_words(name, folder, "rows"))
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    live = text.load(folder / "pipe", "start", listed, call).conditions()
    start = text.load(folder / "pipe", "start", listed, call, rows=f"{folder}/rows")
    stored = start.conditions()
    assert start.pipe.text_encoder is None
    ids = torch.tensor([5, 0, 3, 3])  # 5 is the null prompt
    assert_close(stored.rows(ids), live.rows(ids))
    fit = ["fit.steps=3", "fit.batch_size=4", "fit.log_every=1"]
    base = words(name, folder, f"start={folder}/pipe", f"pairs={folder}/pairs", *fit)
    run(reflow, *base, f"run_dir={folder}/live")
    run(reflow, *base, f"run_dir={folder}/stored", f"conditions={folder}/rows")
    losses = [
        [json.loads(line)["loss"] for line in (folder / place / "metrics.jsonl").open()]
        for place in ("live", "stored")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    seals = [manifest.read(folder / place, "start")["inputs"] for place in ("live", "stored")]
    assert seals[0] == seals[1]  # conditions is a key of how it runs: it may change on the way
    run(reflow, *base, f"run_dir={folder}/live", f"conditions={folder}/rows")
    other = open_pipeline(folder / "pipe", "start")
    with torch.no_grad():
        next(getattr(other, start.script.network).parameters()).add_(1)
    other.save_pretrained(folder / "other")
    more = text.load(folder / "other", "start", listed, call, rows=f"{folder}/rows")
    assert more.digest != start.digest


def assert_close(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.allclose(ours, theirs, atol=1e-5)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_close(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    else:
        assert ours == theirs


@pytest.mark.slow
def test_two_workers_encode_the_same_bytes(made):
    name, folder = made
    run(encode_prompts, *encode_words(name, folder, "one"))
    module = "pipelines.encode_prompts"
    forked.run_ranks(2, [module, *encode_words(name, folder, "both", "device=cpu")], check=True)
    files = sorted(p.name for p in (folder / "one").glob("*.safetensors"))
    assert len(files) == 3
    for file in [*files, "manifest.json"]:
        assert (folder / "one" / file).read_bytes() == (folder / "both" / file).read_bytes()


def test_a_file_of_rows_that_is_not_what_was_written_is_made_again(made, capsys):
    """Where a run was stopped: its files are hashed when they are written."""
    name, folder = made
    run(encode_prompts, *encode_words(name, folder, "again"))
    place = folder / "again"
    whole = {path.name: path.read_bytes() for path in place.glob("[!.]*")}
    first, second = (rows := sorted(place.glob("rows-*.safetensors")))[:2]
    for harm in (lambda: first.write_bytes(second.read_bytes()), second.unlink):
        (place / "manifest.json").unlink()
        harm()
        capsys.readouterr()
        run(encode_prompts, *encode_words(name, folder, "again"))
        assert (
            f"resumes: {len(rows) - 1} of {len(rows)} files made before" in capsys.readouterr().out
        )
        assert {path.name: path.read_bytes() for path in place.glob("[!.]*")} == whole


@pytest.mark.slow
def test_workers_of_their_own_share_the_files(made):
    """Two that know nothing of each other: each file is made once, and both end with it sealed."""
    name, folder = made
    argv = ["pipelines.encode_prompts", *encode_words(name, folder, "shared", "shard_size=1")]
    workers = [forked.Popen(argv, stdout=subprocess.PIPE) for _ in range(2)]
    told = [worker.communicate()[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    made_by = [[line for line in lines if line.endswith("of 6 files")] for lines in told]
    assert len({*made_by[0], *made_by[1]}) == len(made_by[0]) + len(made_by[1]) == 6


def test_stored_conditions_of_something_else_are_refused(made, tmp_path):
    name, folder = made
    run(encode_prompts, *encode_words(name, folder, "rows"))
    other = tmp_path / "prompts.txt"
    other.write_text("a dog\n")
    base = [f"start={folder}/pipe", f"pairs={folder}/pairs", f"run_dir={tmp_path}/reflow"]
    base += ["fit.steps=1", "fit.batch_size=4", f"conditions={folder}/rows"]
    with pytest.raises(UserError, match="rows was made with prompts .* here it is"):
        run(reflow, *words(name, folder, *base), f"prompts={other}")


def test_our_solvers_follow_the_velocity_that_was_learnt(made):
    """Euler on the pipeline's own grid is its own run; a guided velocity is that of guided calls."""
    name, folder = made
    solver = "solver={name: euler, steps: 3}"
    if name != "StableDiffusion3Pipeline":
        with pytest.raises(UserError, match="predicts epsilon; use solver.name=own, its own run"):
            run(generate_pairs, *pair_words(name, folder, "wrong", solver))
        return
    guided = call_of(name)
    for w in (1.0, 3.0):
        call = guided | {"guidance_scale": w}
        pipe = open_pipeline(folder / "pipe", "teacher")
        x0 = torch.from_numpy(noise.normal(0, range(4), (4, 8, 8), noise.PAIR_NOISE))
        numbers = noise.labels(0, range(4), len(PROMPTS))
        seen = run_pipeline(pipe, [PROMPTS[i] for i in numbers], call, x0)
        points = [round(1 - step.sigma, 9) for step in seen.steps] + [1.0]
        grid = f"{{name: euler, grid: list, points: {points}, steps: {len(points) - 1}}}"
        listed = [f"call.{key}={json.dumps(value)}" for key, value in call.items()]
        place = f"solved {w:g}"
        more = [f"solver={grid}", f"guidance={w}", *listed]
        run(generate_pairs, *pair_words(name, folder, place, *more))
        batch = PairData(folder / place).batch([0, 1, 2, 3])
        assert torch.allclose(batch["x1"], seen.steps[-1].after, atol=2e-4)
        assert PairData(folder / place).sealed["facts"]["evaluations"] == 3 * (1 if w == 1 else 2)


def test_a_student_teaches_a_second_round_by_our_solvers_alone(made):
    """Its own run would guide it a second time; one Euler step is its velocity at the noise."""
    name, folder = made
    fit = ["fit.steps=2", "fit.batch_size=4", "fit.label_drop=0"]
    base = words(name, folder, f"start={folder}/pipe", f"pairs={folder}/pairs", *fit)
    run(reflow, *base, f"run_dir={folder}/student")
    second = [f"teacher={folder}/student", f"pipeline={folder}/pipe"]
    with pytest.raises(UserError, match="is a student, with guidance in it.*name a solver"):
        run(generate_pairs, *pair_words(name, folder, "second", *second))
    run(
        generate_pairs,
        *pair_words(name, folder, "second", *second, "solver={name: euler, steps: 1}"),
    )
    data = PairData(folder / "second")
    assert data.sealed["facts"]["round"] == 1
    batch = data.batch([0, 1, 2, 3])
    listed, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    student = text.load(folder / "student", "start", listed, call, pipeline=str(folder / "pipe"))
    v = student.field(student.net)(student.net)
    with torch.no_grad():
        ours = batch["x0"] + v(batch["x0"], 0.0, {"label": batch["label"]})
    assert torch.allclose(batch["x1"], ours, atol=1e-4)


def test_states_of_the_own_run_lie_on_the_way_from_noise_to_data(made):
    """A scheduler's state is a x1 + s x0: of a flow x_t itself, of a diffusion x_t times a + s."""
    name, folder = made
    prompts, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    teacher = text.load(folder / "pipe", "teacher", prompts, call)
    times = own_run.times_of(teacher.pipe, teacher.script, teacher.call, PROMPTS)
    assert len(times) == call_of(name)["num_inference_steps"] - 1
    run(generate_pairs, *pair_words(name, folder, "paths", f"states=[{times[-1]:.4f}]"))
    data, plain = PairData(folder / "paths", states=True), PairData(folder / "pairs")
    batch = data.batch(np.arange(12))
    assert data.times == times[-1:]
    assert torch.equal(batch["x1"], plain.batch(np.arange(12))["x1"])
    seen = run_pipeline(teacher.pipe, batch["prompt"][:4], call_of(name), batch["x0"][:4])
    before, t = seen.steps[-1], times[-1]
    factor = 1.0
    if teacher.script.kind != "flow":
        product = teacher.pipe.scheduler.alphas_cumprod[int(before.timestep)]
        a, s = product.sqrt(), (1 - product).sqrt()
        factor = float(1 / (a + s))
        predicted = (before.sample - s * before.output) / a  # DDIM, Song et al. 2021, eq. 12
        line = (1 - t) * before.output + t * predicted
        assert torch.allclose(batch["xt"][:4, 0], line, atol=1e-5)
    assert torch.allclose(batch["xt"][:4, 0], factor * before.sample, atol=1e-6)
    with pytest.raises(
        UserError, match=r"states: 0\.0123 is no time of solver\.name=own; its times"
    ):
        run(generate_pairs, *pair_words(name, folder, "wrong", "states=[0.0123]"))
