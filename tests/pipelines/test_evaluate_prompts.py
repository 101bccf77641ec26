"""Evaluation on prompts: closed forms of its measures, and a tiny SD3 pipeline from end to end."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from flowmatch.config import UserError
from flowmatch.evaluation import intervals, judges, prompt_rows, prompt_scoring
from flowmatch.evaluation.config import EvaluatePromptsConfig
from flowmatch.flow import noise
from flowmatch.models import networks, text
from flowmatch.models.digest import network_digest
from flowmatch.runs import manifest
from flowmatch.runs.command import load
from pipelines import evaluate_prompts
from tests.stages import run
from tests.tiny import TINY

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "white") for thing in ("fox", "cat", "bird")]


def call_words(**more):
    call = TINY["StableDiffusion3Pipeline"].call | {"guidance_scale": 1.0} | more
    return [
        f"call.{key}={json.dumps(value)}" for key, value in call.items() if key != "output_type"
    ]


def sealed(folder, net, script, **facts):
    """A run folder of reflow with this network."""
    outputs = [f"net/{file}" for file in networks.save(net, folder / "net")]
    facts = {"round": 1, "net": network_digest(net), "script": script, "form": "velocity"} | facts
    manifest.seal(folder, stage="reflow", config={}, inputs={}, outputs=outputs, **facts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline whose 3 steps are those of a uniform grid, and its own network as a student of it."""
    folder = tmp_path_factory.mktemp("prompts")
    pipe = TINY["StableDiffusion3Pipeline"].build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=1 / 3)
    pipe.save_pretrained(folder / "pipe")
    (folder / "train.txt").write_text("a blue dog\n")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    config, _ = load(EvaluatePromptsConfig, ["device=cpu", *words(folder, "none")])
    teacher = evaluate_prompts.load_teacher(config)
    script = teacher.script.entries()
    for name, terms in (("reflow", script), ("other", script | {"time": "t"}), ("plain", None)):
        sealed(folder / name, teacher.net, terms, call=teacher.call)
    return folder


def words(folder, place, *more):
    return [
        *(f"teacher={folder}/pipe", f"student={folder}/reflow", f"run_dir={folder}/{place}"),
        *(f"prompts.path={folder}/train.txt", f"prompts.held_out={folder}/prompts.txt"),
        *("samples=12", "per_prompt=2", "compute_batch=4", "steps=[1,2,3]"),
        *call_words(),
        *more,
    ]


