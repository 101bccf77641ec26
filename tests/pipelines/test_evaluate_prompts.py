"""Evaluation on prompts: closed forms of its measures, and a tiny SD3 pipeline from end to end."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from flowmatch.config import UserError
from flowmatch.evaluation import (
    comparisons,
    features,
    intervals,
    judges,
    metrics,
    prompt_rows,
    prompt_scoring,
)
from flowmatch.evaluation.config import EvaluatePromptsConfig
from flowmatch.flow import noise
from flowmatch.models import networks
from flowmatch.models.digest import module_digest, network_digest
from flowmatch.models.pipeline import open_pipeline
from flowmatch.runs import manifest
from flowmatch.runs.command import load
from pipelines import evaluate_prompts
from tests.stages import run
from tests.tiny import TINY, encoders, tokenizers

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
    assert "of a latent value" in page
    assert "| student, 1 step | 1 |" in (folder / "one" / "table.md").read_text()


def test_the_error_is_that_of_stock_calls(made):
    """By hand: a stock run from the same noise, one Euler step of the network, and their distance."""
    result = json.loads((made / "one" / "metrics.json").read_text())  # of the test before
    pipe = open_pipeline(made / "pipe", "teacher")
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


@pytest.fixture(scope="module")
def judges_folder(made):
    """A classifier that sees class 1 everywhere, pictures to compare with, tiny networks of features."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    folder = made / "judges"
    torch.manual_seed(0)
    net = features.Classifier((3, 16, 16), 2)
    with torch.no_grad():
        net.head[1].bias[1] += 1000
    (folder / "classifier").mkdir(parents=True)
    files = features.save(net, folder / "classifier")
    facts = {"accuracy": 0.5, "sha256": module_digest(net), "shape": [3, 16, 16], "classes": 2}
    names = {"stage": "train_classifier", "config": {}, "inputs": {}, "outputs": files}
    manifest.seal(folder / "classifier", **names, **facts)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.save(folder / "real.npy", pictures)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    image = {"image_size": 16, "patch_size": 8}
    ViTModel(ViTConfig(**sizes, **image)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    words = sizes | ends | {"vocab_size": encoders.VOCAB, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=words, vision_config=sizes | image, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**square).save_pretrained(folder / "clip")
    tokenizers.clip(16).save_pretrained(folder / "clip")
    return folder


def test_judges_features_and_files(made, judges_folder):
    """Accuracy and distances as by hand; what a folder of pictures holds; and pictures made later."""
    more = [
        *(f"classifier={judges_folder}/classifier", "classes=[white,red]"),
        *("reference.source=npz", f"reference.path={judges_folder}/real.npy"),
        *(f"dino={judges_folder}/vit", f"clip={judges_folder}/clip", "steps=[1,3]"),
    ]
    run(evaluate_prompts, *words(made, "judged", *more))
    before = (made / "judged" / "metrics.json").read_bytes()
    result = json.loads(before)
    rows = {row["name"]: row for row in result["rows"]}
    for row in rows.values():  # each half of the prompts names one of the two colours
        assert row["accuracy"]["value"] == 0.5
        assert row["accuracy"]["low"] < 0.5 < row["accuracy"]["high"]
        assert row["distance"]["value"] > 0
    same, one = rows["student_3"], rows["student_1"]
    for name in ("dino", "clip"):
        assert same[name]["value"] == pytest.approx(1, abs=1e-4)
        assert one[name]["value"] < 1 - 1e-4
    gap = one["clip_text"]["value"] - rows["teacher"]["clip_text"]["value"]
    assert one["clip_text_difference"]["value"] == pytest.approx(gap)
    inputs = manifest.read(made / "judged", "x")["inputs"]
    assert {"teacher", "student", "prompts", "classifier", "reference", "dino", "clip"} == set(
        inputs
    )
    run(evaluate_prompts, *words(made, "judged", *more, f"samples_to={made}/files"))
    assert (made / "judged" / "metrics.json").read_bytes() == before
    index = json.loads((made / "files" / "index.json").read_text())
    assert index["prompts"]["00000-a-red-fox"] == "a red fox"
    assert [row["name"] for row in index["rows"]] == list(rows)
    found = sorted((made / "files").glob("*/*/*.png"))
    assert len(found) == 12 * len(rows)
    seen = torch.stack(
        [torch.from_numpy(np.array(Image.open(p))) for p in found if "teacher/" in str(p)]
    )
    net, _ = features.load(str(judges_folder / "classifier"), "classifier", (3, 16, 16))
    real = torch.from_numpy(np.load(judges_folder / "real.npy"))
    order = noise.Order(20, 0)(np.arange(12))

    def embedded(pictures):
        return features.embed(pictures.permute(0, 3, 1, 2) / 127.5 - 1, net)

    distance = metrics.frechet(embedded(real[order]), embedded(seen))
    assert rows["teacher"]["distance"]["value"] == pytest.approx(distance, rel=0.02)
    assert not (made / "files.partial").exists()
    with pytest.raises(UserError, match="samples_to=.*holds other files"):
        run(evaluate_prompts, *words(made, "later", f"samples_to={made}/files"))


def test_the_perceptual_distance_is_that_of_torchmetrics(monkeypatch):
    """On a stand-in for torchvision's network, whose weights are not here: 0 for equal pictures."""
    from torch import nn
    from torchmetrics.functional.image import lpips as functional
    from torchmetrics.image import lpip

    def alexnet(weights):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 192, 1)]
        layers += [nn.ReLU(), nn.Identity(), nn.Conv2d(192, 384, 1), nn.ReLU()]
        layers += [nn.Conv2d(384, 256, 1), nn.ReLU(), nn.Conv2d(256, 256, 1), nn.ReLU()]
        return SimpleNamespace(features=nn.Sequential(*layers))

    models = SimpleNamespace(alexnet=alexnet, AlexNet_Weights=SimpleNamespace(DEFAULT=None))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    for module in (functional, lpip):
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    x, y = torch.rand(2, 3, 3, 16, 16)
    found = comparisons.Lpips("alex", "cpu")
    found.begin(y, ["a"] * 3)
    assert found.measure(y)["lpips"].tolist() == [0, 0, 0]
    far = found.measure(x)["lpips"]
    assert far.shape == (3,)
    assert (far > 0).all()
    theirs = lpip.LearnedPerceptualImagePatchSimilarity("alex", normalize=True)(x, y)
    assert far.mean() == pytest.approx(float(theirs))


