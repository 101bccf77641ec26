"""The plan of an evaluation: what cannot be sampled or scored is refused before anything is."""

import dataclasses
import json

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from flowmatch.config import UserError
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import load as load_data
from flowmatch.evaluation import scoring
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.runs.command import execute, load
from pipelines import evaluate
from tests.stages import UNET, run


def model(folder, shape, classes=None):
    """A flow model of diffusers' convention, untrained."""
    kind = {"name": "UNet2DModel", **UNET} if len(shape) == 3 else {"name": "VelocityMLP"}
    networks.save(networks.build(NetConfig(**kind), shape, classes, 0), folder)
    return folder


def stored(file, shape, labels=False, n=24, seed=0):
    """Random uint8 images, or latents as floats."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, *shape[1:], shape[0]), dtype=np.uint8)
    x = rng.normal(size=(n, *shape)).astype("f4") if shape[0] == 4 else x
    np.savez(file, x=x, **({"y": np.arange(n) % 2} if labels else {}))
    return file


def planned(root, teacher, data, *words, student=None):
    """Plan an evaluation; return its faults."""
    models = [f"teacher={teacher}", f"student={student or teacher}"]
    few = ["steps=[1]", "samples=16", "converged_steps=1", "device=cpu", f"run_dir={root}/evaluate"]
    config, _ = load(evaluate.EvaluateConfig, [*models, f"data={{{data}}}", *few, *words])
    try:
        execute(evaluate.STAGE, config, True)
    except UserError as error:
        return error.faults
    return []


@pytest.fixture
def points(tmp_path):
    return tmp_path, model(tmp_path / "mlp", (2,)), "source: ring, samples: 100"


@pytest.mark.parametrize("dimensions", [1, 3])
def test_points_of_any_number_of_dimensions_are_scored_and_drawn(tmp_path, dimensions):
    teacher = model(tmp_path / "mlp", (dimensions,))
    x = np.random.default_rng(0).normal(size=(40, dimensions)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    words = [f"teacher={teacher}", f"student={teacher}", "samples=16", "steps=[1]"]
    words += [f"data={{source: npz, path: {tmp_path}/x.npy}}", "converged_steps=1"]
    run(evaluate, f"run_dir={tmp_path}/evaluate", *words)
    assert (tmp_path / "evaluate/report.html").is_file()


def test_what_images_are_scored_on_is_refused_for_points_and_latents(points):
    root, net, ring = points
    (fault,) = planned(root, net, ring, "distance=frechet")
    assert "features='classifier' takes images" in fault
    assert "use distance=sliced_wasserstein, or features=values" in fault
    assert planned(root, net, ring, "distance=frechet", "features=values") == []
    net = model(root / "unet", (4, 8, 8))
    latents = f"source: latents, path: {stored(root / 'latents.npz', (4, 8, 8), labels=True)}"
    for labels in ("", ", labels: true"):
        (fault,) = planned(root, net, latents + labels, "distance=frechet")
        assert "takes images, but the data has shape [4, 8, 8]" in fault
    assert planned(root, net, latents) == []


def test_values_too_many_for_a_frechet_distance_are_refused_with_a_way_on(tmp_path):
    net = model(tmp_path / "unet", (3, 64, 64))
    images = f"source: npz, path: {stored(tmp_path / 'images.npz', (3, 64, 64), labels=True)}"
    ways = "features=inception with inception_weights=FILE, or features=classifier with classifier="
    (fault,) = planned(tmp_path, net, images, "features=values")
    assert "takes at most 4096 values per sample, the data has 12288" in fault
    assert ways in fault
    (fault,) = planned(tmp_path, net, images)  # no labels: the values are no way on
    assert "needs data.labels=true, or classifier=" in fault
    assert ways in fault
    assert "use features=values" not in fault
    assert planned(tmp_path, net, images + ", labels: true") == []


def test_a_key_without_effect_is_refused(points):
    root, net, ring = points
    given = ["classifier=nowhere", "inception_weights=nowhere", "features=inception"]
    found = planned(root, net, ring, *given)
    assert [fault.partition(" ")[0] for fault in found] == [given[2], given[0], given[1]]
    assert all("distance=sliced_wasserstein" in fault for fault in found)
    digits = "source: digits"
    net = model(root / "unet", (1, 8, 8))
    (fault,) = planned(root, net, digits, "features=values", given[1])
    assert fault == "inception_weights=nowhere has no effect with features='values'; leave it out"


def test_guidance_and_classes_that_models_do_not_share_are_refused(tmp_path):
    """An unlabelled model was sampled without guidance, and its table told of it."""
    names = {None: "none", 3: "three", 4: "four", 10: "ten"}
    models = {k: model(tmp_path / name, (1, 8, 8), k) for k, name in names.items()}
    words = ["source: digits", "features=values"]
    found = planned(tmp_path, models[None], *words, "guidance=2.0")
    expected = "guidance=2.0: this network takes no labels; use guidance=1"
    assert found == [f"teacher: {expected}", f"student: {expected}"]
    differ = "numbers of classes differ: teacher 4, student {}; use models and data"
    for k in (3, None):
        (fault,) = planned(tmp_path, models[4], *words, student=models[k])
        assert fault.startswith(differ.format(k or "none"))
    labelled = ["source: digits, labels: true", "features=values"]
    (fault,) = planned(tmp_path, models[4], *labelled)
    assert "teacher 4, student 4, data 10;" in fault
    assert (
        planned(tmp_path, models[10], *labelled) == planned(tmp_path, models[None], *labelled) == []
    )


def test_a_diffusion_model_without_a_null_class_is_not_guided(tmp_path):
    net = model(tmp_path / "unet", (1, 8, 8), 9)
    DDPMPipeline(networks.load(net, "net"), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    student = model(tmp_path / "student", (1, 8, 8), 10)
    words = ["source: digits", "features=values", "guidance=2.0"]
    (fault,) = planned(tmp_path, tmp_path / "ddpm", *words, student=student)
    assert fault.startswith("teacher: guidance=2.0: this teacher has no null class")


def test_the_plan_counts_what_guidance_and_a_last_step_cost(tmp_path, capsys):
    net = model(tmp_path / "unet", (1, 8, 8), 10)
    words = ["source: digits", "features=values", "steps=[1,2]", "converged_steps=4"]
    assert planned(tmp_path, net, *words) == []
    assert f"{16 * 2 * (3 + 8):,} network evaluations for 3 rows" in capsys.readouterr().out
    assert planned(tmp_path, net, *words, "guidance=2.0") == []
    assert f"{16 * 2 * 2 * (3 + 8):,} network evaluations for" in capsys.readouterr().out
    plain = model(tmp_path / "plain", (1, 8, 8))
    DDPMPipeline(networks.load(plain, "net"), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    assert planned(tmp_path, tmp_path / "ddpm", *words, student=plain) == []
    assert f"{16 * (3 + 8 + 3) + 16 * (3 + 8):,} network eval" in capsys.readouterr().out


def test_a_reference_that_is_the_data_is_none(tmp_path, capsys):
    """The floor of its images to themselves would be 0; a digest may be of two splits."""
    net = model(tmp_path / "mlp", (2,))  # points, because an MLP is fast
    for seed, name in enumerate(("train", "test")):
        x, y = np.random.default_rng(seed).normal(size=(24, 2)).astype("f4"), np.arange(24) % 2
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    train, test = (f"source: npz, path: {tmp_path}/{name}.npz" for name in ("train", "test"))
    words = [
        "distance=frechet",
        "features=values",
        f"teacher={net}",
        f"student={net}",
        "steps=[1]",
        "samples=24",
    ]
    words += [f"data={{{train}}}", "converged_steps=1"]
    found = {}
    for name, reference in (("none", None), ("same", f"{train}, labels: true"), ("other", test)):
        more = [] if reference is None else [f"reference={{{reference}}}"]
        run(evaluate, f"run_dir={tmp_path}/{name}", *words, *more)
        result = json.loads((tmp_path / name / "metrics.json").read_text())
        found[name] = result["floor"], "reference" in result["protocol"]
        told = "reference holds the same items as data" in capsys.readouterr().out
        assert told == (name == "same")
    assert found["same"] == found["none"]
    assert found["same"][0]["nearest"] > 0
    assert found["other"][0] != found["none"][0]
    assert found["other"][1]
    data = [
        load_data(DataConfig(source="npz", path=f"{tmp_path}/{n}.npz")) for n in ("train", "test")
    ]
    same = [dataclasses.replace(d, digest="that of the folder") for d in data]
    assert not scoring.same(*same)