def test_a_student_equal_to_its_teacher_has_no_error(made):
    """Its network on the teacher's own steps: error 0, diversity 1, equal pictures; bytes on repeat."""
    folder = made
    run(evaluate_prompts, *words(folder, "one"))
    result = json.loads((folder / "one" / "metrics.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "teacher",
        "teacher_2",
        "teacher_3",
        "student_1",
        "student_2",
        "student_3",
    ]
    assert [row["evaluations"] for row in rows.values()] == [3, 2, 3, 1, 2, 3]
    assert "IndexError" in result["protocol"]["not_run"]["1"]  # of this scheduler at one step
    assert rows["teacher_3"]["rms"]["value"] == 0
    student = rows["student_3"]
    assert 0 <= student["rms"]["value"] < 1e-5
    assert student["diversity"]["value"] == pytest.approx(1, abs=1e-4)
    assert student["psnr"]["value"] == pytest.approx(100, abs=1)
    assert student["ssim"]["value"] == pytest.approx(1, abs=1e-3)
    few = rows["student_1"]["rms"]
    assert 0.05 < few["low"] < few["value"] < few["high"]
    run(evaluate_prompts, *words(folder, "two"))
    for name in ("metrics.json", "table.md"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert Image.open(folder / "one" / "grid.png").size[0] > 400
    page = (folder / "one" / "report.html").read_text()
    assert page.count("<img") == 1 + 6 * 6  # the curve, six rows of six prompts
    assert "| student, 1 step | 1 |" in (folder / "one" / "table.md").read_text()


def test_the_error_is_that_of_stock_calls(made):
    """By hand: a stock run from the same noise, one Euler step of the network, and their distance."""
    result = json.loads((made / "one" / "metrics.json").read_text())
    pipe = text.open_pipeline(made / "pipe", "teacher")
    scheduler = pipe.scheduler
    draw = prompt_rows.Draw(0, 12, 2, PROMPTS, (4, 8, 8))
    errors, own_samples = [], []
    call = TINY["StableDiffusion3Pipeline"].call | {"guidance_scale": 1.0, "output_type": "latent"}
    for ids, x0, numbers in draw.batches(4):
        assert np.array_equal(x0.numpy(), noise.normal(0, ids, (4, 8, 8), noise.EVALUATION))
        prompts = [PROMPTS[i] for i in numbers.tolist()]
        own = pipe(prompts, latents=x0, **call).images
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # exact at one step
        one = pipe(prompts, latents=x0, **call | {"num_inference_steps": 1}).images
        pipe.scheduler = scheduler
        own_samples.append(own)
        errors.append((one - own).square().flatten(1).mean(1))
    deviation = torch.cat(own_samples).double().var(0).mean().sqrt()
    rms = torch.cat(errors).mean().sqrt() / deviation
    student = next(row for row in result["rows"] if row["name"] == "student_1")
    assert student["rms"]["value"] == pytest.approx(float(rms), rel=1e-4)
    assert result["protocol"]["deviation"] == pytest.approx(float(deviation), rel=1e-5)


def test_intervals_resample_prompts():
    """Of independent samples the interval is that of the mean; copies within a prompt add nothing."""
    values = np.random.default_rng(0).normal(3, 1, 400)
    one = intervals.mean_interval(values[:, None], np.arange(400), 0)
    assert one["value"] == pytest.approx(values.mean())
    assert one["high"] - one["low"] == pytest.approx(4 * values.std() / 20, rel=0.1)
    copied = intervals.mean_interval(np.repeat(values, 4)[:, None], np.repeat(np.arange(400), 4), 0)
    assert copied == pytest.approx(one)
    gaps = np.stack([values, 2 * values], axis=1)
    gaps[0] = np.nan  # is left out
    ratio = intervals.mean_interval(gaps, np.arange(400), 0, lambda m: m[..., 1] / m[..., 0])
    assert ratio == pytest.approx({"value": 2, "low": 2, "high": 2})


def test_measures_have_their_closed_forms():
    x = torch.zeros(4, 1, 2, 2)
    x[1], x[3] = 3.0, 1.0  # prompts of two samples, 3 and 1 apart
    assert prompt_scoring.spread(x, 2).tolist() == [3, 3, 1, 1]
    assert prompt_scoring.psnr(x, x).tolist() == [100] * 4
    assert prompt_scoring.psnr(x[2:], x[2:] + 0.1) == pytest.approx(20, abs=1e-4)
    verdicts = {"digit": torch.tensor([1.0, 1, 0]), "colour": torch.tensor([1.0, 0, torch.nan])}
    found = judges.judged(verdicts)
    assert found["accuracy"].tolist() == [1, 0, 0]
    assert list(found) == ["accuracy", "accuracy: digit", "accuracy: colour"]
    words = ["zero", "one", "two"]
    named = [judges.named(p, words) for p in ("A one, thin", "one or two", "someone")]
    assert named == [1, -1, -1]


def test_draws_give_each_prompt_its_turn():
    draw = prompt_rows.Draw(0, 24, 2, list("abcdef"), (2,))
    numbers = draw.numbers()
    assert (numbers[::2] == numbers[1::2]).all()
    assert sorted(numbers[:12:2]) == sorted(numbers[12::2]) == list(range(6))


def test_what_cannot_be_evaluated_is_refused(made):
    for more, message in [
        (["prompts.held_out=0"], "prompts has no held-out ones"),
        (["samples=5"], "samples=5: expected a multiple of per_prompt=2"),
        (["steps=[]"], "steps=.*expected one or more"),
        (["classes=[a,b]"], "classes are those of a classifier"),
        (["classifier=x"], "classifier has no effect"),
        (["judge=os:system", "samples=4"], "expected flowmatch.MODULE:FUNCTION"),
        (["features=values"], "features has no effect without reference"),
        (["reference.source=digits"], r"reference: holds \[1, 8, 8\]; the pipeline makes \[3, 16"),
        (
            [f"student={made}/other"],
            "student=.*is of another pipeline than teacher: time: timestep",
        ),
        ([f"student={made}/plain"], "was trained without prompts"),
    ]:
        with pytest.raises(UserError, match=message):
            run(evaluate_prompts, *words(made, "wrong", *more))