@pytest.mark.parametrize("kind", ["Clip", "Dino"])
def test_a_network_whose_files_lack_weights_compares_nothing(judges_folder, tmp_path, kind):
    place = tmp_path / kind
    shutil.copytree(judges_folder / {"Clip": "clip", "Dino": "vit"}[kind], place)
    weights = load_file(place / "model.safetensors")
    lost = next(name for name in sorted(weights) if "layer" in name and "pooler" not in name)
    save_file({n: w for n, w in weights.items() if n != lost}, place / "model.safetensors")
    with pytest.raises(ValueError, match="its files lack weights: "):
        getattr(comparisons, kind)(str(place), "cpu")


def test_what_cannot_be_evaluated_is_refused(made):
    """Each line once; those of one run come together."""
    faults = {
        "prompts has no held-out ones": "prompts.held_out=0",
        "samples=5: expected a multiple of per_prompt=2": "samples=5",
        "steps=[]: expected one or more numbers": "steps=[]",
        "classes are those of a classifier; set classifier=": "classes=[a,b]",
        "features has no effect without reference": "features=values",
    }
    with pytest.raises(UserError) as error:
        run(evaluate_prompts, *words(made, "wrong", *faults.values()))
    for message in faults:
        assert message in str(error.value)
    faults = {
        "expected flowmatch.MODULE:FUNCTION": "judge=os:system",
        "reference: holds [1, 8, 8]; the pipeline makes [3, 16, 16]": "reference.source=digits",
        "clip=nowhere: cannot be loaded": "clip=nowhere",
        "lpips=vgg": "lpips=vgg",
    }
    with pytest.raises(UserError) as error:
        run(evaluate_prompts, *words(made, "wrong", *faults.values()))
    for message in faults:
        assert message in str(error.value)
    for judge in ("flowmatch.nowhere:judge", "flowmatch.config:nothing"):
        with pytest.raises(UserError, match=f"judge={judge}: "):
            run(evaluate_prompts, *words(made, "wrong", f"judge={judge}"))
    for student, message in [
        ("other", "is of another pipeline than teacher: time: timestep -> t"),
        ("plain", "was trained without prompts"),
    ]:
        with pytest.raises(UserError, match=message):
            run(
                evaluate_prompts, *words(made, "wrong", f"student={made}/{student}", "classifier=x")
            )


def test_a_noise_teacher_alone_in_half_precision(tmp_path):
    """Without a student, guided: the teacher's rows by its own scheduler, two evaluations a step."""
    name = "StableDiffusionPipeline"
    TINY[name].build().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    call = [f"call.{k}={json.dumps(v)}" for k, v in TINY[name].call.items() if k != "output_type"]
    run(
        evaluate_prompts,
        *(f"teacher={tmp_path}/pipe", f"run_dir={tmp_path}/run", "precision=bf16"),
        *(f"prompts.path={tmp_path}/prompts.txt", "prompts.held_out=0.5", "steps=2"),
        *("samples=4", "per_prompt=1", "compute_batch=3", *call),
    )
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    steps = TINY[name].call["num_inference_steps"]
    found = [(row["name"], row["evaluations"]) for row in result["rows"]]
    assert found == [("teacher", 2 * steps), ("teacher_2", 4)]
    assert 0 < result["rows"][1]["rms"]["value"] < 2
    assert "diversity" not in result["rows"][1]
    assert "student" not in result
