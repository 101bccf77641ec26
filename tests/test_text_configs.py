"""The experiments of large pipelines, planned on tiny ones of the same classes; and `new --teacher`."""

import json

import pytest

from flowmatch.config import UserError, validate
from flowmatch.runs import new
from flowmatch.runs.command import execute
from flowmatch.runs.experiment import Experiment, find_config
from flowmatch.runs.values import parse_word, read_yaml
from pipelines import encode_prompts, evaluate_prompts, export, generate_pairs, reflow
from tests.tiny import TINY

CLASSES = {
    "sd35_medium": "StableDiffusion3Pipeline",
    "sana_1600m": "SanaPipeline",
    "flux_dev": "FluxPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "qwen_image": "QwenImagePipeline",
    "wan21_1300m": "WanPipeline",
}
PROMPTS = [f"a cat number {number}" for number in range(12)]
STAGES = {"pairs": generate_pairs, "conditions": encode_prompts, "reflow": reflow}
STAGES["evaluate"] = evaluate_prompts


def experiment_of(file, folder, tiny, *more):
    """An experiment, with a tiny pipeline in the place of its teacher."""
    tiny.build().save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    call = {key: value for key, value in tiny.call.items() if key != "output_type"}
    experiment = Experiment(read_yaml(str(file)), str(file))
    words = [f"teacher={folder}/pipe", f"prompts.path={folder}/prompts.txt", "device=cpu"]
    words += [f"call={json.dumps(call)}", "prompts.held_out=0.2", *more]
    for word in words:
        experiment.apply(*parse_word(word))
    return experiment


def plan(experiment, section, dry_run=True):
    stage = STAGES[section].STAGE
    config = validate(stage.config, experiment.values(section, stage.config))
    execute(stage, config, dry_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_an_experiment_of_a_large_pipeline_is_planned(tmp_path, monkeypatch, name, capsys):
    """Every key of the file is read; pairs and conditions are made small, so that reflow has inputs."""
    monkeypatch.chdir(tmp_path)
    small = [
        "pairs.shards=1",
        "pairs.shard_size=4",
        "pairs.precision=fp32",
        "reflow.fit.batch_size=4",
    ]
    small += ["evaluate.precision=fp32", "reflow.fit.micro_batch=2", "reflow.fit.shard=false"]
    experiment = experiment_of(find_config(name), tmp_path, TINY[CLASSES[name]], *small)
    for section in ("pairs", "conditions"):
        plan(experiment, section, dry_run=False)
    plan(experiment, "reflow")
    experiment.apply("evaluate.student", None)
    experiment.apply("evaluate.compute_batch", 2)
    plan(experiment, "evaluate")
    said = capsys.readouterr().out
    assert f"{CLASSES[name]}: " in said
    assert "4 pairs of" in said
    assert "a row" in said
    assert read_yaml(find_config(name))["call"]["num_inference_steps"] >= 20


def test_new_writes_a_file_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new.main(["mine", "--teacher", "pipe", "--prompts", "prompts.txt"])
    tiny = TINY["StableDiffusion3Pipeline"]
    experiment = experiment_of(tmp_path / "mine.yaml", tmp_path, tiny, "pairs.shards=1")
    plan(experiment, "pairs")
    said = capsys.readouterr().out
    assert "wrote mine.yaml: set call in it" in said
    assert "512 pairs of [4, 8, 8] in 1 shard" in said
    for words, message in [
        (["mine", "--teacher", "pipe", "--prompts", "prompts.txt"], "mine.yaml: exists already"),
        (["other", "--teacher", "pipe"], "--teacher PIPELINE and --prompts LIST belong together"),
        (["other", "--teacher", ".", "--prompts", "x"], "without model_index.json is no pipeline"),
        (["sdxl", "--teacher", "pipe", "--prompts", "x"], "a shipped experiment has that name"),
    ]:
        with pytest.raises(SystemExit):
            new.main(words)
        assert message in capsys.readouterr().err


def test_stages_read_the_folders_beside_them(tmp_path):
    tiny = TINY["StableDiffusion3Pipeline"]
    experiment = experiment_of(find_config("sd35_medium"), tmp_path, tiny)
    values = experiment.values("reflow", reflow.STAGE.config)
    assert values["conditions"] == "runs/sd35_medium/conditions"
    exported = validate(export.ExportConfig, experiment.values("export", export.ExportConfig))
    assert exported.pipeline == f"{tmp_path}/pipe"
    assert exported.student == "runs/sd35_medium/reflow"
    assert exported.call.model_dump()["guidance_scale"] == 4.5
    with pytest.raises(UserError, match="neither a key of a stage nor a section"):
        Experiment(read_yaml(find_config("sd35_medium")) | {"promts": 1}, "mine.yaml")
